"""The last layers of the embedded models' decoder, which took half of its time, as one convolution at half the size."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tail(nn.Module):
    """Nearest-neighbour upsampling by two and two 3x3 convolutions with nothing between them: (B, C, H, W) -> 2H x 2W.

    Two such convolutions are one of 5x5, and each of four neighbouring pixels sees 3x3 pixels of the smaller map. Only
    the outermost pixels differ, whose second convolution sees zeros where the 5x5 would see the first: these are
    computed by the layers themselves.
    """

    kernel: Tensor  # (4 O, C, 3, 3)
    bias: Tensor  # (4 O)

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d):
        """`first` has no bias, `second` has one."""
        super().__init__()
        self.layers = nn.Sequential(nn.Upsample(scale_factor=2), first, second)
        assert first.bias is None and second.bias is not None
        kernel = four_kernels(F.conv_transpose2d(second.weight.detach(), first.weight.detach()))
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_buffer("bias", second.bias.detach().repeat_interleave(4), persistent=False)

    def forward(self, small: Tensor) -> Tensor:
        image = F.pixel_shuffle(F.conv2d(small, self.kernel.to(small), self.bias.to(small), padding=1), 2)
        for row, strip in ((0, small[:, :, :2]), (-1, small[:, :, -2:])):
            image[:, :, row] = self.layers(strip)[:, :, row]
        for column, strip in ((0, small[..., :2]), (-1, small[..., -2:])):
            image[..., column] = self.layers(strip)[..., column]
        return image


def four_kernels(kernel: Tensor) -> Tensor:
    """A 5x5 kernel on an upsampled map as four on the map itself, (O, C, 5, 5) -> (4 O, C, 3, 3) for pixel_shuffle."""
    seen = torch.zeros(2, 3, 5)  # parity of the pixel, offset in the map, offset in the upsampled map
    for parity in (0, 1):
        for offset in range(5):
            seen[parity, (parity + offset) // 2, offset] = 1
    parts = torch.einsum("oiyx,pay,qbx->opqiab", kernel, seen, seen)
    return parts.flatten(0, 2).contiguous()


def with_tail(layers: nn.Sequential) -> nn.Sequential:
    """A decoder's layers with the last three, an upsampling and two convolutions, replaced by a Tail."""
    *rest, upsampling, first, second = layers
    assert isinstance(upsampling, nn.Upsample) and isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    return nn.Sequential(*rest, Tail(first, second))
