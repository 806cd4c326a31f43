"""Errors of PyTorch during a run, in a sentence that names the fix."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from comfyui_pcpo.metrics.errors import MetricError
from comfyui_pcpo.reward.base import RewardError

from ..config.schema import Config, ConfigError
from ..loop.scoring import RunError
from ..program import program_name
from .folder import RunFolder

UNDERSTOOD = RunError, RewardError, MetricError
"""RuntimeErrors whose message is meant for the user."""


@contextmanager
def explained(config: Config, folder: RunFolder) -> Iterator[None]:
    """Around a run: turn errors of PyTorch into ConfigErrors. Finished updates are saved before."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{memory_advice(config, error)} Change it in {folder.config_file}, then `{program_name()} resume "
            f"{folder.path}`; finished updates are saved."
        ) from error
    except UNDERSTOOD:
        raise
    except RuntimeError as error:
        folder.log(traceback.format_exc())
        raise ConfigError(
            f"{error} (a {type(error).__name__} of PyTorch or of a model; its traceback is in {folder.log_file}). "
            f"Finished updates are saved; continue with `{program_name()} resume {folder.path}`."
        ) from error


def memory_advice(config: Config, error: Exception) -> str:
    """Out of memory: the settings that need less, as far as they are not in use."""
    m, r = config.model, config.rollout
    ways = {
        f"rollout.images_at_once = {r.images_at_once // 2}": r.images_at_once > 1,
        "rollout.batch_cfg = false": r.cfg != 1 and r.batch_cfg,
        "model.gradient_checkpointing = true": not m.gradient_checkpointing,
        "model.offload = true": not m.offload,
        'model.precision = "bfloat16"': m.precision == "float32",
        'model.quantize = "fp8"': m.quantize == "none",
        "a smaller rollout.height and rollout.width": True,
        "a lower lora.rank": config.lora.rank > 1,
    }
    size = f"{r.width} x {r.height} pixels" if r.width and r.height else "the model's own size"
    return (
        f"out of memory with rollout.images_at_once = {r.images_at_once} at {size}: {error}. "
        f"These need less: {', '.join(way for way, unused in ways.items() if unused)}."
    )
