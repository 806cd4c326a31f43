"""How the frozen weights are stored: in the precision of the forward passes, or in 8 or 4 bits."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bitsandbytes import bitsandbytes_for

Quantize = Literal["none", "fp8", "int8", "4bit"]
EIGHT = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
"""Storage type and its largest value."""
BLOCK = re.compile(r"\.\d+\.")  # layers of a list of blocks; those around the blocks are few and sensitive


class Frozen(torch.autograd.Function):
    """y = (x q^T) s + b with q in 8 bits. Only q and s are kept for the backward pass, no wide copy of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, s)
        ctx.given = x.dtype
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = F.linear(x.to(ctx.dtype), q.to(ctx.dtype)) * s.to(ctx.dtype)
        return y if bias is None else y + bias.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, s = ctx.saved_tensors
        grad = (grads[0] * s.to(ctx.dtype)) @ q.to(ctx.dtype)
        return grad.to(ctx.given), None, None, None


class EightBitLinear(nn.Linear):
    """A frozen layer whose rows are 8-bit numbers, each row with its own scale: w = s q, s ~ max|w| / max q."""

    def __init__(self, wide: nn.Linear, kind: str):
        nn.Module.__init__(self)
        dtype, largest = EIGHT[kind]
        self.in_features, self.out_features = wide.in_features, wide.out_features
        weight = wide.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / largest
        scale = (scale * (1 + 2**-8)).bfloat16().float()  # exact in every precision, and no row outgrows q's range
        q = weight / scale[:, None]
        q = q.round() if kind == "int8" else q
        self.weight = nn.Parameter(q.to(dtype), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = wide.bias

    def forward(self, input: Tensor) -> Tensor:
        return Frozen.apply(input, self.weight, self.scale, self.bias)  # pyright: ignore[reportReturnType]

    def wide(self) -> Tensor:
        """The weights that the layer computes with, (out, in)."""
        return self.weight.float() * self.get_buffer("scale")[:, None]


def frozen_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Name and layer of all that multiplies with frozen weights; a LoRA's own factors are left out."""
    for name, module in denoiser.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d) and ".lora_" not in name:
            yield name, module  # pyright: ignore[reportReturnType]


def store(denoiser: nn.Module, dtype: torch.dtype, quantize: Quantize = "none") -> None:
    """Convert the frozen weights in place.

    Autocast would round the weights of these layers to `dtype` at every call, so outputs stay the same to the bit.
    Other weights, such as those of norms, are few and become float32.
    """
    layers = dict(frozen_layers(denoiser))
    kept = {id(p) for layer in layers.values() for p in layer.parameters()}
    for p in denoiser.parameters():
        if id(p) not in kept and p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.float()
    for name, layer in layers.items():
        if layer.weight.dtype != dtype:
            layer.to(dtype)
        if quantize != "none" and isinstance(layer, nn.Linear) and BLOCK.search(name):
            parent, _, last = name.rpartition(".")
            narrow = four_bit(layer, dtype) if quantize == "4bit" else EightBitLinear(layer, quantize)
            setattr(denoiser.get_submodule(parent), last, narrow)


def four_bit(wide: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """QLoRA's normal-float layer (arXiv 2305.14314). Raises ConfigError where bitsandbytes is not installed."""
    package = bitsandbytes_for("model.quantize = 4bit").nn
    narrow = package.Linear4bit(
        wide.in_features, wide.out_features, wide.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    narrow.weight = package.Params4bit(wide.weight.detach(), requires_grad=False, quant_type="nf4")
    narrow.bias = wide.bias
    return narrow.to(wide.weight.device)  # this is what converts them
