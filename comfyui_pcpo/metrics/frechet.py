"""Frechet distance, diversity and Inception Score, computed from features of images."""

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, (N, D), (M, D) -> float, in float64.

    Heusel et al. (arXiv 1706.08500):  |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))
    """
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"the {name} set has shape {tuple(x.shape)}, but must be (N, D) with 2 or more rows.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features. Use one network for both.")
    a, b = a.double(), b.double()
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))  # S_a = x^T x
    cross = cross_few(x, y) if min(len(x), len(y)) < x.shape[1] else cross_many(x.T @ x, y.T @ y)
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return float(distance.clamp(min=0))


def cross_many(s_a: Tensor, s_b: Tensor) -> Tensor:
    """tr (S_a S_b)^(1/2): the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), (D, D), (D, D) -> ()."""
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()


def cross_few(x: Tensor, y: Tensor) -> Tensor:
    """The same for S_a = x^T x, S_b = y^T y: the singular values of x y^T, (N, D), (M, D) -> ()."""
    return torch.linalg.svdvals(x @ y.T).sum()


def diversity(features: Tensor, group_size: int) -> float:
    """Mean distance between images of the same prompt, (P * G, D) -> float: 1 - cosine over all pairs of a group."""
    if group_size < 2 or len(features) % group_size:
        raise ValueError(
            f"{len(features)} rows do not split into groups of {group_size}. Use whole groups of 2 or more images."
        )
    unit = torch.nn.functional.normalize(features.double(), dim=-1).unflatten(0, (-1, group_size))
    cosine = unit @ unit.transpose(1, 2)
    pairs = group_size * (group_size - 1)
    return float(((1 - cosine).sum((1, 2)) / pairs).mean())


def inception_score(logits: Tensor) -> float:
    """Confidence and variety of a classifier's predictions, (N, classes) -> float from 1 to classes, in float64.

    Salimans et al. (arXiv 1606.03498):  exp(mean_n KL(p(y | x_n) || p(y))), all images in one split
    """
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, but must be (N, classes) with 2 or more rows.")
    each = logits.double().log_softmax(1)
    overall = each.exp().mean(0).log()
    return float((each.exp() * (each - overall)).sum(1).mean().exp())
