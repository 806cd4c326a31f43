"""Open the argument of a command, a run's folder, a LoRA file or a model, -> configuration and LoRA."""

import math
from dataclasses import dataclass
from pathlib import Path

from comfyui_pcpo.lora.formats import parse_state
from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..config.loading import build, dump_shareable, tomllib, with_options
from ..config.schema import Config, ConfigError
from ..policy.base import LoraPairs
from ..policy.device import pick_device
from ..policy.lora_pairs import read_lora
from ..runs.folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A configuration and where its LoRA is stored."""

    config: Config
    path: Path | None  # a run's folder or a LoRA file; None for a model without LoRA


def open_source(source: str) -> Source:
    """A run's folder, a LoRA file of this trainer, an embedded model or a model's folder; ConfigError otherwise.

    A GPU that a run was trained on, and that this computer lacks, becomes `auto`.
    """
    path = Path(source)
    if (path / "model_index.json").is_file():
        return Source(build({"model": {"name": str(path.resolve())}}, source), None)
    if path.is_dir():
        return Source(on_this_computer(RunFolder(path).config()), path)
    if path.suffix == ".safetensors":
        _, metadata = read_lora(path)
        if "pcpo.config" not in metadata:
            raise ConfigError(
                f"{path} does not record its base model. Give a run's folder or a model; `sample` adds such a file to "
                "a model with --guide."
            )
        return Source(on_this_computer(config_of(path, metadata["pcpo.config"])), path)
    if source in EMBEDDED:
        return Source(build({"model": {"name": source}}, source), None)
    raise ConfigError(f"{source} is neither a run's folder, nor a .safetensors file, nor one of {', '.join(EMBEDDED)}.")


def on_this_computer(config: Config) -> Config:
    """The configuration with `auto` for each of its GPUs that PyTorch does not find here."""

    def known(device: str) -> str:
        try:
            pick_device(device)
        except ConfigError:
            return "auto"
        return device

    devices = {"model": {"device": known(config.model.device)}, "reward": {"device": known(config.reward.device)}}
    return with_options(config, devices)


def config_of(path: Path, recorded: str) -> Config:
    """The configuration of a LoRA file: that of its run where it is still in the run's folder, else what it records."""
    run = RunFolder(path.parent)
    if run.config_file.is_file() and dump_shareable(run.config()) == recorded:
        return run.config()
    return build(tomllib.loads(recorded), str(path))


def read_pairs(path: Path, module_names: list[str]) -> LoraPairs:
    """The LoRA that a run ended with, or of a LoRA file for a model with these modules."""
    if path.is_dir():
        return RunFolder(path).lora("final")
    try:
        return parse_state(read_lora(path)[0], module_names)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_guide(text: str) -> tuple[Path, float]:
    """`FILE=WEIGHT` or `RUN=WEIGHT` -> (path, weight)."""
    name, equals, weight = text.rpartition("=")
    try:
        value = float(weight) if equals else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--guide {text} is not LORA=WEIGHT. Write it like --guide cats.safetensors=1.2.")
    return Path(name), value
