"""The LoRA under training: which modules carry it, and what diffusers calls them."""

import math
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from torch import nn

from comfyui_pcpo.lora.targets import is_target
from comfyui_pcpo.method.rollout import derive_seed

from ...trainer.config.schema import ConfigError, LoraConfig
from .lora_hooks import LowRank


@dataclass(frozen=True)
class Place:
    """A module of the host's model, or some output rows of one, by diffusers' name."""

    name: str
    module: nn.Module
    part: tuple[int, int] | None


def family_of(model: Any) -> str:
    """The layout of the exported LoRA: unet, flux, sd3, or plain for every other transformer."""
    if isinstance(model, comfy.model_base.Flux):
        return "flux"
    if comfy.utils.unet_to_diffusers(model.model_config.unet_config):
        return "unet"
    return "sd3" if isinstance(model, comfy.model_base.SD3) else "plain"


def places(model: Any, targets: str) -> list[Place]:
    """Where the LoRA goes, by name. Raises ConfigError for a model whose modules have no diffusers names."""
    names: dict[str, Any] = {
        name.removesuffix(".weight"): "diffusion_model." + key
        for name, key in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items()
        if name.endswith(".weight")
    }
    if not names:
        known = comfy.lora.model_lora_keys_unet(model, {})
        names = {k.removeprefix("transformer."): v for k, v in known.items() if k.startswith("transformer.")}
    state = model.state_dict().keys()
    found = []
    for name, key in sorted(names.items()):
        key, part = (key, None) if isinstance(key, str) else (key[0], key[1] and (key[1][1], key[1][2]))
        if is_target(name, targets) and key in state:
            found.append(Place(name, model.get_submodule(key.removesuffix(".weight")), part))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has 0 modules that this trainer can name, but a LoRA needs some. "
            "Use an SD1.5, SD2, SDXL, SD3.5 or FLUX type model."
        )
    return found


def fresh_layers(found: list[Place], config: LoraConfig, seed: int, device: torch.device) -> dict[str, LowRank]:
    """A LoRA that changes nothing yet: down as PEFT draws it, up zero, both float32 parameters."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    layers = {}
    for place in found:
        shape = tuple(place.module.weight.shape)
        rows = place.part[1] if place.part else shape[0]
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        down = (torch.rand(config.rank, *shape[1:], generator=generator) * 2 - 1) * bound
        up = torch.zeros(rows, config.rank, *[1] * (len(shape) - 2))
        factors = (nn.Parameter(t.to(device)) for t in (down, up))
        layers[place.name] = LowRank(place.module, *factors, place.part, config.scale)
    return layers
