"""Commands that make files from runs: sample, plot, export."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..config.errors import ConfigError
from ..evaluation.options import SamplingOptions
from .files import free_name
from .libraries import quiet_libraries


def sample_command(
    run: str,
    /,
    *,
    options: Annotated[SamplingOptions, Parameter(name="*")],
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Sample images with a run's LoRA, optionally beside the base model, or with several LoRAs composed.

    Parameters
    ----------
    run
        Folder of a run, a LoRA file of this trainer, or the name of an embedded model.
    out
        Image file to write; default: samples.png, samples-2.png, ...
    overwrite
        Replace the file if it exists.
    """
    from ..evaluation.image_files import check_image_path

    path = check_image_path(out or Path(free_name(Path(), "samples", ".png")), overwrite)
    quiet_libraries()
    from ..evaluation.images import sample_images

    grid = sample_images(run, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    print(path.resolve())


def plot_command(*runs: Path, out: Path | None = None, overwrite: bool = False) -> None:
    """Plot the curves of one run, or compare several runs in one figure.

    Parameters
    ----------
    runs
        Folders of runs.
    out
        Image file to write; default: the run's curves.png, or compare.png, compare-2.png, ... for several runs.
    overwrite
        Replace the file if it exists; a run's own curves.png always is.
    """
    if not runs:
        raise ConfigError("No run folders given. Give one or more.")
    from comfyui_pcpo.plotting.run_curves import compare_runs, curves

    from ..evaluation.image_files import check_image_path
    from ..runs.folder import RunFolder

    records = {}
    for run in runs:
        RunFolder(run).config()
        rows = RunFolder(run).records()
        if not rows:
            raise ConfigError(f"{run} has no finished updates, so there is nothing to plot. Train it first.")
        name = run.resolve().name
        records[name if name not in records else str(run)] = rows
    own = RunFolder(runs[0]).curves_file if len(runs) == 1 else None
    path = out or own or Path(free_name(Path(), "compare", ".png"))
    check_image_path(path, overwrite or path == own)
    figure = curves(next(iter(records.values()))) if len(runs) == 1 else compare_runs(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.save(path)
    print(path.resolve())


def export_command(
    run: Path,
    /,
    *,
    format: str = "comfyui",
    checkpoint: str = "final",
    out: Path | None = None,
    metadata: Literal["settings", "full"] = "settings",
    overwrite: bool = False,
) -> None:
    """Export a run's LoRA with the key names of ComfyUI, diffusers or kohya.

    Parameters
    ----------
    run
        Folder of the run.
    format
        comfyui, diffusers or kohya.
    checkpoint
        final (kept by the guard, or the latest), latest, best, kept, or the number of an update.
    out
        .safetensors file to write; default: RUN/lora-FORMAT.safetensors, which is replaced.
    metadata
        What the file records: the settings of the run without prompts, paths and names, or all of them (full).
    overwrite
        Replace the file given by --out if it exists.
    """
    from ..runs.export import ExportOptions, export_lora

    options = ExportOptions(format, checkpoint, out, metadata == "full", overwrite)
    print(export_lora(run, options).resolve())
