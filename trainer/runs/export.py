"""Export a checkpoint's LoRA in the file format of another program."""

from pathlib import Path

from safetensors.torch import save_file

from comfyui_pcpo.lora.formats import export_state

from ..config.loading import dump
from ..config.schema import ConfigError
from .folder import RunFolder

FORMATS = ("comfyui", "diffusers", "kohya")


def export_lora(run: Path, layout: str, checkpoint: str = "latest", out: Path | None = None) -> Path:
    """Write a checkpoint's LoRA in one of FORMATS, -> its file."""
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout} is not one of {', '.join(FORMATS)}.")
    folder = RunFolder(run)
    path = run / f"lora-{layout}.safetensors" if out is None else check_export_path(out, folder)
    config, pairs = folder.config(), folder.lora(checkpoint)
    try:
        state = export_state(pairs, config.lora.rank, config.lora.rank, layout, folder.family())
    except ValueError as error:  # a layout that the model's family does not have
        raise ConfigError(f"--format {layout}: {error}") from None
    metadata = {"pcpo.config": dump(config), "format": "pt"}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path


def check_export_path(path: Path, folder: RunFolder) -> Path:
    """`path`, if it is a .safetensors file and none of the run's own. Raises ConfigError otherwise."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise ConfigError(f"--out {path} is not a .safetensors file. Give a file name such as lora.safetensors.")
    target = path.resolve()
    if target == folder.lora_file.resolve() or folder.checkpoints.resolve() in target.parents:
        raise ConfigError(f"--out {path} belongs to the run itself and would be overwritten. Give another file name.")
    return path
