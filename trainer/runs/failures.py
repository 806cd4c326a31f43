"""Errors during a run: those of PyTorch in a sentence that names the fix, and after all of them how to go on."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from comfyui_pcpo.metrics.errors import MetricError
from comfyui_pcpo.reward.base import RewardError

from ..config.schema import Config, ConfigError
from ..loop.distributed import ProcessLost
from ..loop.scoring import RunError
from ..program import program_name
from .folder import RunFolder

UNDERSTOOD = RunError, RewardError, MetricError, FloatingPointError, ProcessLost
"""Errors whose message is meant for the user; PyTorch's RuntimeErrors are not."""


@contextmanager
def explained(config: Config, folder: RunFolder) -> Iterator[None]:
    """Around a run: turn its errors into ConfigErrors that say how to go on. Finished updates are saved before."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(memory_advice(config, folder, error)) from error
    except UNDERSTOOD as error:
        raise ConfigError(f"{error} {going_on(folder)}") from error
    except RuntimeError as error:
        with suppress(ConfigError, OSError):  # the disk is full: the error itself matters more
            folder.path.mkdir(parents=True, exist_ok=True)  # without a finished update, it is gone by now
            folder.log(traceback.format_exc())
        raise ConfigError(
            f"{error} (a {type(error).__name__} of PyTorch or of a model; its traceback is in {folder.log_file}). "
            f"{going_on(folder)}"
        ) from error


def going_on(folder: RunFolder) -> str:
    """What is left of a run that failed, and how to go on."""
    if folder.checkpoints.numbers():
        return f"Finished updates are saved; continue with `{program_name()} resume {folder.path}`."
    return "No update was finished, so the same command starts anew."


def memory_advice(config: Config, folder: RunFolder, error: Exception) -> str:
    """Out of memory: the settings that need less, as far as they are not in use, and how to go on."""
    ways = reward_ways if str(error).startswith("reward ") else model_ways
    where, *kinds = ways(config)
    first, later = ([way for way, unused in kind.items() if unused] for kind in kinds)
    said = f"out of memory with {where}: {error}."
    if not folder.checkpoints.numbers():
        return f"{said} These need less: {', '.join([*first, *later])}. No update was finished: start again with them."
    resume = f"in {folder.config_file}, then `{program_name()} resume {folder.path}`; finished updates are saved"
    return " ".join(
        [
            said,
            *([f"These need less: {', '.join(first)}. Change them {resume}."] if first else []),
            f"{'Only a' if not first else 'A'} new run can also use {', '.join(later)}.",
        ]
    )


Ways = dict[str, bool]
"""What needs less memory, and whether it is not in use yet."""


def model_ways(config: Config) -> tuple[str, Ways, Ways]:
    """What the model's memory depends on, what may change at any time, and what in a new run."""
    m, r = config.model, config.rollout
    size = f"{r.width} x {r.height} pixels" if r.width and r.height else "the model's own size"
    any_time = {
        f"rollout.images_at_once = {r.images_at_once // 2}": r.images_at_once > 1,
        "rollout.batch_cfg = false": r.cfg != 1 and r.batch_cfg,
        "model.gradient_checkpointing = true": not m.gradient_checkpointing,
        "model.offload = true": not m.offload,
    }
    in_a_new_run = {
        'model.precision = "bfloat16"': m.precision == "float32",
        'model.quantize = "fp8"': m.quantize == "none" and not m.shard,
        "a smaller rollout.height and rollout.width": True,
        "a lower lora.rank": config.lora.rank > 1,
    }
    return f"rollout.images_at_once = {r.images_at_once} at {size}", any_time, in_a_new_run


def reward_ways(config: Config) -> tuple[str, Ways, Ways]:
    """The same of a reward's memory; the model stays on its device while rewards score."""
    r = config.reward
    any_time = {
        f"reward.images_at_once = {r.images_at_once // 2}": r.images_at_once > 1,
        "reward.offload = true": not r.offload,
        'reward.device = "cpu"': r.device != "cpu",
    }
    in_a_new_run = {'reward.precision = "float16"': r.precision == "float32", "a smaller reward": True}
    return f"reward.images_at_once = {r.images_at_once}", any_time, in_a_new_run
