"""The preset of a MODEL, and the memory that its training can use."""

import hashlib
from typing import Any

import comfy.model_management as mm
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...trainer.config.presets import PRESETS, Preset, Room, preset_name
from ...trainer.fingerprints import sampled_digest
from .origin import file_name, loaded_from
from .spaces import space_of

HOST_FAMILIES = {  # ComfyUI's configuration class -> the family in trainer/config/presets.py
    "SD15": "sd15", "SD20": "sd2", "SDXL": "sdxl", "SSD1B": "sdxl", "SD3": "sd3", "Flux": "flux",
    "FluxSchnell": "flux-distilled", "Chroma": "chroma", "Flux2": "flux2", "QwenImage": "qwen-image",
    "ZImage": "z-image", "Lumina2": "lumina2", "HiDream": "hidream", "Krea2": "krea2", "ErnieImage": "ernie-image",
    "Ideogram4": "ideogram4", "Anima": "anima", "CosmosT2IPredict2": "cosmos", "WAN21_T2V": "wan", "WAN22_T2V": "wan",
}  # fmt: skip
KLEIN_BELOW = 6144
"""FLUX.2 dev's hidden size; klein's is smaller."""


def host_preset(model: Any) -> str:
    """The name of the preset of a MODEL; whether it is distilled shows in the name of its file only."""
    if "pcpo_model" in model.attachments:
        return "embedded"
    config = model.model.model_config
    family = HOST_FAMILIES.get(type(config).__name__) or ("flow" if space_of(model).kind == "flow" else "epsilon")
    name = file_name(model)
    if family == "flux2" and config.unet_config.get("hidden_size", KLEIN_BELOW) < KLEIN_BELOW:
        name += " klein"
    return preset_name(family, name)


def recipe(model: Any) -> Preset:
    """The settings published for a kind of model, for what a node leaves at 0."""
    return PRESETS[host_preset(model)]


def model_content(model: Any) -> str | None:
    """What tells a MODEL from others of its kind: a sample of its file, and of the patches on it, such as LoRAs.

    None for one without patches whose loader kept no file, such as an embedded model.
    """
    file = next((sampled_digest(path)[:16] for path in loaded_from(model) if path.is_file()), "")
    patches = hashlib.sha256()
    for key in sorted(model.patches):
        patches.update(f"{key} {sampled(model.patches[key])}".encode())
    return f"{file} {patches.hexdigest()[:16] if model.patches else ''}".strip() or None


def sampled(value: Any) -> str:
    """The numbers in a patch; of a tensor its shape and 16 of them."""
    if isinstance(value, Tensor):
        flat = value.detach().flatten()
        return f"{tuple(value.shape)} {flat[:: max(1, len(flat) // 16)][:16].float().tolist()}"
    if isinstance(value, list | tuple):
        return " ".join(map(sampled, value))
    if isinstance(value, WeightAdapterBase):
        return sampled(value.weights)
    return repr(value) if isinstance(value, int | float | str) else ""


def training_room(model: Any) -> Room:
    """The device's memory without the model's weights, at least a quarter: weights that do not fit stay on the CPU."""
    device = model.load_device
    total = float(mm.get_total_memory(device))
    return Room(max(total / 4, 0.9 * total - model.model_size()), gpu=not mm.is_device_cpu(device))
