"""What nodes have set on a MODEL besides its weights: options, replaced objects and wrappers."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...trainer.config.schema import ConfigError

DEPTH = 6  # of nested parts that are compared; deeper ones count as different
NAMED = 3  # parts of a name that an error shows, and names that it lists


def require_same_settings(base: Any, aligned: Any, number: int) -> None:
    """Raise ConfigError if guidance would drop a setting of an aligned model: it evaluates all as the base is set."""
    parts = [
        ("", aligned.model_options, base.model_options),
        ("wrappers.", aligned.wrappers, base.wrappers),
        ("callbacks.", aligned.callbacks, base.callbacks),
    ]
    if aligned.is_clone(base):  # a model with weights of its own is loaded with its own of these
        parts += [
            ("", aligned.object_patches, base.object_patches),
            ("", aligned.weight_wrapper_patches, base.weight_wrapper_patches),
            ("", aligned.hook_patches, base.hook_patches),
        ]
    names = list(dict.fromkeys(name for start, theirs, own in parts for name in lacking(theirs, own, start)))
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ConfigError(
            f"aligned model {number} has settings that the base model lacks ({', '.join(names[:NAMED])}{more}), but "
            "guidance takes only the weights of an aligned model. Apply the nodes that made them (such as FreeU, "
            "Perturbed-Attention Guidance or Model Sampling) to the base model: what is set there acts on all models."
        )


def lacking(theirs: dict[Any, Any], own: dict[Any, Any], start: str = "") -> list[str]:
    """Names of the settings in `theirs` that `own` does not have, or has otherwise."""
    names = []
    for key, value in theirs.items():
        name, mine = ".".join(f"{start}{key}".split(".")[:NAMED]), own.get(key)
        if isinstance(value, dict):
            names += lacking(value, mine if isinstance(mine, dict) else {}, name + ".")
        elif isinstance(value, list):
            found = mine if isinstance(mine, list) else []
            names += [] if all(any(alike(a, b) for b in found) for a in value) else [name]
        elif not alike(value, mine):
            names.append(name)
    return names


def alike(a: Any, b: Any, depth: int = DEPTH) -> bool:
    """Whether two settings act the same: they are one object, or equal, as those of two nodes with equal widgets."""
    if a is b:
        return True
    if depth == 0 or _kind(a) != _kind(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(value, b[key], depth - 1) for key, value in a.items())
    if isinstance(a, FunctionType):
        return a.__code__ == b.__code__ and alike(_captured(a), _captured(b), depth - 1)
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and alike(a.__self__, b.__self__, depth - 1)
    if isinstance(a, nn.Module):
        return alike(vars(a), vars(b), depth - 1)
    return isinstance(a, bool | int | float | str | set | torch.device) and a == b


def _kind(value: Any) -> tuple[Any, ...]:
    """The class of a value; nodes that replace model_sampling define one anew at each call."""
    kind = type(value)
    return kind.__module__, kind.__qualname__, kind.__bases__


def _captured(function: Callable[..., Any]) -> list[Any]:
    """What a function has from the call that made it."""
    assert isinstance(function, FunctionType)
    return [function.__defaults__, *(cell.cell_contents for cell in function.__closure__ or ())]
