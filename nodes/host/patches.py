"""The patches of an aligned MODEL beyond its base, computed by ComfyUI and switched on and off while sampling."""

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


def extra_patches(base: Any, aligned: Any, number: int) -> Patches:
    """Patches, by weight, that `aligned`, a clone of `base`, has beyond it. Raises ConfigError if there are none."""
    if aligned.injections.keys() - base.injections.keys():
        raise ConfigError(
            f"aligned model {number} has a LoRA in bypass mode, which cannot be separated from the base model. "
            "Turn bypass off in the node that loads the LoRA."
        )
    for key, own in base.patches.items():
        patches = aligned.patches.get(key, [])
        if len(patches) < len(own) or any(a is not b for a, b in zip(patches, own, strict=False)):
            raise ConfigError(
                f"aligned model {number} is not based on the base model: their patches of {key} differ. "
                "Apply every change of the base before the LoRAs of the aligned models."
            )
    extra = {key: patches[len(base.patches.get(key, [])) :] for key, patches in aligned.patches.items()}
    extra = {key: patches for key, patches in extra.items() if patches}
    if not extra:
        raise ConfigError(
            f"aligned model {number} equals the base model, so guidance would have no effect. "
            "Connect the output of a LoRA loader (with a strength other than 0)."
        )
    return extra


@dataclass
class PatchedWeight:
    """A weight function: takes the base's weight, returns the aligned model's, as ComfyUI's loader computes it.

    The result is cached while memory allows; otherwise each call computes it again, as ComfyUI does for a layer that
    does not fit on the device. Hooks of a conditioning change the base's weight between calls: nothing is cached then.
    """

    model: Any
    key: str
    module: nn.Module
    patches: list[Any]
    room: MemoryCounter
    cached: Tensor | None = None

    @property
    def attribute(self) -> str:
        """Name of the module's list of functions for its weight or its bias."""
        return self.key.rsplit(".", 1)[1] + "_function"

    def __call__(self, own: Tensor) -> Tensor:
        hooked = self.model.current_patcher.current_hooks is not None
        kept = None if hooked else self.cached
        if kept is not None and (kept.dtype, kept.device) == (own.dtype, own.device):
            return kept
        wide = own.to(mm.lora_compute_dtype(own.device), copy=True)
        patched = comfy.lora.calculate_weight(self.patches, wide, self.key)
        patched = comfy.float.stochastic_rounding(patched, own.dtype, comfy.utils.string_to_seed(self.key))
        if not hooked and self.room.use(patched):
            self.cached = patched
        return patched


def patched_weights(model: Any, patches: Patches, number: int, room: MemoryCounter) -> list[PatchedWeight]:
    """One PatchedWeight per patched weight. Raises ConfigError for weights that ComfyUI cannot switch."""
    weights = []
    for key, some in patches.items():
        name, _, kind = key.rpartition(".")
        module = model.get_submodule(name)
        if not hasattr(module, f"{kind}_function"):
            raise ConfigError(
                f"aligned model {number} patches {key}, but only weights and biases of layers can be switched while "
                "sampling. Save the merged model and load it as a separate checkpoint."
            )
        weights.append(PatchedWeight(model, key, module, some, room))
    return weights


@contextmanager
def switched_on(weights: Sequence[PatchedWeight]) -> Iterator[None]:
    """Inside, these weights are the aligned model's."""
    before = [getattr(weight.module, weight.attribute) for weight in weights]
    for weight, own in zip(weights, before, strict=True):
        setattr(weight.module, weight.attribute, [*own, weight])
    try:
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            setattr(weight.module, weight.attribute, own)
