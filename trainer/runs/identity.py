"""What a run was made with (run.json), and what a resume would change: refused by name, or accepted and recorded."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from comfyui_pcpo.durable import write_durably
from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.prompt import prompt_line
from comfyui_pcpo.reward.base import Reward

from ..config.schema import Config, ConfigError
from ..fingerprints import fingerprint, reward_fingerprints
from ..program import program_name

FREE = {
    "model": {"device", "offload", "gradient_checkpointing", "compile", "shard"},
    "prompts": {"lines", "file"},  # the prompts themselves are compared
    "rollout": {"images_at_once", "batch_cfg"},
    "objective": {"kl_images", "kl_every"},  # of monitoring
    "reward": {"folder", "device", "images_at_once", "offload", "overlap", "max_failed", "patience"},
    "lora": {"start"},  # read once, when the run began
    "guard": {"every", "prompts", "images", "tolerance", "diversity_tolerance", "patience", "action"},
    "run": {"name", "folder", "updates", "preview_every", "save_every", "keep", "tensorboard"},
}
"""Settings that may change on resume: they decide where and how something is computed, or when to stop, not what."""
MODEL_CONTENT = "content of model.name"
HOST_MODEL = "content of the host's model"  # by a name of its own: runs from before it was recorded still resume
REWARD_CONTENT = "content of "  # and the name of a reward that is a file
LEVELS = "noise levels of the model's schedule"
SAME_LEVEL = 1e-4  # two libraries compute the levels of one schedule
SAME_WEIGHTS = 0.01  # of what was learned, as a share of its length


def identity_of(
    config: Config,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward] = MappingProxyType({}),
    content: str | None = None,
    levels: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Everything that makes this run what it is, by name.

    `content` is that of a model that a host has loaded, `levels` are the noise levels of a rollout; they are left out
    before the model is loaded, and so are the rewards, of which only those that are files are compared then.
    """
    tree = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
        if key not in FREE.get(section, ())
    }
    learned = {name: reward.learned for name, reward in rewards.items() if reward.learned is not None}
    contents = learned | reward_fingerprints(config.reward.names)
    return {
        **settings,
        "prompts": [prompt_line(p) for p in prompts],
        MODEL_CONTENT: fingerprint(Path(config.model.name)),
        HOST_MODEL: content,
        **{REWARD_CONTENT + name: found for name, found in contents.items()},
        **({} if levels is None else {LEVELS: list(levels)}),
    }


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A phrase for everything that is not as it was; settings that the record does not know are new, and left out."""
    changed = [key for key, value in now.items() if key in recorded and not unchanged(key, recorded[key], value)]
    before, after = recorded.get(MODEL_CONTENT), now.get(MODEL_CONTENT)
    if before is not None and after == before:  # moved
        changed = [key for key in changed if key != "model.name"]
    elif after is None and "model.name" not in changed:  # missing, which loading tells
        changed = [key for key in changed if key != MODEL_CONTENT]
    return [describe(key, recorded[key], now[key]) for key in changed]


def unchanged(key: str, before: Any, after: Any) -> bool:
    """Whether a value is as it was; of the noise levels, their number is a setting of its own.

    What was learned may differ by the rounding of another device or number of threads.
    """
    if key.startswith(REWARD_CONTENT) and isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and math.dist(before, after) <= SAME_WEIGHTS * math.hypot(*before)
    if key == LEVELS and len(before) == len(after):
        return all(math.isclose(a, b, abs_tol=SAME_LEVEL) for a, b in zip(before, after, strict=True))
    return key == LEVELS or before == after


def describe(key: str, before: Any, after: Any) -> str:
    """One difference in words."""
    if key == "prompts":
        changed = set(before) ^ set(after)
        odd = [line for line in dict.fromkeys([*before, *after]) if line in changed]
        if not odd:
            return "the prompts are in another order, or repeated"
        return f"{len(odd)} prompts were added, removed or edited, such as {odd[0]!r}"
    if key == MODEL_CONTENT:
        return "the model has other weights"
    if key == HOST_MODEL:
        return "the model has other weights (another file, or other LoRAs applied to it)"
    if key == LEVELS:
        return "the model has another noise schedule (such as another shift)"
    if key.startswith(REWARD_CONTENT):
        learned = isinstance(before, list) or key.endswith(".safetensors")
        return f"the reward {key.removeprefix(REWARD_CONTENT)} has other {'weights' if learned else 'code'}"
    return f"{key} was {before!r} and is {after!r}"


class NotResumed(ConfigError):
    """A run that cannot go on as it is. `what` is wrong; the fix is the command line's, and the node words its own."""

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what} {fix}")
        self.what = what


class Changed(NotResumed):
    """A run that is not as it was made."""


class RunRecord:
    """run.json of one run."""

    def __init__(self, file: Path):
        self.file = file

    def read(self) -> dict[str, Any] | None:
        """The record; None where there is none, as in runs of version 0.1. Raises ConfigError for a damaged one."""
        try:
            tree = parse_json(self.file.read_text(encoding="utf-8"))
            return {"identity": dict(tree["identity"]), "changes": list(tree["changes"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.file} is damaged ({error})") from None

    def write(self, identity: dict[str, Any], changes: Sequence[dict[str, Any]] = ()) -> None:
        write_durably(self.file, json.dumps({"identity": identity, "changes": list(changes)}, indent=1).encode())

    def changes(self, identity: dict[str, Any], required: bool = False) -> list[str]:
        """What is not as this run was made; with `required`, a missing record too."""
        try:
            recorded = self.read()
        except ConfigError as error:
            return [str(error)]
        if recorded is None:
            return [f"{self.file.name}, which records how it was made, is missing"] if required else []
        return differences(recorded["identity"], identity)

    def accept(self, identity: dict[str, Any], done: int, changes: Sequence[str]) -> None:
        """Make `identity` the run's from update `done` on, and keep what changed."""
        try:
            history = (self.read() or {"changes": []})["changes"]
        except ConfigError:
            history = []
        entry = [{"after_update": done, "changed": list(changes)}] if changes else []
        self.write(identity, [*history, *entry])


def require_accepted(run: Path, changes: Sequence[str], accepted: bool) -> None:
    """Raise Changed, which names every change, unless they are accepted."""
    if changes and not accepted:
        raise Changed(
            f"{run} is no longer as it was when it started: {'; '.join(changes)}.",
            f"Undo that, or continue with `{program_name()} resume {run} --accept-changes`, which records it.",
        )
