"""The LoRA being trained: its modules, under the names that diffusers gives them."""

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
class TargetModule:
    """A module of ComfyUI's model, or a range of its output rows, under diffusers' name."""

    name: str
    module: nn.Module
    part: tuple[int, int] | None  # (first row, number of rows); None: all rows


def lora_family(model: Any) -> str:
    """The layout of the exported LoRA: unet, flux, sd3, or plain for any other transformer."""
    if isinstance(model, comfy.model_base.Flux):
        return "flux"
    if comfy.utils.unet_to_diffusers(model.model_config.unet_config):
        return "unet"
    return "sd3" if isinstance(model, comfy.model_base.SD3) else "plain"


def target_modules(model: Any, targets: str) -> list[TargetModule]:
    """Modules that get a LoRA. Raises ConfigError for a model whose modules have no diffusers names."""
    names: dict[str, Any] = {
        name.removesuffix(".weight"): "diffusion_model." + key
        for name, key in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items()
        if name.endswith(".weight")
    }
    if not names:
        known = comfy.lora.model_lora_keys_unet(model, {})
        names = {k.removeprefix("transformer."): v for k, v in known.items() if k.startswith("transformer.")}
    state = model.state_dict().keys()
    modules = []
    for name, key in sorted(names.items()):
        key, part = (key, None) if isinstance(key, str) else (key[0], key[1] and (key[1][1], key[1][2]))
        if is_target(name, targets) and key in state:
            modules.append(TargetModule(name, model.get_submodule(key.removesuffix(".weight")), part))
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no modules with known diffusers names, so its LoRA could not be exported. "
            "Use an SD1.5, SD2, SDXL, SD3.5 or FLUX model."
        )
    return modules


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
