"""How the layers of a LoRA compute: peft's sum, in fewer passes over memory."""

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer, LoraVariant
from torch import Tensor


class SumInOnePass(LoraVariant):
    """W x + s B A x without a tensor for s B A x.

    B's transpose is made contiguous (a copy of rank x out): autograd then multiplies for the gradients of B and of A x
    in the order that takes a CPU a third to a tenth of the time.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Input (..., in) and W x (..., out) -> (..., out); of a convolution (B, in, H, W), (B, out, h, w)."""
        down, up = module.lora_A[active_adapter](x), module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        if isinstance(module, Conv2d):
            return torch.add(result, up(down), alpha=scale)
        transpose = up.weight.t().contiguous()
        return torch.addmm(result.flatten(0, -2), down.flatten(0, -2), transpose, alpha=scale).view_as(result)


def sum_in_one_pass(layer: LoraLayer, adapter: str) -> None:
    """Let a layer of plain weights compute so; peft's layers of quantised weights have their own ways."""
    if type(layer) in (Linear, Conv2d):
        layer.lora_variant[adapter] = SumInOnePass()
