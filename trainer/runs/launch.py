"""Puts a run together: model, rewards, folder and loop; what `train`, `resume` and the nodes call."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.lora.formats import parse_state
from comfyui_pcpo.reward import Reward, RewardError, RewardSettings, import_reward, load_reward

from ..config.schema import Config, ConfigError
from ..evaluation.sampling import padded
from ..loop.align import Job, RunError, Update, align
from ..loop.distributed import Processes, join
from ..loop.state import TrainingState, make_training_state
from ..policy.base import LoraPairs
from ..policy.diffusers_policy import DTYPES, DiffusersPolicy, denoiser_of, module_names, pick_device
from ..policy.loading import load_pipeline
from .folder import NotSaved, RunFolder, read_lora

WEIGHTS = Path("models/rewards")
"""Where reward weights lie unless a configuration or an option says otherwise."""


def reward_settings(config: Config) -> RewardSettings:
    """Where the rewards of a configuration find their weights, and how their networks run."""
    r = config.reward
    device = pick_device(config.model.device) if r.device == "auto" else pick_device(r.device, "reward.device")
    precision = {"float32": torch.float32, "float16": torch.float16}[r.precision]
    return RewardSettings(r.folder or WEIGHTS, str(device), precision, r.images_at_once)


def make_reward(name: str, settings: RewardSettings) -> Reward:
    """A reward by its name, or the user's own by module:Class. Raises ConfigError for a name that is none."""
    try:
        return import_reward(name)(settings) if ":" in name else load_reward(name, settings)
    except RewardError as error:
        raise ConfigError(f"reward: {error}") from None


def load_rewards(config: Config) -> dict[str, Reward]:
    """The trained and the held-out rewards, by name, their weights not read yet."""
    settings = reward_settings(config)
    return {name: make_reward(name, settings) for name in (*config.reward.weights, *config.reward.held_out)}


def read_rewards(config: Config) -> dict[str, Reward]:
    """As `load_rewards`, with their weights in the computer's memory: a missing file is named before a rollout."""
    rewards = load_rewards(config)
    for reward in rewards.values():
        reward.to("cpu").load()
    return rewards


def make_policy(config: Config) -> DiffusersPolicy:
    """The configured model with a fresh LoRA, or with that of `lora.start`."""
    m, start = config.model, config.lora.start
    pipeline = load_pipeline(m.name, m.config, DTYPES[m.precision])
    if start is None:
        return DiffusersPolicy(pipeline, config)
    try:
        pairs = parse_state(read_lora(start)[0], module_names(denoiser_of(pipeline)))
    except ValueError as error:
        raise ConfigError(f"lora.start {start}: {error}") from None
    policy = DiffusersPolicy(pipeline, config, pairs)
    start_from(policy, config, pairs)
    return policy


def start_from(policy: DiffusersPolicy, config: Config, pairs: LoraPairs) -> None:
    """Load a LoRA; modules and ranks that it lacks keep their fresh values, which add nothing yet."""
    fresh, scale = policy.lora(), config.lora.scale
    start = {}
    for name, (down, up) in padded(pairs, fresh).items():
        rank = len(pairs[name][0]) if name in pairs else 0
        start[name] = (torch.cat([down[:rank], fresh[name][0][rank:]]), up / scale)
    policy.load_lora(start)


def run_updates(folder: RunFolder, learner: TrainingState, job: Job) -> Iterator[Update]:
    """`align` with the folder kept: records, pictures, checkpoints; whatever ends it, finished updates are saved."""
    config, processes = job.config, job.processes
    board = _tensorboard(folder) if config.run.tensorboard and processes.main else None
    saved = learner.done
    try:
        for update in align(learner, job):
            if processes.main:
                folder.record(update)
                every = config.run.preview_every
                if every and (update.number % every == 0 or update.number == 1):
                    folder.draw(update, config.rollout.group_size)
                    folder.draw_curves()
                if board is not None:
                    _write_board(board, update)
                if update.number % config.run.save_every == 0 or update.number == config.run.updates:
                    folder.save(learner, config)
                    saved = learner.done
            yield update
    finally:
        if processes.main:
            if learner.done > saved and not isinstance(sys.exc_info()[1], NotSaved):
                folder.save(learner, config)
            folder.draw_curves()
            if board is not None:
                board.close()


def start_run(config: Config, tick: Callable[[], None] = lambda: None) -> tuple[RunFolder, Iterator[Update]]:
    """A new run: everything is loaded and checked before the folder is made, -> (folder, updates)."""
    prompts, rewards = config.prompts.read(), read_rewards(config)
    join()
    processes = Processes()
    job = Job(config, prompts, rewards, processes, tick)
    learner = make_training_state(make_policy(config), config)
    folder = RunFolder(config.run.folder / config.run.name)

    def updates() -> Iterator[Update]:
        with folder.locked() if processes.main else nullcontext():
            if processes.main:
                folder.start(config)
            yield from run_updates(folder, learner, job)

    return folder, updates()


def resume_run(
    path: Path, which: str = "latest", updates: int | None = None, tick: Callable[[], None] = lambda: None
) -> tuple[RunFolder, Config, Iterator[Update]]:
    """Continue a run from a checkpoint, -> (folder, config, updates). Raises ConfigError when it is finished."""
    folder = RunFolder(path)
    config = folder.config()
    if updates is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"updates": updates})})
    done = int(folder.checkpoint(which).name) if folder.numbers() else 0
    if done >= config.run.updates:
        raise ConfigError(
            f"{path} is finished: {done} of {config.run.updates} updates are done. Give --updates with a larger number."
        )
    prompts, rewards = config.prompts.read(), read_rewards(config)
    join()
    processes = Processes()
    job = Job(config, prompts, rewards, processes, tick)
    learner = make_training_state(make_policy(config), config)

    def go() -> Iterator[Update]:
        with folder.locked() if processes.main else nullcontext():
            if done:
                folder.load(learner, str(done))
            if processes.main:
                folder.rewrite_config(config)
                folder.keep_records(done)
                folder.keep_checkpoints(done)
            yield from run_updates(folder, learner, job)

    return folder, config, go()


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "run.tensorboard is true, but TensorBoard is not installed. `pip install tensorboard`, or set it to false."
        ) from None
    return SummaryWriter(str(folder.path / "tensorboard"))


def _write_board(board: Any, update: Update) -> None:
    for key, value in update.metrics.items():
        if isinstance(value, int | float):
            board.add_scalar(key, value, update.number)
        elif key in ("rewards", "held_out"):
            for name, mean in value.items():
                board.add_scalar(f"{key}/{name}", mean, update.number)


__all__ = [
    "ConfigError",
    "RunError",
    "load_rewards",
    "make_policy",
    "make_reward",
    "read_rewards",
    "resume_run",
    "reward_settings",
    "run_updates",
    "start_run",
]
