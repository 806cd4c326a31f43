"""Distances between sets of features: scipy's matrix root, closed forms, and both ways to the same trace."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from comfyui_pcpo.metrics.frechet import cross_few, cross_many, diversity, frechet


def features(count, width, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)) * np.arange(1, width + 1))


@pytest.mark.parametrize(("many", "few"), [(50, 40), (50, 5), (5, 50)])
def test_frechet_is_that_of_scipys_matrix_root(many, few):
    a, b = features(many, 8, 0), features(few, 8, 1) + 0.5
    s_a, s_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = sqrtm(s_a @ s_b + 1e-12 * np.eye(8)).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(s_a + s_b - 2 * root)
    assert frechet(a, b) == pytest.approx(want, rel=1e-5)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-10)


def test_frechet_of_a_set_to_itself_is_zero_and_of_a_shifted_one_the_shift():
    for count in (5, 50):
        a = features(count, 8, 2)
        assert frechet(a, a) == pytest.approx(0, abs=1e-9)
        assert frechet(a, a + 3) == pytest.approx(8 * 9)
        assert frechet(a.float(), a.float() + 3) == pytest.approx(8 * 9, rel=1e-5)


@pytest.mark.slow
def test_few_images_and_many_give_the_same_trace():
    x, y = features(6, 10, 3), features(9, 10, 4)
    torch.testing.assert_close(cross_few(x, y), cross_many(x.T @ x, y.T @ y), rtol=1e-6, atol=0)


def test_one_image_has_no_spread():
    with pytest.raises(ValueError, match="2 or more rows"):
        frechet(features(1, 4, 0), features(4, 4, 0))


def test_sets_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="the sets have 4 and 3 features"):
        frechet(features(5, 4, 0), features(5, 3, 0))


def test_diversity_is_zero_for_equal_images_and_one_for_orthogonal_ones():
    assert diversity(torch.ones(4, 3), 2) == pytest.approx(0, abs=1e-12)
    assert diversity(torch.eye(4), 2) == pytest.approx(1)
    assert diversity(torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]]), 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="do not split into groups of 3"):
        diversity(torch.ones(4, 3), 3)
