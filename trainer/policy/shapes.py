"""A pipeline whose weights are shapes only, for `check`: nothing is read but configurations and the files' headers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config.schema import ConfigError
from .single_file import checkpoint_plan, checkpoint_skeleton, left_out

WEIGHT_SUFFIXES = (".safetensors", ".bin")


def load_shapes(name: str, base: str | None, dtype: torch.dtype) -> Any:
    """As `load_pipeline` for anything but an embedded model, without weights. Raises ConfigError for missing files."""
    if Path(name).suffix != ".safetensors":
        return pipeline_of_shapes(name, dtype)
    kind, source = checkpoint_plan(Path(name), base)
    if source is not None:
        return pipeline_of_shapes(source, dtype, checked=kind.denoiser == "unet")
    with TemporaryDirectory() as folder:  # SD and SDXL are read in float32
        skeleton = checkpoint_skeleton(Path(name), kind, Path(folder))
        return pipeline_of_shapes(str(skeleton), torch.float32, checked=True)


def pipeline_of_shapes(name: str, dtype: torch.dtype, checked: bool = False) -> Any:
    """The pipeline of a folder or a hub name; `checked`: its weights are in another file."""
    import diffusers

    index: Any = diffusers.DiffusionPipeline.load_config(name)
    parts = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part, entry in index.items():
            kind = class_of(entry)
            if kind is not None:
                with default_dtype(torch.float32 if part == "vae" else dtype) as precision:
                    parts[part] = made(kind, name, part, precision).eval()
    if Path(name).is_dir() and not checked:
        for part, module in parts.items():
            check_files(Path(name) / part, module)
    return diffusers.DiffusionPipeline.from_pretrained(name, **left_out(Path(name)), **parts)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield dtype
    finally:
        torch.set_default_dtype(before)


def class_of(entry: Any) -> type[nn.Module] | None:
    """The class of an index's entry; None for a tokenizer, a scheduler, and an option of the pipeline."""
    import diffusers
    import transformers

    if not isinstance(entry, list | tuple) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        return None
    library, name = entry
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(home, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def made(kind: Any, name: str, part: str, dtype: torch.dtype) -> Any:
    """A part from its configuration file."""
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(name, subfolder=part))
    config = kind.config_class.from_pretrained(name, subfolder=part)
    config.torch_dtype = dtype  # some classes make their parts in it, whatever the default
    return kind(config)


def check_files(folder: Path, module: nn.Module) -> None:
    """Raise ConfigError unless the folder's weight files are whole and, for a diffusers part, have its weights."""
    files = sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(f"{folder} has no weights ({', '.join(WEIGHT_SUFFIXES)}). Copy or download the model again.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            shapes |= header_shapes(file)
    expected = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    wrong = [key for key, shape in expected.items() if shapes.get(key) != shape]
    indexed = any((folder / file.name).suffix == ".bin" for file in files)
    if hasattr(module, "load_config") and wrong and not indexed:
        raise ConfigError(
            f"{folder} lacks {len(wrong)} of {len(expected)} weights, or has them in another shape, first {wrong[0]}. "
            "Copy or download the model again."
        )


def header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, from its header; the library compares the header with the file's size."""
    try:
        with safe_open(file, "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not an intact safetensors file ({error}). Copy or download it again.") from None
