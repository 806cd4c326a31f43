"""LPIPS: perceptual distance between two images, from the layers of an AlexNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (64, 192, 384, 256, 256)
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], as in LPIPS 0.1


def alexnet() -> nn.Sequential:
    """The convolutional part of torchvision's AlexNet, with its layer numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class Lpips(nn.Module):
    """Zhang et al. 2018 (arXiv 1801.03924), equation 1, version 0.1 with AlexNet:

    d(x, y) = sum_l mean_hw | sqrt(w_l) (x_l / |x_l| - y_l / |y_l|) |^2
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = alexnet()
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in CHANNELS)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Unit vectors over the channels after each ReLU, float (B, H, W, 3) in [0, 1] -> 5 times (B, C, h, w)."""
        pixels = images.permute(0, 3, 1, 2) * 2 - 1
        x = (pixels - pixels.new_tensor(MEAN).view(3, 1, 1)) / pixels.new_tensor(STD).view(3, 1, 1)
        activations = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return activations

    def between(self, x: list[Tensor], y: list[Tensor]) -> Tensor:
        """Distances of images from their layers, -> (B,)."""
        parts = [F.conv2d((a - b).square(), w.view(1, -1, 1, 1)) for a, b, w in zip(x, y, self.heads, strict=True)]
        return torch.stack([part.mean((1, 2, 3)) for part in parts]).sum(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of images, float (B, H, W, 3) in [0, 1] twice -> (B,)."""
        return self.between(self.layers(x), self.layers(y))

    def pairwise(self, images: Tensor) -> Tensor:
        """Mean distance over all pairs of images, (G, H, W, 3) -> (); layers are computed once per image."""
        layers = self.layers(images)
        first, second = torch.triu_indices(len(images), len(images), 1)
        return self.between([x[first] for x in layers], [x[second] for x in layers]).mean()
