"""The device that a configuration names."""

import torch

from ..config.schema import ConfigError
from ..loop.distributed import launched


class NoGpuError(ConfigError):
    """A GPU is named, and this computer has none."""


def pick_device(name: str, key: str = "model.device", gpus: int | None = None) -> torch.device:
    """`auto` is the first GPU, or the CPU without one. Raises ConfigError for a device that cannot be used.

    Of several processes each has a GPU of its own, which `cuda` stands for. `gpus` are those of this computer; None:
    as many as PyTorch finds.
    """
    if gpus is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name.startswith("cuda") and not gpus:
        raise NoGpuError(f"{key} is {name}, but PyTorch finds no GPU. Use cpu or auto.")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} {name} is not a device that is supported. Use auto, cpu or cuda.")
    if device.type == "cuda" and device.index is not None and launched() > 1:
        raise ConfigError(
            f"{key} is {name}, but {launched()} processes were started, each for a GPU of its own. Use cuda or auto, "
            "and name the GPUs in CUDA_VISIBLE_DEVICES."
        )
    if device.type == "cuda" and device.index is not None and device.index >= gpus:
        found = ", ".join(f"cuda:{n}" for n in range(gpus))
        raise ConfigError(f"{key} is {name}, but PyTorch finds only {found}. Use one of these.")
    return device
