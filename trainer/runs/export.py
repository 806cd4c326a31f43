"""Export a checkpoint's LoRA in the file format of another program."""

from dataclasses import dataclass
from pathlib import Path

from comfyui_pcpo.durable import safetensors_parts, write_durably
from comfyui_pcpo.lora.formats import export_state

from ..config.loading import dump, dump_shareable
from ..config.schema import ConfigError
from ..files import require_writable
from .folder import RunFolder

FORMATS = ("comfyui", "diffusers", "kohya")


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and where to."""

    layout: str = "comfyui"  # one of FORMATS
    checkpoint: str = "final"
    out: Path | None = None
    everything: bool = False  # also prompts and paths in the metadata
    overwrite: bool = False


def export_lora(run: Path, options: ExportOptions) -> Path:
    """Write a checkpoint's LoRA, -> its file."""
    layout = options.layout
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout} is not one of {', '.join(FORMATS)}.")
    folder = RunFolder(run)
    config = folder.config()
    if options.out is None:
        path = require_writable(run / f"lora-{layout}.safetensors", "The run's folder:")
    else:
        path = check_export_path(options.out, folder, options.overwrite)
    pairs = folder.lora(options.checkpoint)
    try:
        state = export_state(pairs, config.lora.rank, config.lora.rank, layout, folder.family())
    except ValueError as error:  # a layout that the model's family does not have
        raise ConfigError(f"--format {layout}: {error}") from None
    settings = dump(config) if options.everything else dump_shareable(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, *safetensors_parts(state, {"pcpo.config": settings, "format": "pt"}))
    return path


def check_export_path(path: Path, folder: RunFolder, overwrite: bool) -> Path:
    """`path`, if it is a .safetensors file and none of the run's own. Raises ConfigError otherwise."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise ConfigError(f"--out {path} is not a .safetensors file. Give a file name such as lora.safetensors.")
    target, own = path.resolve(), (folder.lora_file.resolve(), folder.guard_file.resolve())
    if target in own or folder.checkpoints.path.resolve() in target.parents:
        raise ConfigError(f"--out {path} belongs to the run itself and would be overwritten. Give another file name.")
    return require_writable(path, "--out", overwrite)
