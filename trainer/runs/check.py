"""Check a configuration before training: prompts, rewards, device, model, and the memory it needs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from comfyui_pcpo.reward import Reward, RewardError, RewardSettings

from ..config.schema import Config, ConfigError
from ..files import require_writable
from ..memory.bitsandbytes import bitsandbytes_for
from ..memory.estimate import Budget, budget
from ..policy.device import NoGpuError, pick_device
from ..policy.loading import make_shapes
from .folder import RunFolder
from .rewards import WEIGHTS, make_reward, require_prompts, reward_settings
from .tensorboard import require_tensorboard


@dataclass(frozen=True)
class RunCheck:
    """Prompts and budget of a run as far as they could be determined, every problem, and notes on what is none."""

    prompts: list[str]
    budget: Budget | None
    problems: list[str]
    notes: list[str]


def check_run(config: Config) -> RunCheck:
    """Try all that training loads, of the model only shapes; what is missing is a problem instead of an exception."""
    rewards, problems, notes = check_rewards(config)
    problems += missing_packages(config)
    notes += check_folder(config)
    prompts, costs = [], None
    try:
        prompts = config.prompts.read()
        require_prompts(rewards, prompts)
    except ConfigError as error:
        problems.append(str(error))
    try:
        # sizes are the same on every device, and on the CPU the check cannot run out of GPU memory
        on_cpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        costs = budget(make_shapes(on_cpu), config)
    except ConfigError as error:
        problems.append(str(error))
    return RunCheck(prompts, costs, list(dict.fromkeys(problems)), notes)


def missing_packages(config: Config) -> list[str]:
    """A sentence for each optional package that the settings need and that is not installed."""
    needed: list[Callable[[], object]] = [require_tensorboard] if config.run.tensorboard else []
    if config.optimizer.name == "adamw8bit":
        needed.append(lambda: bitsandbytes_for("optimizer.name = adamw8bit"))
    if config.model.quantize == "4bit":
        needed.append(lambda: bitsandbytes_for("model.quantize = 4bit"))
    return errors(needed)


def check_folder(config: Config) -> list[str]:
    """Notes on why a run could not begin in its folder here: this may be another computer, or the run may be done."""
    folder = RunFolder(config.run.folder / config.run.name)
    tries = (folder.require_new, lambda: require_writable(folder.config_file, "run.folder:"))
    return [message.rstrip(".") for message in errors(tries)]


def errors(tries: Iterable[Callable[[], object]]) -> list[str]:
    """The messages of those that fail."""
    messages = []
    for attempt in tries:
        try:
            attempt()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def check_rewards(config: Config) -> tuple[dict[str, Reward], list[str], list[str]]:
    """The rewards that load, problems with the device and with the files of the others, and notes.

    That the GPU is in another computer is a note.
    """
    rewards, problems, notes = {}, [], []
    try:
        pick_device(config.model.device)
        settings = reward_settings(config)
    except ConfigError as error:
        if isinstance(error, NoGpuError):
            notes.append(f"{str(error).split('. ')[0]}; training needs one")
        else:
            problems.append(str(error))
        settings = RewardSettings(config.reward.folder or WEIGHTS)
    for name in config.reward.names:
        try:
            rewards[name] = make_reward(name, settings).to("cpu").load()
        except (ConfigError, RewardError) as error:
            problems.append(str(error))
    return rewards, problems, notes
