"""What PyTorch is told while a GPU is pretended; all of it is undone afterwards."""

import copyreg
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine import without_driver
from .gpu import PretendGpu, aten

COMPUTE_CAPABILITY = (8, 9)
ON_CPU = F.scaled_dot_product_attention


@contextmanager
def pretending(gpu: PretendGpu) -> Iterator[PretendGpu]:
    """Inside, torch finds one GPU, `gpu`."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: COMPUTE_CAPABILITY,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
    }
    before = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.amp.autocast_mode, "is_autocast_available", lambda *_: True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", gpu_attention))
        stack.enter_context(patch.object(nn.Module, "_apply", moved_with(gpu)))
        stack.enter_context(patch.object(Tensor, "is_pinned", lambda t, *_: is_pinned(gpu, t)))
        stack.enter_context(without_driver())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(gpu)
        yield gpu


def is_pinned(gpu: PretendGpu, t: Tensor) -> bool:
    return t.untyped_storage()._cdata in gpu.pinned


def moved_with(gpu: PretendGpu) -> Callable[..., nn.Module]:
    """nn.Module._apply that keeps each parameter the same object, whichever kind of tensor it becomes."""

    def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            _apply(child, convert)
        outer, gpu.moving = gpu.moving, True
        try:
            with torch.no_grad():
                for p in module._parameters.values():
                    if p is not None:
                        swap_contents(p, nn.Parameter(convert(p.detach()), p.requires_grad))
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else convert(buffer)
        finally:
            gpu.moving = outer
        return module

    return _apply


def swap_contents(a: Any, b: Any) -> None:
    """Exchange the contents of two tensors, whose classes may differ, as `a.data = b` does where they are equal."""
    slots = {*copyreg._slotnames(type(a)), *copyreg._slotnames(type(b))}  # pyright: ignore[reportAttributeAccessIssue]
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    for slot in slots:
        if hasattr(a, slot) and hasattr(b, slot):
            ours, theirs = getattr(a, slot), getattr(b, slot)
            setattr(a, slot, theirs)
            setattr(b, slot, ours)
    torch._C._swap_tensor_impl(a, b)


def gpu_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Attention on the GPU by the kernel that CUDA takes: flash attention, or the memory-efficient one with a mask."""
    if query.device.type != "cuda":
        return ON_CPU(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    if attn_mask is None and half and width % 8 == 0 and width <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]
