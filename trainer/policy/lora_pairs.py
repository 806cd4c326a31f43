"""A LoRA as pairs of factors by module: read, written, and fitted to the modules and the rank that a model trains."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from ..config.schema import ConfigError
from .base import LoraPairs


def folded(pairs: LoraPairs, scale: float) -> LoraPairs:
    """Factors whose product is the whole change: `scale`, alpha / rank, goes into the second."""
    return {name: (down, up * scale) for name, (down, up) in pairs.items()}


def started(pairs: LoraPairs, fresh: LoraPairs, scale: float) -> LoraPairs:
    """What a training from a LoRA begins with, in factors that the layers multiply by `scale`.

    Modules and ranks that the LoRA lacks keep their fresh first factor, which adds nothing yet but has a gradient.
    Raises ConfigError as `padded`.
    """
    start = {}
    for name, (down, up) in padded(pairs, fresh).items():
        rank = len(pairs[name][0]) if name in pairs else 0
        start[name] = (torch.cat([down[:rank], fresh[name][0][rank:]]), up / scale)
    return start


def padded(pairs: LoraPairs, like: LoraPairs) -> LoraPairs:
    """`pairs` as factors of the modules and the rank of `like`, with zeros where they have nothing.

    Raises ConfigError for modules or shapes that `like` has no room for, and for NaN and infinity.
    """
    broken = [name for name, pair in pairs.items() if not all(t.isfinite().all() for t in pair)]
    if broken:
        raise ConfigError(
            f"the LoRA holds NaN or infinity in {len(broken)} of its {len(pairs)} modules, first {broken[0]}. "
            "Use another LoRA, such as an earlier checkpoint of its run."
        )
    unknown = sorted(set(pairs) - set(like))
    if unknown:
        raise ConfigError(
            f"the LoRA has {len(unknown)} modules that this model does not train, first {unknown[0]}. "
            "Use a LoRA of the same model, with lora.targets at least as wide as the LoRA's."
        )
    full = {}
    for name, (down, up) in like.items():
        if name not in pairs:
            full[name] = (torch.zeros_like(down), torch.zeros_like(up))
            continue
        a, b = pairs[name]
        missing = len(down) - len(a)
        if missing < 0 or a.shape[1:] != down.shape[1:] or len(b) != len(up):
            raise ConfigError(
                f"{name} of the LoRA has shapes {tuple(a.shape)} and {tuple(b.shape)}; the model takes "
                f"{tuple(down.shape)} and {tuple(up.shape)}. Use a LoRA of this model, or lora.rank {len(a)} or more."
            )
        grown_b = F.pad(b.transpose(0, 1), (*[0] * (2 * (b.ndim - 1)), 0, missing)).transpose(0, 1)
        full[name] = (F.pad(a, (*[0] * (2 * (a.ndim - 1)), 0, missing)), grown_b)
    return full


def flat_pairs(pairs: LoraPairs) -> dict[str, torch.Tensor]:
    """Factors by MODULE.A and MODULE.B, as `load_pairs` reads them."""
    return {f"{module}.{part}": t for module, pair in pairs.items() for part, t in zip("AB", pair, strict=True)}


def load_pairs(path: Path) -> LoraPairs:
    """The factors of a checkpoint's LoRA. Raises ConfigError for a missing or damaged file."""
    flat, _ = read_lora(path)
    return {key[:-2]: (flat[key], flat[key[:-2] + ".B"]) for key in flat if key.endswith(".A")}


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Raises ConfigError for a missing or damaged file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}. Give a LoRA file, such as a run's lora.safetensors.")
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path} is not an intact safetensors file ({error}). Copy or export it again.") from None
    if not tensors:
        raise ConfigError(f"{path} holds no tensors, so it is no LoRA. Export or download it again.")
    return tensors, metadata or {}
