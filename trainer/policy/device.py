"""The device that a configuration names."""

import torch

from ..config.schema import ConfigError


class NoGpuError(ConfigError):
    """A GPU is named, and this computer has none."""


def pick_device(name: str, key: str = "model.device") -> torch.device:
    """`auto` is the first GPU, or the CPU without one. Raises ConfigError for a device that does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise NoGpuError(f"{key} is {name}, but PyTorch finds no GPU. Use cpu or auto.")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} {name} is not a device. Use auto, cpu or cuda.") from None
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        found = ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
        raise ConfigError(f"{key} is {name}, but PyTorch finds only {found}. Use one of these.")
    return device
