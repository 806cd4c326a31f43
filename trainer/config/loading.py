"""Read and write configurations: TOML files, `--section.field value` options, and errors that name the key."""

import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.prompt import require_text

from .options import is_text, known_keys, nearest
from .presets import UNLIMITED, described, has_auto, needs_room, resolved
from .schema import Config, ConfigError, ModelConfig
from .text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PRIVATE = {
    "prompts": ("lines", "file", "negative"),
    "reward": ("folder",),
    "lora": ("start",),
    "run": ("name", "folder"),
}
"""Options that stay in the run's own folder."""


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key}. {nearest(key)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f" (given: {shown(item['input'])})" if key and not isinstance(item["input"], dict) else ""
            lines.append(f"{source}: {key + ': ' if key else ''}{message}{given}")
    return "\n".join(lines)


def shown(value: Any, most: int = 80) -> str:
    """A given value for an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def parse_overrides(tokens: list[str]) -> dict[str, Any]:
    """`--section.field value` or `--section.field=value` tokens -> nested dict; values are parsed as TOML."""
    tree: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"`{token}` is not an option. Options look like --rollout.group-size 16.")
        option, equals, text = token[2:].partition("=")
        section, key, reward = _place(option)
        if not equals:
            if not rest:
                raise ConfigError(f"--{option} has no value. Give it after the option.")
            text = rest.pop(0)
        values, value = tree.setdefault(section, {}), _value(option, text)
        if reward is not None:
            values.setdefault(key, {})[reward] = value
        elif (section, key) == ("reward", "weights"):
            values[key] = weight_table(value, "options")
        elif is_text(f"{section}.{key}") and not isinstance(value, str | list | dict):
            values[key] = text  # a name such as 2024
        else:
            values[key] = value
    return tree


def _place(option: str) -> tuple[str, str, str | None]:
    """Section, key, and of `reward.weights.NAME` the reward's name, which may contain dots: where a value belongs."""
    if option.startswith("reward.weights."):
        return "reward", "weights", option.removeprefix("reward.weights.")
    path = option.replace("-", "_")
    if path not in known_keys():
        near = nearest(path).replace("Did you mean ", "Did you mean --").replace("_", "-")
        raise ConfigError(f"unknown option --{option}. {near}")
    section, key = path.split(".")
    return section, key, None


class InlineTable(dict):
    """A table given as one value, `{a = 1}`: it replaces the existing table instead of being merged into it."""


def weight_table(value: Any, source: str) -> Any:
    """`reward.weights` as a table, to which entries can be added: a plain name has weight 1."""
    if isinstance(value, str) and value:
        return InlineTable({value: 1.0})
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source}: reward.weights is {shown(value)}, but must be a reward's name or a table of weights. "
            "Try {alignment = 1.0}."
        )
    return value


def _value(option: str, text: str) -> Any:
    """Parse a value as TOML, else as JSON, else take the text itself, unless it begins like a list or a table."""
    for read in (lambda: tomllib.loads(f"v = {text}")["v"], lambda: parse_json(text)):
        try:
            value = read()
        except (ValueError, RecursionError):
            continue
        return InlineTable(value) if isinstance(value, dict) else value
    if text.lstrip()[:1] in ("[", "{"):
        raise ConfigError(
            f'--{option} {shown(text)} is neither TOML nor JSON. Write a list as ["a fox", "a frog"], a table as '
            "{alignment = 1}, and a text that begins with a bracket in double quotes."
        )
    return text


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, merged section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and not isinstance(value, InlineTable) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def build(tree: dict[str, Any], source: str) -> Config:
    """A validated Config. Raises ConfigError with `source`, the key and, for an unknown key, the nearest known one."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def with_options(config: Config, tree: dict[str, Any]) -> Config:
    """`config` with some values replaced, validated again; None keeps the value."""
    changes = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in tree.items()}
    return build(merge(config.model_dump(), changes), "options")


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """A Config from a TOML file (or the defaults) and overrides; paths in the file are relative to it."""
    return load_described(path, overrides)[0]


def load_described(path: Path | None, overrides: dict[str, Any] | None = None) -> tuple[Config, str]:
    """As `load`, and a line that names what every `auto` was resolved to, empty without any."""
    tree: dict[str, Any] = {}
    overrides = overrides or {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist. Give a TOML file, such as one of configs/.")
        tree = read_toml(path)
        for key in Config.model_fields.keys() & tree.keys():
            if not isinstance(tree[key], dict):
                raise ConfigError(f"{path}: {key} is {shown(tree[key])}, but must be a section. Write [{key}].")
        _require_text(tree, str(path))
        _resolve(tree, path.parent, str(path))
    _require_text(overrides, "options")
    _resolve(overrides, Path(), "options")
    sources = [str(path)] * (path is not None) + ["options"] * bool(overrides or path is None)
    tree, line = with_preset(merge(tree, overrides))
    return build(tree, " and ".join(sources)), line


def with_preset(tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """`tree` with the values that `auto` stands for with this model, and the line that names them."""
    if not has_auto(tree):
        return tree, ""
    from ..policy.model_family import device_room, model_preset  # imports torch

    model = {**ModelConfig().model_dump(), **tree.get("model", {})}
    name = model_preset(str(model["name"]))
    filled, chosen = resolved(tree, name, device_room(model) if needs_room(tree) else UNLIMITED)
    return filled, described(name, chosen)


def read_toml(path: Path) -> dict[str, Any]:
    """The tree in a TOML file. Raises ConfigError with the place of the first mistake."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {str(error).rstrip('.')}. Fix that line.") from None
    except RecursionError:
        raise ConfigError(f"{path}: values are nested too deeply. A configuration has sections and keys.") from None


