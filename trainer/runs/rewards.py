"""The rewards that a configuration names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from comfyui_pcpo.reward import Reward, RewardError, RewardSettings, construct, import_reward, load_reward
from comfyui_pcpo.reward.base import blamed
from comfyui_pcpo.taste.learned import taste_reward

from ..config.schema import Config, ConfigError
from ..policy.device import pick_device

WEIGHTS = Path("models/rewards")
"""Folder of the rewards' weight files unless a configuration or an option names another."""


def reward_settings(config: Config) -> RewardSettings:
    """Where the rewards of a configuration find their weights, and how their networks run."""
    r = config.reward
    device = pick_device(config.model.device) if r.device == "auto" else pick_device(r.device, "reward.device")
    precision = {"float32": torch.float32, "float16": torch.float16}[r.precision]
    return RewardSettings(r.folder or WEIGHTS, str(device), precision, r.images_at_once, r.patience)


def make_reward(name: str, settings: RewardSettings) -> Reward:
    """A reward by its name, a taste by its file, or the user's own by module:Class. Raises ConfigError for others."""
    try:
        if name.endswith(".safetensors"):
            return taste_reward(Path(name), settings)
        return construct(import_reward(name), settings) if ":" in name else load_reward(name, settings)
    except RewardError as error:
        raise ConfigError(f"reward: {error}") from None


def make_rewards(config: Config) -> dict[str, Reward]:
    """The trained and the held-out rewards, by name, their weights not read yet."""
    settings = reward_settings(config)
    return {name: make_reward(name, settings) for name in config.reward.names}


def require_prompts(rewards: Mapping[str, Reward], prompts: Sequence[str]) -> None:
    """Raise ConfigError for a prompt that one of the rewards cannot score."""
    for reward in rewards.values():
        try:
            with blamed(reward):
                reward.require_prompts(list(prompts))
        except RewardError as error:
            raise ConfigError(str(error)) from None


def load_rewards(config: Config) -> dict[str, Reward]:
    """As `make_rewards`, with their weights read into CPU memory, so that a missing file is reported at once."""
    rewards = make_rewards(config)
    for reward in rewards.values():
        reward.to("cpu").load()
    return rewards
