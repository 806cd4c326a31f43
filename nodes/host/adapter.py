"""The LoRA being trained: its modules, under the names that its file will have."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from torch import nn

from comfyui_pcpo.lora.families import Family, detect_family
from comfyui_pcpo.lora.targets import is_target
from comfyui_pcpo.method.rollout import derive_seed

from ...trainer.config.schema import ConfigError, LoraConfig
from .differentiable import is_matrix
from .lora_hooks import LowRank


@dataclass(frozen=True)
class TargetModule:
    """A module of ComfyUI's model, or a range of its output rows, under its name in the LoRA."""

    name: str
    module: nn.Module
    part: tuple[int, int] | None  # (first row, number of rows); None: all rows


def target_modules(model: Any, targets: str) -> tuple[Family, list[TargetModule]]:
    """Family and modules that get a LoRA, under diffusers' names where ComfyUI's LoRA loader knows them.

    Otherwise they have ComfyUI's own names, which its loader knows for every model. Raises ConfigError for a model
    without attention and feed-forward layers.
    """
    names, core = _unet_names(model) or _diffusers_names(model), _core_names(model)
    # names that leave out a layer, or only some of its rows, would train less than was asked for
    missing = {place.module for place in core if is_target(place.name, "linear")} - {place.module for place in names}
    family, places = ("core", core) if missing or not names else (detect_family(place.name for place in names), names)
    modules = sorted((place for place in places if is_target(place.name, targets)), key=lambda place: place.name)
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no attention or feed-forward layers that this node recognizes, so it cannot "
            "get a LoRA. docs/models.md lists the tested models."
        )
    return family, modules


def _core_names(model: Any) -> list[TargetModule]:
    """Every matrix of the model under ComfyUI's own name."""
    return [
        TargetModule(name, module, None) for name, module in model.diffusion_model.named_modules() if is_matrix(module)
    ]


def _unet_names(model: Any) -> list[TargetModule]:
    names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    modules = {id(place.module) for place in _core_names(model)}
    places = []
    for name, key in names.items():
        if name.endswith(".weight") and f"diffusion_model.{key}" in model.state_dict():
            module = model.diffusion_model.get_submodule(key.removesuffix(".weight"))
            if id(module) in modules:
                places.append(TargetModule(name.removesuffix(".weight"), module, None))
    return places


def _diffusers_names(model: Any) -> list[TargetModule]:
    """The modules that the LoRA loader knows by diffusers' names: as parts if these are all of its rows, else whole."""
    spellings: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        if name.startswith("transformer."):
            key, part = (target, None) if isinstance(target, str) else target[:2]
            spellings[key].append((name.removeprefix("transformer."), part))
    places = []
    for core in _core_names(model):
        names = spellings.get(f"diffusion_model.{core.name}.weight", [])
        parts = [TargetModule(name, core.module, part[1:]) for name, part in names if part is not None]
        whole = [TargetModule(name, core.module, None) for name, part in names if part is None]
        if parts and _rows(parts) == len(core.module.weight):  # type: ignore[arg-type]
            places += parts
        elif whole:
            places.append(_spelling(model, whole))
    return places


def _rows(parts: list[TargetModule]) -> int:
    """Rows that the parts cover from the first row on without a gap."""
    end = 0
    for first, count in sorted(part.part for part in parts if part.part is not None):
        end = end + count if first == end else -1
    return end


def _spelling(model: Any, names: list[TargetModule]) -> TargetModule:
    """One of several names of a module: FLUX.2's own for FLUX.2, which the loader lists after FLUX.1's."""
    return names[-1 if isinstance(model, comfy.model_base.Flux2) else 0]


def fresh_layers(
    targets: list[TargetModule], config: LoraConfig, seed: int, device: torch.device
) -> dict[str, LowRank]:
    """A new LoRA without effect: down initialized as in PEFT, up zero, both float32 parameters."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    layers = {}
    for target in targets:
        weight = target.module.weight
        assert isinstance(weight, torch.Tensor)
        shape = tuple(weight.shape)
        rows = target.part[1] if target.part else shape[0]
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        down = (torch.rand(config.rank, *shape[1:], generator=generator) * 2 - 1) * bound
        up = torch.zeros(rows, config.rank, *[1] * (len(shape) - 2))
        down, up = (nn.Parameter(t.to(device)) for t in (down, up))
        layers[target.name] = LowRank(target.module, down, up, target.part, config.scale)
    return layers
