"""The preset of a model by its name: an embedded model, a folder, a checkpoint, or a name on the hub; no weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..config.errors import ConfigError
from ..config.presets import UNLIMITED, Room, preset_name
from ..config.text_files import read_object
from ..loop.distributed import launched
from ..program import program_name
from .device import pick_device
from .single_file import SD2, checkpoint_kind, is_hub_name, read_keys

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
SD2_TEXT_WIDTH = 1024  # of SD1: 768, of SDXL: 2048
HUB_SECONDS = 5.0
HUB_WORDS = {  # words of hub names whose index cannot be read, in the order in which they are tried
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
        kind = checkpoint_kind(keys, path)
        family = "sd2" if kind is SD2 else PIPELINE_FAMILIES[kind.pipeline]
        no_guidance = family == "flux" and not any("guidance_in." in key for key in keys)
        return "flux-distilled" if no_guidance else preset_name(family, path.name)
    index = pipeline_file(name, "model_index.json")
    if index is None:
        return preset_name(family_by_words(name), name)
    kind = read_object(index)
    if kind.get("_class_name") == "StableDiffusionPipeline" and is_sd2(name):
        return "sd2"
    return index_preset(kind, path.name)


def is_sd2(name: str) -> bool:
    """Whether a StableDiffusionPipeline has SD2's text encoder."""
    unet = pipeline_file(name, "unet/config.json")
    if unet is None:
        return family_by_words(name) == "sd2"
    return read_object(unet).get("cross_attention_dim") == SD2_TEXT_WIDTH


def family_by_words(name: str) -> str:
    """The family that a hub name looks like."""
    lower = name.lower()
    return next((family for word, family in HUB_WORDS.items() if word in lower), "flow")


def pipeline_file(name: str, file: str) -> Path | None:
    """A file of a pipeline's folder or hub name; None where it has none or the hub cannot be asked."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    return cached_file(name, file) or (hub_file(name, file) if is_hub_name(name) else None)


def index_preset(index: Mapping[str, Any], name: str) -> str:
    """The preset of a pipeline by its model_index.json, which of some families says whether it is distilled."""
    kind, distilled = index.get("_class_name", ""), index.get("is_distilled")
    if kind == "Flux2KleinPipeline":
        name = "klein" if distilled or (distilled is None and "base" not in name.lower()) else "klein-base"
    elif distilled:
        name += "-distilled"
    return preset_name(PIPELINE_FAMILIES.get(kind, "flow"), name)


def cached_file(name: str, file: str) -> Path | None:
    """A file of a hub name, if this computer has it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # a folder that does not exist; loading it will say so
        return None
    return Path(found) if isinstance(found, str) else None


def hub_file(name: str, file: str) -> Path | None:
    """A small file of a hub name, downloaded; None where the hub lacks it or cannot be reached.

    Raises ConfigError where one of several processes cannot tell which: each would choose by itself.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        # without a network this fails at once, where a download tries again for half a minute
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_SECONDS)
        return Path(hf_hub_download(name, file, etag_timeout=HUB_SECONDS))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except Exception as error:  # of many types; where this goes on, loading the model names the cause
        if launched() > 1:
            raise ConfigError(
                f"{file} of {name} cannot be read from the hub, by which several processes choose the same settings. "
                f"Run `{program_name()} check` once where the hub can be reached, or give the folder of a copy."
            ) from error
        return None


def device_room(model: Mapping[str, Any]) -> Room:
    """What the weights of the configuration's `model` section leave of its device's free memory, at least a quarter.

    Of several processes, each takes the smallest GPU's whole memory instead, so that all of them choose the same. For a
    GPU that this computer lacks there is no room, so that an estimate for it is the smallest.
    """
    import torch

    if not torch.cuda.is_available():
        return Room(0.0, gpu=True) if str(model["device"]).startswith("cuda") else UNLIMITED
    if str(model["device"]) == "cpu":
        return UNLIMITED
    processes = launched()
    if processes > 1:
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        free = 0.9 * min(device.total_memory for device in devices)
    else:
        free = float(torch.cuda.mem_get_info(pick_device(str(model["device"])))[0])
    weights = weight_bytes(model) / (processes if model["shard"] else 1)
    return Room(max(free / 4, free - weights), gpu=True)


WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
QUANTIZED_BYTES = {"fp8": 1.0, "int8": 1.0, "4bit": 0.5}


def weight_bytes(model: Mapping[str, Any]) -> float:
    """About what a model's weights take on its device; 0 for a hub name that is not on this computer.

    With `offload` only the denoiser counts, whose linear layers `quantize` shrinks.
    """
    path = Path(str(model["name"]))
    if path.suffix == ".safetensors":
        denoiser, others = [path], []
    else:
        index = path / "model_index.json" if path.is_dir() else cached_file(str(path), "model_index.json")
        files = [] if index is None else [f for f in index.parent.glob("*/*") if WEIGHT_FILE.fullmatch(f.name)]
        denoiser = [file for file in files if file.parent.name in ("unet", "transformer")]
        others = [file for file in files if file not in denoiser]
    plain = 4.0 if model["precision"] == "float32" else 2.0
    size = sum(map(weight_count, denoiser)) * QUANTIZED_BYTES.get(str(model["quantize"]), plain)
    return size if model["offload"] else size + sum(map(weight_count, others)) * plain


def weight_count(file: Path) -> int:
    """Number of weights in a .safetensors file, by its header; 0 for a damaged one, which loading will name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError):
        return 0
