"""Rewards that users write: installed packages (entry points), .py files in one folder, or module:Class.

The folder is the choice of who installs, by the environment variable PCPO_REWARD_FOLDER, and headless configurations
may name module:Class; a workflow offers names only. Listing the names runs none of the code.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from comfyui_pcpo.reward.base import Reward, RewardError

GROUP = "pcpo.rewards"


def own_folder() -> Path | None:
    """The folder that PCPO_REWARD_FOLDER names; None where it is not set."""
    text = os.environ.get("PCPO_REWARD_FOLDER", "")
    folder = Path(text) if text else None
    if folder is not None and not folder.is_dir():
        raise RewardError(f"PCPO_REWARD_FOLDER names {folder}, which is no folder. Make it, or unset the variable.")
    return folder


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

    found = [
        (point.name, check_class(point.load(), f"entry point {point.name}")) for point in entry_points(group=GROUP)
    ]
    for name, cls in found:
        if cls.name != name:
            raise RewardError(f"entry point {name} is the reward {cls.name!r}, but both must have 1 name. Rename one.")
    return [cls for _, cls in found]


def files_in_folder(folder: Path) -> list[Path]:
    """A folder's own .py files in the order of their names; files named _* are left out."""
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def rewards_in_folder(folder: Path) -> list[type[Reward]]:
    """All rewards in a folder's own .py files."""
    return [cls for path in files_in_folder(folder) for cls in rewards_in_file(path)]


def names_in_file(path: Path) -> Iterator[str]:
    """The `name = "..."` or `name: str = "..."` of each class in a file, which is read and not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return  # it is named when somebody asks for a reward of the folder
    for node in (item for item in tree.body if isinstance(item, ast.ClassDef) and item.bases):
        for line in (item for item in node.body if isinstance(item, ast.Assign | ast.AnnAssign)):
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            to_name = [target.id for target in targets if isinstance(target, ast.Name)] == ["name"]
            if to_name and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
                yield line.value.value


def own_names() -> list[str]:
    """Names of the users' rewards, installed or in the folder, without running their code."""
    from importlib.metadata import entry_points

    text = os.environ.get("PCPO_REWARD_FOLDER", "")
    files = files_in_folder(Path(text)) if text else []
    return [*(point.name for point in entry_points(group=GROUP)), *(n for path in files for n in names_in_file(path))]


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
