"""Check a configuration before training: prompts, rewards, device, model, and the memory it needs."""

from dataclasses import dataclass

from comfyui_pcpo.reward import Reward, RewardError, RewardSettings

from ..config.schema import Config, ConfigError
from ..memory.estimate import Budget, budget
from ..policy.device import NoGpuError, pick_device
from ..policy.loading import make_shapes
from .rewards import WEIGHTS, make_reward, require_prompts, reward_settings


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
