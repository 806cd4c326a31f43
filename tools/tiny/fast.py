"""Two replacements that halve the time of a training step on a CPU; results and weights are the same."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class PatchLinear(nn.Conv2d):
    """A convolution whose stride is its kernel size, as a matrix product: its bfloat16 gradient is slow otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        side = self.kernel_size[0]
        patches = input.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, h, side, w, side)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def with_linear_patches(transformer: Any) -> Any:
    """The SD3-type transformer with its patch embedding as a matrix product; the state keeps its names."""
    transformer.pos_embed.proj.__class__ = PatchLinear
    return transformer


def plain_attention() -> Any:
    """Context with attention as matrix products: the fused kernel's gradient is slow for short sequences."""
    return sdpa_kernel(SDPBackend.MATH)
