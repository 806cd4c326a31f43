"""Backpropagation through ComfyUI's base model without saving its weights, undone on exit.

ComfyUI's weights are inference tensors, may be fp8, and may stay on another device until they are needed, so autograd
cannot save them. Matrix products fetch their weight again in the backward pass; the small parameters of norms are
replaced by equal ones that autograd can save.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy_kitchen.backends import eager
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from ...trainer.config.schema import ConfigError

# fused operations without a derivative; each has an equal function of differentiable ones
FUSED = (
    "adaln", "rms_adaln", "apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1", "rms_rope",
    "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1",
)  # fmt: skip


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
        for name in FUSED:
            stack.enter_context(_attribute(comfy.quant_ops.ck, name, getattr(eager, name)))
        for module in model.modules():
            if _is_product(module):
                stack.enter_context(_forward(module, _product(module)))
        own_parameters(model)
        for block in repeated_blocks(model):
            for part in block.modules():
                if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                    stack.enter_context(_forward(part, _on_copies(part.forward)))
            forward = _on_copies(block.forward)
            stack.enter_context(_forward(block, _on_copies(_recomputed(forward)) if checkpointing else forward))
        yield


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a model repeats: the outermost elements of its lists that have several matrices.

    A Sequential of a class of its own, as UNets have them, is called layer by layer, so its layers count as elements.
    """
    for child in module.children():
        if _is_list(child):
            for element in child.children():
                yield from repeated_blocks(nn.ModuleList([element])) if _is_list(element) else _if_composed(element)
        else:
            yield from repeated_blocks(child)


def _is_list(module: nn.Module) -> bool:
    own_sequential = isinstance(module, nn.Sequential) and type(module) is not nn.Sequential
    return own_sequential or isinstance(module, nn.ModuleList | nn.ModuleDict)


def _if_composed(module: nn.Module) -> list[nn.Module]:
    return [module] if sum(map(is_matrix, module.modules())) > 1 else []


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer, which of a quantized model has a class of its own, or a convolution."""
    quantized = isinstance(module, comfy.ops.CastWeightBiasOp) and type(module).__name__ == "Linear"
    return quantized or isinstance(module, nn.Linear | nn.Conv2d)


def check_forwards(model: nn.Module) -> None:
    """Refuse a model with replaced forward methods: gradients through them would be wrong."""
    replaced = [name for name, module in model.named_modules() if is_replaced(module)]
    if replaced:
        raise ConfigError(
            f"{len(replaced)} modules of the model have a replaced forward (first: {replaced[0]}), for example by a "
            "LoRA in bypass mode, so gradients would be wrong. Load that LoRA with bypass off."
        )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has a forward other than its class's; its own again, as a bypass LoRA leaves it, is not."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    return _attribute(module, "forward", forward)


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` itself has this attribute."""
    before = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


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


def own_parameters(model: nn.Module) -> None:
    """Replace small parameters that are inference tensors, as they are after a move, by equal ones to be saved."""
    for module in model.modules():
        if _is_product(module) or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference():
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _is_product(module: nn.Module) -> bool:
    """Whether `differentiable` replaces the forward of a module, so that its weight is not saved."""
    return isinstance(module, comfy.ops.CastWeightBiasOp) and isinstance(module, nn.Linear | nn.Conv2d)


def _on_copies(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` on copies of its inputs, so that what is written into them in place is saved nowhere else.

    Around a checkpoint the copies keep what is saved from the model's own in-place writes (ControlNet), inside it from
    the block's. A copied dict, such as the transformer options, keeps the values of this call for the recomputation.
    """

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if value.is_floating_point() else value
        if isinstance(value, dict):
            return dict(value)
        return type(value)(map(copy, value)) if type(value) in (list, tuple) else value

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return forward(*map(copy, args), **{k: copy(v) for k, v in kwargs.items()})

    return on_copies
