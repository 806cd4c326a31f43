"""Loads a diffusers pipeline: the embedded models, a local folder, or a hub name."""

import json
from pathlib import Path
from typing import Any

from comfyui_pcpo.tiny import pipelines

from .config import ConfigError


def load_pipeline(name: str) -> Any:
    """A diffusers pipeline in float32 on the CPU. Raises ConfigError with the missing or broken file's name."""
    if name in pipelines.EMBEDDED:
        try:
            return pipelines.load_tiny(name, pipelines.MODELS)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the embedded model {name} under {pipelines.MODELS} is damaged: {error}. Install the package again."
            ) from error
    import diffusers

    try:
        return diffusers.DiffusionPipeline.from_pretrained(name, **_left_out(Path(name)))
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.name {name} could not be loaded: {error}. Use {', '.join(pipelines.EMBEDDED)}, a folder that "
            "save_pretrained wrote, or the name of a model that this computer has or can download."
        ) from error


def _left_out(folder: Path) -> dict[str, None]:
    """The parts that a folder was saved without, such as T5; diffusers wants to be told of them."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text(encoding="utf-8"))
    return {name: None for name, kind in parts.items() if kind == [None, None]}
