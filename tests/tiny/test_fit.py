"""The training loop of the embedded models, its optimizer, and the layers that make it fast."""

import math

import numpy as np
import pytest
import torch

from tools.tiny import train_text
from tools.tiny.__main__ import main
from tools.tiny.codec import CHANNELS
from tools.tiny.fast import with_linear_patches
from tools.tiny.fit import StageSettings, batch_indices, make_optimizers, numpy_generator, start
from tools.tiny.generators import LATENT, make_flow
from tools.tiny.muon import Muon, orthogonal


def test_a_batch_larger_than_the_drawings_is_refused():
    with pytest.raises(ValueError, match=r"batch is 64, but there are 48 drawings. Use --batch 48 or less"):
        next(batch_indices(48, 64))


def test_resuming_without_a_state_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"flow.pt. Leave out --resume for a first run"):
        start(torch.nn.Linear(2, 2), tmp_path / "flow.pt", StageSettings(tmp_path, resume=True))


@pytest.mark.parametrize("minutes", [0, -1, math.nan])
def test_a_stage_needs_time(tmp_path, minutes):
    with pytest.raises(ValueError, match=r"minutes is .*, but a stage trains for a time. Use --minutes above 0"):
        StageSettings(tmp_path, minutes=minutes)


def test_one_seed_decides_the_numbers_of_numpy_too():
    def numbers(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [int(numpy_generator().integers(2**40)) for _ in range(2)]

    assert numbers(1) == numbers(1) != numbers(2)
    assert len(set(numbers(1))) == 2


def test_a_resumed_stage_sees_other_captions(tmp_path, monkeypatch):
    seen = []

    def recorded(number: int, rng: np.random.Generator) -> list:
        seen.append(sample(number, rng))
        return seen[-1]

    sample = train_text.captions
    monkeypatch.setattr(train_text, "captions", recorded)
    common = ["text", "--work", str(tmp_path), "--models", str(tmp_path / "models"), "--batch", "8", "--threads", "1",
              "--minutes", "0.0001"]  # fmt: skip
    starts = []
    for more in ([], [], ["--resume"]):
        starts.append(len(seen))
        main([*common, *more])
    first, again, resumed = (seen[start] for start in starts)
    assert first == again != resumed


def test_muon_steps_along_the_nearest_orthogonal_matrix_for_tall_and_wide_ones():
    torch.manual_seed(0)
    for shape in ((2, 8, 8), (2, 24, 8), (2, 8, 24)):
        matrices = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        singular = torch.linalg.svdvals(orthogonal(matrices))
        assert singular.min() > 0.6 and singular.max() < 1.3  # the quintic iteration oscillates around 1
        cosine = torch.nn.functional.cosine_similarity(orthogonal(matrices).flatten(1), (left @ right).flatten(1))
        assert cosine.min() > 0.95


def test_muon_moves_kernels_by_adams_step_size_and_lowers_the_loss():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(16, 4, 3, 3))
    before, optimizer = kernel.detach().clone(), Muon([kernel], lr=0.01, weight_decay=0)
    kernel.square().sum().backward()
    optimizer.step()
    assert (kernel.detach() - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)
    assert kernel.square().sum() < before.square().sum()


def test_muon_trains_the_matrices_of_blocks_alone(tmp_path):
    model = make_flow()
    adam, muon = make_optimizers(model, StageSettings(tmp_path, muon=True))
    trained = {id(p) for p in muon.param_groups[0]["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if "transformer_blocks" in name and p.ndim > 1}
    assert len(adam.param_groups[0]["params"]) + len(trained) == len([*model.parameters()])


def test_a_patch_embedding_as_a_matrix_product_equals_the_convolution():
    torch.manual_seed(0)
    transformer, latents = make_flow(), torch.randn(3, CHANNELS, LATENT, LATENT)
    wanted, names = transformer.pos_embed.proj(latents), list(transformer.state_dict())
    found = with_linear_patches(transformer).pos_embed.proj(latents)
    torch.testing.assert_close(found, wanted)
    assert list(transformer.state_dict()) == names
