"""Inception-v3 as the Frechet Inception Distance defines it: TensorFlow's network of 2015, its pools and its resize.

The weights are those that torch-fidelity and pytorch-fid publish, in their layout; torchvision's inception_v3 is
another network. Features are the 2,048 numbers before the last layer, logits the 1,008 after it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299


class FrozenNorm(nn.Module):
    """Batch norm with the statistics of training, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = map(self.get_buffer, ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = FrozenNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def across(before: int, after: int, length: int) -> Unit:
    """A convolution of 1 x length that keeps the size."""
    return Unit(before, after, (1, length), padding=(0, length // 2))


def down(before: int, after: int, length: int) -> Unit:
    """A convolution of length x 1 that keeps the size."""
    return Unit(before, after, (length, 1), padding=(length // 2, 0))


POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # TensorFlow's mean leaves the border out
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


class Mixed(nn.Module):
    """Paths of named units and pools beside each other, their outputs stacked: `paths` reads like "a b | c | avg d"."""

    def __init__(self, units: dict[str, Unit], paths: str):
        super().__init__()
        for name, unit in units.items():
            self.add_module(name, unit)
        self.paths = [path.split() for path in paths.split("|")]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.walk(path, x) for path in self.paths], 1)

    def walk(self, path: list[str], x: Tensor) -> Tensor:
        for name in path:
            x = POOLS[name](x) if name in POOLS else self.get_submodule(name)(x)
        return x


def mixed_a(before: int, pool: int) -> Mixed:
    units = {
        "branch1x1": Unit(before, 64, 1),
        "branch5x5_1": Unit(before, 48, 1),
        "branch5x5_2": Unit(48, 64, 5, padding=2),
        "branch3x3dbl_1": Unit(before, 64, 1),
        "branch3x3dbl_2": Unit(64, 96, 3, padding=1),
        "branch3x3dbl_3": Unit(96, 96, 3, padding=1),
        "branch_pool": Unit(before, pool, 1),
    }
    dbl = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    return Mixed(units, f"branch1x1 | branch5x5_1 branch5x5_2 | {dbl} | avg branch_pool")


def mixed_b(before: int) -> Mixed:
    units = {
        "branch3x3": Unit(before, 384, 3, 2),
        "branch3x3dbl_1": Unit(before, 64, 1),
        "branch3x3dbl_2": Unit(64, 96, 3, padding=1),
        "branch3x3dbl_3": Unit(96, 96, 3, 2),
    }
    return Mixed(units, "branch3x3 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 | halve")


def mixed_c(width: int) -> Mixed:
    units = {
        "branch1x1": Unit(768, 192, 1),
        "branch7x7_1": Unit(768, width, 1),
        "branch7x7_2": across(width, width, 7),
        "branch7x7_3": down(width, 192, 7),
        "branch7x7dbl_1": Unit(768, width, 1),
        "branch7x7dbl_2": down(width, width, 7),
        "branch7x7dbl_3": across(width, width, 7),
        "branch7x7dbl_4": down(width, width, 7),
        "branch7x7dbl_5": across(width, 192, 7),
        "branch_pool": Unit(768, 192, 1),
    }
    long = " ".join(f"branch7x7dbl_{n}" for n in range(1, 6))
    return Mixed(units, f"branch1x1 | branch7x7_1 branch7x7_2 branch7x7_3 | {long} | avg branch_pool")


def mixed_d() -> Mixed:
    units = {
        "branch3x3_1": Unit(768, 192, 1),
        "branch3x3_2": Unit(192, 320, 3, 2),
        "branch7x7x3_1": Unit(768, 192, 1),
        "branch7x7x3_2": across(192, 192, 7),
        "branch7x7x3_3": down(192, 192, 7),
        "branch7x7x3_4": Unit(192, 192, 3, 2),
    }
    long = " ".join(f"branch7x7x3_{n}" for n in range(1, 5))
    return Mixed(units, f"branch3x3_1 branch3x3_2 | {long} | halve")


def mixed_e(before: int, pool: str) -> Mixed:
    """The last two blocks; TensorFlow's network has a mean pool in the first of them and a maximum in the second."""
    units = {
        "branch1x1": Unit(before, 320, 1),
        "branch3x3_1": Unit(before, 384, 1),
        "branch3x3_2a": across(384, 384, 3),
        "branch3x3_2b": down(384, 384, 3),
        "branch3x3dbl_1": Unit(before, 448, 1),
        "branch3x3dbl_2": Unit(448, 384, 3, padding=1),
        "branch3x3dbl_3a": across(384, 384, 3),
        "branch3x3dbl_3b": down(384, 384, 3),
        "branch_pool": Unit(before, 192, 1),
    }
    short = "branch3x3_1 branch3x3_2a | branch3x3_1 branch3x3_2b"
    dbl = "branch3x3dbl_1 branch3x3dbl_2"
    return Mixed(units, f"branch1x1 | {short} | {dbl} branch3x3dbl_3a | {dbl} branch3x3dbl_3b | {pool} branch_pool")


class Halve(nn.Module):
    """Maximum of 3 x 3 pixels at every second one."""

    def forward(self, x: Tensor) -> Tensor:
        return POOLS["halve"](x)


class Inception(nn.Module):
    """Pictures uint8 (B, H, W, 3) -> features (B, 2048) and logits without bias (B, 1008).

    Szegedy et al. 2016, Rethinking the Inception Architecture; Heusel et al. 2017 (arXiv 1706.08500) for the distance
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = {
            "Conv2d_1a_3x3": Unit(3, 32, 3, 2),
            "Conv2d_2a_3x3": Unit(32, 32, 3),
            "Conv2d_2b_3x3": Unit(32, 64, 3, padding=1),
            "halve_1": Halve(),
            "Conv2d_3b_1x1": Unit(64, 80, 1),
            "Conv2d_4a_3x3": Unit(80, 192, 3),
            "halve_2": Halve(),
            "Mixed_5b": mixed_a(192, 32),
            "Mixed_5c": mixed_a(256, 64),
            "Mixed_5d": mixed_a(288, 64),
            "Mixed_6a": mixed_b(288),
            "Mixed_6b": mixed_c(128),
            "Mixed_6c": mixed_c(160),
            "Mixed_6d": mixed_c(160),
            "Mixed_6e": mixed_c(192),
            "Mixed_7a": mixed_d(),
            "Mixed_7b": mixed_e(1280, "avg"),
            "Mixed_7c": mixed_e(2048, "max"),
        }
        for name, layer in self.layers.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize(images.permute(0, 3, 1, 2).float(), SIDE) - 128) / 128
        for layer in self.layers.values():
            x = layer(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize to a square: pixel i looks at i * (old / new), not at its centre, (B, C, H, W)."""
    for dim in (2, 3):
        old = x.shape[dim]
        place = torch.arange(side, device=x.device) * (old / side)
        low = place.floor().long().clamp(max=old - 1)
        share = (place - low).to(x.dtype).view((-1, 1) if dim == 2 else (-1,))
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, (low + 1).clamp(max=old - 1)) * share
    return x
