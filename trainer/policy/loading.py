"""From a configuration to a policy: embedded model, checkpoint file, local folder or hub name, and the LoRA's start."""

import difflib
import re
import socket
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.lora.formats import parse_state
from comfyui_pcpo.tiny import pipelines

from ..config.schema import Config, ConfigError, ModelConfig
from .diffusers_policy import PRECISIONS, DiffusersPolicy, module_names
from .families import denoiser_of
from .lora_pairs import read_lora, started
from .shapes import load_shapes
from .single_file import is_hub_name, left_out, load_checkpoint, precisions

FAILURES = (OSError, ValueError, RuntimeError, AttributeError, ImportError)
"""What diffusers raises where a model cannot be loaded; the last two where a class or its library is missing."""
NO_CLASS = re.compile(r"^module \S+ has no attribute ")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def load_pipeline(name: str, base: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline on the CPU; `base` is model.config. Raises ConfigError for a missing file or model.

    `dtype` saves the computer's memory: denoiser and text encoders are read in it, the embedded models and the VAE in
    float32, SD and SDXL checkpoints too.
    """
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
    refuse_impossible_name(name)
    import diffusers

    try:
        if Path(name).suffix == ".safetensors":
            return load_checkpoint(Path(name), base, dtype)
        return diffusers.DiffusionPipeline.from_pretrained(name, **left_out(Path(name)), **precisions(dtype))
    except ConfigError:
        raise
    except FAILURES as error:
        raise ConfigError(_not_loaded(name, base, error)) from error


def refuse_impossible_name(name: str) -> None:
    """Raise ConfigError for what is neither a file or folder nor an owner's repository, without asking the hub."""
    if Path(name).suffix != ".safetensors" and not is_hub_name(name) and not Path(name).exists():
        raise ConfigError(_not_loaded(name, None, ValueError("there is no such folder, and hub names are owner/name")))


def _not_loaded(name: str, base: str | None, error: Exception) -> str:
    why = " ".join(str(error).split()).split(". ")[0].rstrip(".")  # what follows is advice for programmers
    if isinstance(error, ImportError) or NO_CLASS.search(str(error)):
        return f"model.name {name} could not be loaded: {why}. {_what_to_install(error)}"
    if Path(name).suffix == ".safetensors":
        return (
            f"model.name {name} could not be loaded: {error}. Where its kind needs more than the file (SD3, FLUX: text "
            "encoders, VAE and configuration), set model.config to a folder or hub name of such a pipeline."
            + (f" It is {base} now." if base else "")
        )
    no_folder = "" if Path(name).exists() else f"There is no folder {name} here, so it was taken for a hub name. "
    if unreachable(error):
        return (
            f"model.name {name} could not be loaded: this computer has no copy of it, or not a whole one, and the "
            f"Hugging Face hub cannot be reached. {no_folder}Check the connection, or give the folder of a copy."
        )
    near = difflib.get_close_matches(name, pipelines.EMBEDDED, 1)
    guess = f"Did you mean {near[0]}? " if near else ""
    return (
        f"model.name {name} could not be loaded: {why}. {no_folder if is_hub_name(name) else ''}{guess}Use "
        f"{', '.join(pipelines.EMBEDDED)}, a .safetensors checkpoint, a folder that save_pretrained wrote, or a name "
        "on the hub that this computer has or can download."
    )


def _what_to_install(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "Install what is missing with pip."
    return (
        f"Its files name a class that the installed diffusers {version('diffusers')} or transformers "
        f"{version('transformers')} lacks. Update them, or use another model."
    )


def unreachable(error: BaseException | None) -> bool:
    """Whether a failed connection is among the causes of an error."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_configured(model: ModelConfig) -> Any:
    """The configured pipeline on the CPU, in the configured precision."""
    return load_pipeline(model.name, model.config, PRECISIONS[model.precision])


def make_policy(config: Config, resumed: Collection[str] = ()) -> DiffusersPolicy:
    """The configured model with a fresh LoRA, or with that of `lora.start`.

    `resumed` are the modules of a checkpoint's LoRA, which is loaded next: the start is not read then, and may be gone.
    """
    pipeline = load_configured(config.model)
    return DiffusersPolicy(pipeline, config, resumed) if resumed else _with_lora(pipeline, config)


def make_shapes(config: Config) -> DiffusersPolicy:
    """As `make_policy`, but weights are shapes, of which nothing is read; raises the same errors.

    Embedded models, which are small, and those for bitsandbytes are read.
    """
    m = config.model
    if m.name in pipelines.EMBEDDED or Path(m.name).suffix in PICKLES or m.quantize == "4bit":
        return make_policy(config)
    refuse_impossible_name(m.name)
    try:
        pipeline = load_shapes(m.name, m.config, PRECISIONS[m.precision])
    except ConfigError:
        raise
    except FAILURES as error:
        raise ConfigError(_not_loaded(m.name, m.config, error)) from error
    return _with_lora(pipeline, config)


def _with_lora(pipeline: Any, config: Config) -> DiffusersPolicy:
    start = config.lora.start
    if start is None:
        return DiffusersPolicy(pipeline, config)
    try:
        pairs = parse_state(read_lora(start)[0], module_names(denoiser_of(pipeline)))
    except ValueError as error:
        raise ConfigError(f"lora.start {start}: {error}") from None
    policy = DiffusersPolicy(pipeline, config, pairs)
    policy.load_lora(started(pairs, policy.lora(), config.lora.scale))
    return policy