def _require_text(value: Any, source: str, key: str = "") -> None:
    """Raise ConfigError for a text anywhere in a tree that can be neither path nor prompt."""
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            _require_text(entry, source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        try:
            require_text(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {key} {error}.") from None


def _resolve(tree: dict[str, Any], folder: Path, source: str) -> None:
    """Make paths of input files absolute, so that a run resumes from any folder, and `reward.weights` a table."""
    for section, key in (("prompts", "file"), ("lora", "start"), ("reward", "folder")):
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            _require_given(values[key], f"{source}: {section}.{key}")
            values[key] = str((folder / values[key]).resolve())
    model = tree.get("model")
    if isinstance(model, dict):
        for key in {"name", "config"} & model.keys():
            _require_given(model[key], f"{source}: model.{key}")
            if (folder / str(model[key])).exists():  # otherwise a Hugging Face or an embedded model
                model[key] = str((folder / str(model[key])).resolve())
    reward = tree.get("reward")
    if isinstance(reward, dict):
        if "weights" in reward:
            reward["weights"] = weight_table(reward["weights"], source)
        tree["reward"] = _renamed_rewards(reward, lambda name: _resolved_taste(name, folder))


def _require_given(path: Any, option: str) -> None:
    """Raise ConfigError for an empty path, which would be the current folder."""
    if path == "":
        raise ConfigError(f"{option} is empty (an unset shell variable?). Set it, or leave the option out.")


def _resolved_taste(name: str, folder: Path) -> str:
    """A reward's name; that of a taste, which is a file, as an absolute path."""
    return str((folder / name).resolve()) if name.endswith(".safetensors") else name


def _renamed_rewards(reward: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """A reward section with every reward's name replaced; values that are not as they should be are left."""

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return rename(value)
        if isinstance(value, dict):
            return type(value)({rename(name): entry for name, entry in value.items()})
        return [rename(name) if isinstance(name, str) else name for name in value] if isinstance(value, list) else value

    named = ("weights", "schedule", "constraints", "held_out")
    return {key: renamed(value) if key in named else value for key, value in reward.items()}


def dump(config: Config) -> str:
    """The resolved configuration as TOML; reading it back gives the same Config."""
    import tomli_w

    tree = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps(tree)


def dump_shareable(config: Config) -> str:
    """As `dump`, for files that are passed on: without prompts, paths and the run's name.

    A model, a pipeline or a taste that is named by its path is named by its last part.
    """
    import tomli_w

    tree = config.model_dump(mode="json", exclude_none=True)
    for section, keys in PRIVATE.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    for key in {"name", "config"} & tree["model"].keys():
        tree["model"][key] = without_folder(tree["model"][key])
    tree["reward"] = _renamed_rewards(tree["reward"], without_folder)
    return tomli_w.dumps({section: values for section, values in tree.items() if values})


def without_folder(name: str) -> str:
    """The last part of an absolute path; anything else, such as a hub name, as it is."""
    for kind in (PurePosixPath(name), PureWindowsPath(name)):
        if kind.is_absolute():
            return kind.name
    return name
