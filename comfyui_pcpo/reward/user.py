"""User-defined rewards: installed packages (entry points), .py files in one folder, or module:Class.

The environment variable PCPO_REWARD_FOLDER sets the folder, and configuration files may name module:Class; workflows
only choose among names. Listing the names runs no user code.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings
from comfyui_pcpo.reward.group import GroupReward
from comfyui_pcpo.reward.service.endpoint import EndpointReward

GROUP = "pcpo.rewards"
REWARD_BASES = (Reward, GroupReward, EndpointReward)
"""What a reward is derived from; each asks for another method."""


def user_reward_folder() -> Path | None:
    """The folder in PCPO_REWARD_FOLDER; None if it is unset."""
    text = os.environ.get("PCPO_REWARD_FOLDER", "")
    folder = Path(text) if text else None
    if folder is not None and not folder.is_dir():
        raise RewardError(f"PCPO_REWARD_FOLDER is {folder}, which is not a folder. Create it, or unset the variable.")
    return folder


def check_class(value: object, source: str) -> type[Reward]:
    """Validate that a value is a Reward class with a name and `score_batch`."""
    if not (inspect.isclass(value) and issubclass(value, Reward)):
        raise RewardError(f"{source} must be a subclass of comfyui_pcpo.reward.Reward, not a {type(value).__name__}.")
    owner = next(cls for cls in value.__mro__ if "score_batch" in vars(cls))
    method = {GroupReward: "score_group", EndpointReward: "score_image"}.get(owner, "score_batch")
    if not value.name or (owner in REWARD_BASES and getattr(value, method) is getattr(owner, method)):
        raise RewardError(f"{source} must define both `name` and `{method}`.")
    return value


def load_file(path: Path) -> ModuleType:
    """Import a file under a private module name."""
    name = f"pcpo_user_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is not a Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RewardError(f"{path} failed with {type(error).__name__}: {error}. Fix the file or remove it.") from error
    return module


def rewards_in_file(path: Path) -> list[type[Reward]]:
    """The reward classes that a file defines, not those that it imports, nor nameless ones that others derive from."""
    module = load_file(path)
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    rewards = [cls for cls in own if issubclass(cls, Reward)]
    shared = {cls for cls in rewards if not cls.name and any(cls in other.__mro__[1:] for other in rewards)}
    classes = [check_class(cls, f"{path}: {cls.__name__}") for cls in rewards if cls not in shared]
    if not classes:
        raise RewardError(
            f"{path} defines no reward. Add a subclass of comfyui_pcpo.reward.Reward, or remove the file."
        )
    return classes


def installed_rewards() -> list[type[Reward]]:
    """Classes that installed packages register under the entry-point group `pcpo.rewards`."""
    from importlib.metadata import entry_points

    classes = []
    for point in entry_points(group=GROUP):
        cls = check_class(loaded(point.load, f"entry point {point.name}"), f"entry point {point.name}")
        if cls.name != point.name:
            raise RewardError(
                f"Entry point {point.name!r} loads a reward with `name = {cls.name!r}`; the entry-point name and the "
                "class's `name` must match."
            )
        classes.append(cls)
    return classes


def files_in_folder(folder: Path) -> list[Path]:
    """The .py files of a folder, sorted; names that start with _ are skipped."""
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def files_named_by_environment() -> list[Path]:
    """The .py files of the folder in PCPO_REWARD_FOLDER; none if it is unset or no folder."""
    text = os.environ.get("PCPO_REWARD_FOLDER", "")
    return files_in_folder(Path(text)) if text else []


def rewards_in_folder(folder: Path) -> list[type[Reward]]:
    """All rewards in the .py files of a folder."""
    return [cls for path in files_in_folder(folder) for cls in rewards_in_file(path)]


def names_in_file(path: Path) -> Iterator[str]:
    """The `name = "..."` or `name: str = "..."` of each class in a file, parsed without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError):
        return  # loading a reward of the folder reports the broken file
    for node in (item for item in tree.body if isinstance(item, ast.ClassDef) and item.bases):
        for line in (item for item in node.body if isinstance(item, ast.Assign | ast.AnnAssign)):
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            to_name = [target.id for target in targets if isinstance(target, ast.Name)] == ["name"]
            if to_name and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
                yield line.value.value


def user_reward_names() -> list[str]:
    """Names of user-defined rewards, installed or in the folder, without running their code."""
    from importlib.metadata import entry_points

    in_folder = (name for path in files_named_by_environment() for name in names_in_file(path))
    return [*(point.name for point in entry_points(group=GROUP)), *in_folder]


def classes_by_name(classes: Iterable[type[Reward]], taken: Iterable[str]) -> dict[str, type[Reward]]:
    """Classes by name; duplicate names are refused."""
    by_name: dict[str, type[Reward]] = {}
    taken = set(taken)
    for cls in classes:
        if cls.name in taken or cls.name in by_name:
            raise RewardError(f"{cls.__module__} defines the reward {cls.name!r}, which already exists. Rename it.")
        by_name[cls.name] = cls
    return by_name


def code_of(name: str) -> Path | None:
    """The file that defines a reward of the user's own, in the folder or as module:Class; None for others.

    Neither the file nor the module is run, but the packages that contain the module are.
    """
    if ":" not in name:
        return next((path for path in files_named_by_environment() if name in names_in_file(path)), None)
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (Exception, SystemExit):
        return None  # importing the reward reports it
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def import_reward(spec: str) -> type[Reward]:
    """The class that a configuration names as module:Class."""
    module, _, name = spec.partition(":")
    if not (module and name.isidentifier()):
        raise RewardError(f"{spec!r} is not module:Class. Write it like my_rewards:Darkness.")
    return check_class(loaded(lambda: getattr(importlib.import_module(module), name), repr(spec)), spec)


def loaded(load: Callable[[], object], source: str) -> object:
    """What `load` imports. Raises RewardError for whatever a user's module raises."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(
            f"{source} cannot be imported ({cause}). Fix the module, or name a reward as module:Class."
        ) from error


def construct(cls: type[Reward], settings: RewardSettings | None) -> Reward:
    """A reward of a class. Raises RewardError for whatever its __init__ raises."""
    if not getattr(cls, "higher_is_better", True):
        raise RewardError(
            f"reward {cls.name} sets higher_is_better = False, but a higher score is always better. Remove that line, "
            "and return the negative score or give the reward a negative weight."
        )
    try:
        return cls(settings)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {cls.name} cannot be constructed ({type(error).__name__}: {error}). Its __init__ gets the "
            "settings and passes them to super().__init__(settings)."
        ) from error
