"""What a loader put on a MODEL beyond its base, computed by the host itself and switched on and off while sampling."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management as mm
import comfy.utils
from comfy.model_patcher import MemoryCounter
from torch import Tensor, nn

from ...trainer.config.schema import ConfigError

Patches = dict[str, list[Any]]


def extra_patches(base: Any, aligned: Any, place: int) -> Patches:
    """The patches by weight that `aligned`, a clone of `base`, has beyond it. Raises ConfigError where it has none."""
    if aligned.injections.keys() - base.injections.keys():
        raise ConfigError(
            f"aligned model {place} carries a bypass LoRA, but its effect cannot be told apart from the base's. "
            "Turn bypass off in the node that loads the LoRA."
        )
    for key, own in base.patches.items():
        patches = aligned.patches.get(key, [])
        if len(patches) < len(own) or any(a is not b for a, b in zip(patches, own, strict=False)):
            raise ConfigError(
                f"aligned model {place} does not start from the base model: they differ at {key}. "
                "Branch off to the aligned models behind everything that changes the base."
            )
    found = {key: patches[len(base.patches.get(key, [])) :] for key, patches in aligned.patches.items()}
    found = {key: patches for key, patches in found.items() if patches}
    if not found:
        raise ConfigError(
            f"aligned model {place} has 0 patches beyond the base model, so they are the same and guidance would do "
            "nothing. Connect a model that has gone through Load LoRA (with a strength other than 0)."
        )
    return found


@dataclass
class PatchedWeight:
    """A weight function of the host: the base's weight in, the aligned model's out, as the host's loader computes it.

    The result is kept while there is room; without it, every call computes it again, as the host does for a layer that
    does not fit on the device.
    """

    key: str
    module: nn.Module
    patches: list[Any]
    room: MemoryCounter
    kept: Tensor | None = None

    @property
    def seam(self) -> str:
        """The module's list of functions that its weight, or its bias, goes through."""
        return self.key.rsplit(".", 1)[1] + "_function"

    def __call__(self, own: Tensor) -> Tensor:
        if self.kept is not None and (self.kept.dtype, self.kept.device) == (own.dtype, own.device):
            return self.kept
        wide = own.to(mm.lora_compute_dtype(own.device), copy=True)
        found = comfy.lora.calculate_weight(self.patches, wide, self.key)
        found = comfy.float.stochastic_rounding(found, own.dtype, comfy.utils.string_to_seed(self.key))
        if self.room.use(found):
            self.kept = found
        return found


def patched_weights(model: Any, patches: Patches, place: int, room: MemoryCounter) -> list[PatchedWeight]:
    """The patches at their modules. Raises ConfigError for a weight that the host gives no seam to change."""
    found = []
    for key, some in patches.items():
        name, _, kind = key.rpartition(".")
        module = model.get_submodule(name)
        if not hasattr(module, f"{kind}_function"):
            raise ConfigError(
                f"aligned model {place} changes {key}, but only weights and biases of layers can be switched while "
                "sampling. Save the merged model and load it as a checkpoint of its own."
            )
        found.append(PatchedWeight(key, module, some, room))
    return found


@contextmanager
def switched_on(weights: Sequence[PatchedWeight]) -> Iterator[None]:
    """While inside, these weights are the aligned model's."""
    before = [getattr(weight.module, weight.seam) for weight in weights]
    for weight, own in zip(weights, before, strict=True):
        setattr(weight.module, weight.seam, [*own, weight])
    try:
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            setattr(weight.module, weight.seam, own)
