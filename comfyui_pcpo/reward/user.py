"""Rewards that users write: installed packages (entry points), .py files in one folder, or module:Class.

The folder is the installer's choice and headless configurations may name module:Class; a workflow offers names only.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from comfyui_pcpo.reward.base import Reward, RewardError

GROUP = "pcpo.rewards"


def check_class(found: object, source: str) -> type[Reward]:
    """Refuse what is not a named Reward that scores."""
    if not (inspect.isclass(found) and issubclass(found, Reward)):
        raise RewardError(f"{source} is a {type(found).__name__}, not a class made from comfyui_pcpo.reward.Reward.")
    if not found.name or found.score_batch is Reward.score_batch:
        raise RewardError(f"{source} has 0 of what a reward needs, a name and score_batch, or 1 of 2. Write both.")
    return found


def load_file(path: Path) -> ModuleType:
    """The module in a file, under a name of its own that no import finds."""
    name = f"pcpo_user_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is not a Python file. Give it a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(
            f"{path} failed with {type(error).__name__}: {error}. Mend the file or move it away."
        ) from error
    return module


def rewards_in_file(path: Path) -> list[type[Reward]]:
    """The reward classes that a file itself defines."""
    module = load_file(path)
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    found = [check_class(cls, f"{path}: {cls.__name__}") for cls in own if issubclass(cls, Reward)]
    if not found:
        raise RewardError(
            f"{path} defines 0 rewards. Write a class made from comfyui_pcpo.reward.Reward, or move it away."
        )
    return found


def installed_rewards() -> list[type[Reward]]:
    """The classes that installed packages offer under the entry-point group `pcpo.rewards`."""
    from importlib.metadata import entry_points

    return [check_class(point.load(), f"entry point {point.name}") for point in entry_points(group=GROUP)]


def rewards_in_folder(folder: Path) -> list[type[Reward]]:
    """All rewards in a folder's own .py files, in the order of their names; files named _* are left out."""
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return [cls for path in files for cls in rewards_in_file(path)]


def named(classes: Iterable[type[Reward]], taken: Iterable[str]) -> dict[str, type[Reward]]:
    """Classes by name; a name that is taken is refused."""
    found: dict[str, type[Reward]] = {}
    taken = set(taken)
    for cls in classes:
        if cls.name in taken or cls.name in found:
            raise RewardError(
                f"{cls.__module__} names a reward {cls.name!r}, but 1 exists already. Choose another name."
            )
        found[cls.name] = cls
    return found


def import_reward(spec: str) -> type[Reward]:
    """The class that a headless configuration names as module:Class."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"{spec!r} cannot be imported ({error}). Write it as module:Class.") from error
    return check_class(found, spec)
