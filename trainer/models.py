"""Loads a diffusers pipeline: the embedded models, a checkpoint file, a local folder, or a hub name."""

from pathlib import Path
from typing import Any

from comfyui_pcpo.tiny import pipelines

from .checkpoint import WIDE, left_out, load_checkpoint
from .config import ConfigError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def load_pipeline(name: str, base: str | None = None) -> Any:
    """A diffusers pipeline in float32 on the CPU; `base` is model.config. Raises ConfigError for what is not there."""
    if name in pipelines.EMBEDDED:
        try:
            return pipelines.load_tiny(name, pipelines.MODELS)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the embedded model {name} under {pipelines.MODELS} is damaged: {error}. Install the package again."
            ) from error
    if Path(name).suffix in PICKLES:
        raise ConfigError(
            f"model.name {name} may hold code, so it is not opened. Use a .safetensors file of the model."
        )
    import diffusers

    try:
        if Path(name).suffix == ".safetensors":
            return load_checkpoint(Path(name), base)
        return diffusers.DiffusionPipeline.from_pretrained(name, **left_out(Path(name)), **WIDE)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(_not_loaded(name, base, error)) from error


def _not_loaded(name: str, base: str | None, error: Exception) -> str:
    if Path(name).suffix == ".safetensors":
        return (
            f"model.name {name} could not be loaded: {error}. Where its kind needs more than the file (SD3, FLUX: text "
            "encoders, VAE and configuration), set model.config to a folder or hub name of such a pipeline."
            + (f" It is {base} now." if base else "")
        )
    return (
        f"model.name {name} could not be loaded: {error}. Use {', '.join(pipelines.EMBEDDED)}, a .safetensors "
        "checkpoint, a folder that save_pretrained wrote, or a name on the hub that this computer has or can download."
    )
