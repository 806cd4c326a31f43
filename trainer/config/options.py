"""Every option of the configuration: its key, default and description, and the key nearest to a mistyped one."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ..program import program_name
from .schema import Config, Section


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, in order."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def is_text(key: str) -> bool:
    """Whether a known key takes a text, a path, or a list of texts."""
    kind: Any = Config
    for part in key.split("."):
        kind = kind.model_fields[part].annotation
    kinds = {str, Path, type(None), tuple[str, ...]}
    return kind in kinds or (get_origin(kind) in (Union, UnionType) and set(get_args(kind)) <= kinds)


def option_lines(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """One line per option: flag, description, choices and default."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield f"\n[{name}]"
            yield from option_lines(kind, f"{name}.")
        else:
            default = "" if field.default is None else f" [{as_toml(field.default)}]"
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            one_of = f" One of {', '.join(choices)}." if choices else ""
            yield f"  --{(prefix + name).replace('_', '-'):<34}{field.description}{one_of}{default}"


def as_toml(value: Any) -> str:
    """A value in TOML syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(v)}" for name, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str | Path) else f"{value:g}" if isinstance(value, float) else str(value)


SYNONYMS = {
    "sampler": "rollout.method",
    "scheduler": "rollout.method",
    "eta": "rollout.noise_level",
    "guidance_scale": "rollout.cfg",
    "num_inference_steps": "rollout.steps",
    "resolution": "rollout.height",
    "batch_size": "rollout.images_at_once",
    "num_generations": "rollout.group_size",
    "lr": "optimizer.learning_rate",
    "beta": "objective.kl_weight",
    "kl": "objective.kl_weight",
    "algorithm": "objective.name",
}
"""What other programs call a setting, and its key here."""


def nearest(key: str) -> str:
    """A hint for an unknown key: the known key most like it, or the command that lists all of them."""
    keys = known_keys()
    beside = [known for known in keys if known.split(".")[0] == key.split(".")[0]]
    if typo := difflib.get_close_matches(key, beside, 1, 0.9):
        return f"Did you mean {typo[0]}?"
    if (other := SYNONYMS.get(key.split(".")[-1])) is not None:
        return f"Did you mean {other}?"
    short = {k.split(".")[-1]: k for k in keys}
    matches = difflib.get_close_matches(key, keys, 1, 0.6)
    matches = matches or [short[k] for k in difflib.get_close_matches(key.split(".")[-1], short, 1, 0.6)]
    return f"Did you mean {matches[0]}?" if matches else f"`{program_name()} options` lists all keys."
