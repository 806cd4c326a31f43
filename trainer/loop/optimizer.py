"""AdamW on the LoRA's factors, with its moments in float32 or in 8 bits."""

from typing import Any

import torch
from torch import nn

from ..config.schema import OptimizerConfig
from ..memory.bitsandbytes import bitsandbytes_for


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer. Raises ConfigError where adamw8bit lacks its package."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        return bitsandbytes_for("optimizer.name = adamw8bit").optim.AdamW8bit(parameters, **settings)
    # one kernel for all factors instead of a dozen for each
    return torch.optim.AdamW(parameters, **settings, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))
