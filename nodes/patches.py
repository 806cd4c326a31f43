"""The LoRAs that a loader put on a MODEL, read back as factors."""

from typing import Any

from comfy.weight_adapter.lora import LoRAAdapter

from ..trainer.config import ConfigError
from .lowrank import LowRank


def extra_layers(base: Any, aligned: Any, place: int) -> list[LowRank]:
    """What `aligned`, a clone of `base`, has beyond it. Raises ConfigError for anything that is not a plain LoRA."""
    if aligned.injections.keys() - base.injections.keys():
        raise ConfigError(
            f"aligned model {place} carries a bypass LoRA, but its effect cannot be told apart from the base's. "
            "Turn bypass off in the node that loads the LoRA."
        )
    layers = []
    for key, patches in aligned.patches.items():
        own = base.patches.get(key, [])
        if len(patches) < len(own) or any(a is not b for a, b in zip(patches, own, strict=False)):
            raise _not_an_extension(place, key)
        layers += [_layer(base, key, patch, place) for patch in patches[len(own) :]]
    if base.patches.keys() - aligned.patches.keys():
        raise _not_an_extension(place, sorted(base.patches.keys() - aligned.patches.keys())[0])
    if not layers:
        raise ConfigError(
            f"aligned model {place} has 0 patches beyond the base model, so they are the same and guidance would do "
            "nothing. Connect a model that has gone through Load LoRA (with a strength other than 0)."
        )
    return layers


def _not_an_extension(place: int, key: str) -> ConfigError:
    return ConfigError(
        f"aligned model {place} does not start from the base model: they differ at {key}. "
        "Branch off to the aligned models behind everything that changes the base."
    )


def _layer(base: Any, key: str, patch: tuple[Any, ...], place: int) -> LowRank:
    strength, adapter, strength_model, offset, function = patch
    plain = isinstance(adapter, LoRAAdapter) and strength_model == 1 and function is None and key.endswith(".weight")
    if not plain or any(part is not None for part in adapter.weights[3:]):
        raise ConfigError(
            f"aligned model {place} has a {type(adapter).__name__} patch at {key}, but only plain LoRAs are read. "
            "Save the merged model and load it as a checkpoint of its own."
        )
    up, down, alpha = adapter.weights[:3]
    scale = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
    part = None if offset is None else (offset[1], offset[2])
    return LowRank(base.model.get_submodule(key.removesuffix(".weight")), down, up * scale, part)
