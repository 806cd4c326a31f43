"""emoji-polish: a small convolutional network that scores the cleanness of a drawing, whatever its content."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTHS = (16, 32, 48)


class PolishNet(nn.Module):
    """Image -> score, 1 for an untouched drawing, 0 for a fully degraded one; float (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [
                *(nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.GELU()),
                *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU()),
            ]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(2 * before, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B,); scores the mean and the maximum over positions."""
        features = self.trunk(images)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))[:, 0]


def load_polish(folder: Path) -> PolishNet:
    """The trained network in float32, in eval mode, without gradients."""
    model = PolishNet()
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    return model.eval().requires_grad_(False)
