"""Small masks and positions are known beside their shapes, and unknown once an unknown number is written to them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.memory.contents import KnownContents, contents


@pytest.fixture
def shapes():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, KnownContents(mode):
        yield mode


def test_what_follows_from_known_numbers_is_known(shapes):
    mask = torch.arange(6).reshape(2, 3) > 2
    assert contents(mask).tolist() == [[False] * 3, [True] * 3]
    assert mask.sum(dim=1).tolist() == [0, 3]
    assert mask.nonzero().shape == (3, 2)
    assert torch.randn(2, 3, 5)[mask].shape == (3, 5)
    filled = torch.zeros(4, dtype=torch.long)
    filled[1:3] = 7
    assert contents(filled).tolist() == [0, 7, 7, 0]


def test_random_uninitialised_floating_point_and_large_tensors_are_unknown(shapes):
    known = torch.arange(3)
    for t in (
        torch.randint_like(known, 5),
        torch.empty_like(known),
        torch.zeros(3),
        torch.zeros(2**17, dtype=torch.long),
    ):
        assert contents(t) is None


@pytest.mark.parametrize("through_a_view", [True, False])
def test_an_unknown_number_makes_a_tensor_and_its_views_unknown(shapes, through_a_view):
    base, unknown = torch.zeros(4, dtype=torch.bool), torch.randn(4) > 0
    view = base[:2]
    assert contents(base) is not None and contents(view) is not None
    if through_a_view:
        view.copy_(unknown[:2])
    else:
        base.copy_(unknown)
    assert contents(base) is None and contents(view) is None


def test_random_numbers_written_in_place_are_unknown(shapes):
    base = torch.zeros(4, dtype=torch.long)
    view = base[:2]
    base.random_(5)
    assert contents(base) is None and contents(view) is None
