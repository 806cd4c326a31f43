"""Deterministic weights for the networks of the evaluation metrics, in their published layouts."""

import math

from torch import Tensor

from tests.golden import reward_recipe as gold

IMAGE_SUFFIXES = ("land300x451", "port337x225", "small96")  # larger than the network's input, of odd shape, and smaller


def weight(name: str, shape: list[int]) -> Tensor:
    """As the rewards' weights, with batch norms near the identity and convolutions that keep a signal's size."""
    x = gold.weight(name, shape)
    if name.endswith("running_var"):
        return 1 + x.abs()
    if name.endswith("bn.weight"):
        return 1 + x
    return x * math.sqrt(2) if len(shape) == 4 else x


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: weight(name, shape) for name, shape in shapes.items()}


def lpips_heads() -> dict[str, Tensor]:
    """Heads in the layout of the lpips package: 1 x 1 convolutions without a negative weight."""
    widths = (64, 192, 384, 256, 256)
    return {f"lin{n}.model.1.weight": weight(f"lin{n}", [1, w, 1, 1]).abs() for n, w in enumerate(widths)}
