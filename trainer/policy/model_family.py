"""The preset of a model by its name: an embedded model, a folder, a checkpoint, or a name on the hub; no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..config.presets import Room, preset_name
from ..config.text_files import read_object
from .single_file import checkpoint_kind, read_keys

PIPELINE_FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "ChromaPipeline": "chroma",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "QwenImagePipeline": "qwen-image",
    "QwenImage21Pipeline": "qwen-image-2.1",
    "ZImagePipeline": "z-image",
    "HiDreamImagePipeline": "hidream",
    "Krea2Pipeline": "krea2",
}
HUB_WORDS = {  # words of hub names whose index is not on this computer, in the order in which they are tried
    "xl": "sdxl", "stable-diffusion-3": "sd3", "sd3": "sd3", "flux.2": "flux2", "flux": "flux", "chroma": "chroma",
    "qwen-image-2.1": "qwen-image-2.1", "qwen": "qwen-image", "z-image": "z-image", "hidream": "hidream",
    "krea-2": "krea2", "stable-diffusion-2": "sd2", "stable-diffusion": "sd15",
}  # fmt: skip


def model_preset(name: str) -> str:
    """The name of the preset of `model.name`."""
    if name in EMBEDDED:
        return "embedded"
    path = Path(name)
    if path.suffix == ".safetensors":
        keys = read_keys(path)
        family = PIPELINE_FAMILIES[checkpoint_kind(keys, path).pipeline]
        no_guidance = family == "flux" and not any("guidance_in." in key for key in keys)
        return "flux-distilled" if no_guidance else preset_name(family, path.name)
    index = path / "model_index.json" if path.is_dir() else cached_index(name)
    if index is not None and index.is_file():
        return index_preset(read_object(index), path.name)
    lower = name.lower()
    return preset_name(next((family for word, family in HUB_WORDS.items() if word in lower), "flow"), name)


def index_preset(index: Mapping[str, Any], name: str) -> str:
    """The preset of a pipeline by its model_index.json, which of some families says whether it is distilled."""
    kind, distilled = index.get("_class_name", ""), index.get("is_distilled")
    if kind == "Flux2KleinPipeline":
        name = "klein" if distilled or (distilled is None and "base" not in name.lower()) else "klein-base"
    elif distilled:
        name += "-distilled"
    return preset_name(PIPELINE_FAMILIES.get(kind, "flow"), name)


def cached_index(name: str) -> Path | None:
    """model_index.json of a hub name, if this computer has it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:  # a folder that does not exist; loading it will say so
        return None
    return Path(found) if isinstance(found, str) else None


def device_room(device: str) -> Room:
    """Free memory of the model's device, before anything is loaded."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return Room(float(torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0]), gpu=True)
    return Room(float("inf"), gpu=False)
