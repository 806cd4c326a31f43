"""Backpropagation through ComfyUI's base model without saving its weights, undone on exit.

ComfyUI's weights are inference tensors, may be fp8, and may stay on another device until they are needed, so autograd
cannot save them. Matrix products fetch their weight again in the backward pass; the small parameters of norms are
replaced by equal ones that autograd can save.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from ...trainer.config.schema import ConfigError

# block classes that gradient checkpointing recomputes
BLOCKS = ("ResBlock", "SpatialTransformer", "JointBlock", "DoubleStreamBlock", "SingleStreamBlock")
# block classes that write in place into tensors that autograd has saved
IN_PLACE = ("DoubleStreamBlock", "SingleStreamBlock")


class FrozenProduct(torch.autograd.Function):
    """A Linear or Conv2d whose weight gets no gradient and is not saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        module, (gradient,) = ctx.module, gradients
        weight, bias, stream = comfy.ops.cast_bias_weight(module, gradient, offloadable=True)
        if isinstance(weight, comfy.ops.QuantizedTensor):
            weight = weight.dequantize()
        if isinstance(module, nn.Conv2d):
            shape: Any = (module.stride, module.padding, module.dilation, module.groups)  # torch's types say int
            input_gradient = conv2d_input(ctx.shape, weight, gradient, *shape)
        else:
            input_gradient = gradient @ weight
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        return input_gradient.to(ctx.dtype), None, None


@contextmanager
def differentiable(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Inside, gradients flow through `model` to its inputs and to hooks on its modules."""
    check_forwards(model)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, comfy.ops.CastWeightBiasOp) and isinstance(module, nn.Linear | nn.Conv2d):
                stack.enter_context(_forward(module, _product(module)))
            elif not isinstance(module, nn.Embedding):
                _own_parameters(module)
            name = type(module).__name__
            if name in IN_PLACE:
                stack.enter_context(_forward(module, _on_copies(module.forward)))
                for part in module.modules():
                    if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                        stack.enter_context(_forward(part, _on_copies(part.forward)))
            if checkpointing and name in BLOCKS:
                stack.enter_context(_forward(module, _recomputed(module.forward)))
        yield


def check_forwards(model: nn.Module) -> None:
    """Refuse a model with replaced forward methods: gradients through them would be wrong."""
    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    if replaced:
        raise ConfigError(
            f"{len(replaced)} modules of the model have a replaced forward (first: {replaced[0]}), for example by a "
            "LoRA in bypass mode, so gradients would be wrong. Load that LoRA with bypass off."
        )


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", before)


def _product(module: nn.Module) -> Callable[..., Tensor]:
    forward = module.forward

    def product(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x, *args, **kwargs)
        return FrozenProduct.apply(x, module, forward)

    return product


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def _own_parameters(module: nn.Module) -> None:
    """Replace parameters that are inference tensors by equal ones that autograd can save."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_inference():
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _on_copies(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` on copies of its inputs; a checkpoint around it saves the unmodified inputs."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return forward(*map(copy, args), **{k: copy(v) for k, v in kwargs.items()})

    return on_copies
