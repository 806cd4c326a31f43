"""Where a configuration comes from and goes to: TOML files, `--section.field value` options, sentences for mistakes."""

import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from comfyui_pcpo.forward_process import FORWARD
from comfyui_pcpo.tiny.captions import OBJECTS, SHAPES, VOCABULARY
from comfyui_pcpo.tiny.pipelines import EMBEDDED

from .config import Config, ConfigError, Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


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


def describe(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """One line per option: name, default, sentence."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield f"\n[{name}]"
            yield from describe(kind, f"{name}.")
        else:
            default = "" if field.default is None else f" [{as_toml(field.default)}]"
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            either = f" One of {', '.join(choices)}." if choices else ""
            yield f"  --{(prefix + name).replace('_', '-'):<34}{field.description}{either}{default}"


def as_toml(value: Any) -> str:
    """A value as it is written in a configuration file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(v)}" for name, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str | Path) else f"{value:g}" if isinstance(value, float) else str(value)


def nearest(key: str) -> str:
    """A sentence that names the known key most like `key`, or where to find them all."""
    keys = known_keys()
    short = {k.split(".")[-1]: k for k in keys}
    found = difflib.get_close_matches(key, keys, 1, 0.6)
    found = found or [short[k] for k in difflib.get_close_matches(key.split(".")[-1], short, 1, 0.6)]
    return f"Did you mean {found[0]}?" if found else "`python -m trainer options` lists them all."


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key}. {nearest(key)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f" (given: {item['input']!r})" if key and not isinstance(item["input"], dict) else ""
            lines.append(f"{source}: {key + ': ' if key else ''}{message}{given}")
    return "\n".join(lines)


def parse_overrides(tokens: list[str]) -> dict[str, Any]:
    """`--section.field value` or `--section.field=value` tokens as a nested dict; values are read as TOML."""
    tree: dict[str, Any] = {}
    keys = known_keys()
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"`{token}` is not an option. Options look like --rollout.group-size 16.")
        given, equals, value = token[2:].partition("=")
        path = _key_path(given)
        if ".".join(path) not in keys and path[:-1] != ["reward", "weights"]:
            near = nearest(".".join(path)).replace("Did you mean ", "Did you mean --").replace("_", "-")
            raise ConfigError(f"unknown option --{given}. {near}")
        if not equals:
            if not rest:
                raise ConfigError(f"--{given} has no value. Write it behind the option.")
            value = rest.pop(0)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = _value(value)
    return tree


def _key_path(option: str) -> list[str]:
    """`rollout.group-size` -> its parts; behind `reward.weights.` stands a reward's own name, dots and all."""
    head, found, name = option.partition("reward.weights.")
    return ["reward", "weights", name] if found and not head else option.replace("-", "_").split(".")


class Whole(dict):
    """A table that was given as one value, `{a = 1}`: it replaces the one that it is laid on."""


def _value(text: str) -> Any:
    """A value as in TOML, or as in JSON, or the text itself."""
    for read in (lambda: tomllib.loads(f"v = {text}")["v"], lambda: json.loads(text)):
        try:
            value = read()
        except ValueError:
            continue
        return Whole(value) if isinstance(value, dict) else value
    return text


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and not isinstance(value, Whole) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def build(tree: dict[str, Any], source: str) -> Config:
    """A validated Config; raises ConfigError that names `source`, the key and the nearest right one."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def without_effect(config: Config) -> list[str]:
    """A sentence for every changed setting that other settings make idle, as far as the configuration alone tells."""
    plain, r, a, o = Config(), config.rollout, config.advantage, config.objective
    forward, guided = o.name in FORWARD, r.cfg != 1
    still = forward and not r.noise_level  # sampled without noise
    idle = {
        "model.config": (not config.model.name.endswith(".safetensors"), "model.name is no .safetensors file"),
        "prompts.negative": (not guided, "rollout.cfg is 1"),
        "rollout.detach_unconditional": (not guided, "rollout.cfg is 1"),
        "rollout.batch_cfg": (not guided, "rollout.cfg is 1"),
        "rollout.method": (still, f"{o.name} samples without noise"),
        "rollout.sigma": (still, f"{o.name} samples without noise"),
        "rollout.sde_window": (still, f"{o.name} samples without noise"),
        "advantage.spread": (a.kind == "window", "advantage.kind is window"),
        "advantage.window": (a.kind == "group", "advantage.kind is group"),
        "advantage.min_count": (a.kind == "group", "advantage.kind is group"),
        "objective.credit": (forward, f"objective.name is {o.name}"),
        "objective.form": (forward, f"objective.name is {o.name}"),
        "objective.clip_range": (o.name == "nft", "objective.name is nft"),
        "objective.nft_beta": (o.name != "nft", f"objective.name is {o.name}"),
        "objective.kl_images": (o.kl_weight > 0, "objective.kl_weight is above 0, so all pictures are measured"),
        "optimizer.ema_every": (not config.optimizer.ema_decay, "optimizer.ema_decay is 0"),
    }

    def changed(key: str) -> bool:
        section, name = key.split(".")
        return getattr(getattr(config, section), name) != getattr(getattr(plain, section), name)

    return [f"{key} has no effect, because {why}." for key, (is_idle, why) in idle.items() if is_idle and changed(key)]


def unknown_words(config: Config) -> list[str]:
    """A sentence where prompts of an embedded model hold words that it never learned; it stops reading there."""
    if config.model.name not in EMBEDDED:
        return []
    words = {word for line in config.prompts.found() for word in re.findall(r"[a-z]+", line.lower())}
    strange = sorted(words - set(VOCABULARY))
    known = f"It knows {', '.join((*OBJECTS, *SHAPES))}."
    return [f"{config.model.name} does not know {', '.join(strange)}. {known}"] if strange else []


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """A Config from a TOML file (or none) with overrides laid on it; paths in it are relative to the file."""
    tree: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist. Give a TOML file; configs/ holds ready ones.")
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}.") from None
        _resolve(tree, path.parent)
    _resolve(overrides or {}, Path())
    given = [str(path)] * (path is not None) + ["options"] * bool(overrides or path is None)
    return build(merge(tree, overrides or {}), " and ".join(given))


def _resolve(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths of input files absolute, so that a run can be resumed from anywhere."""
    for section, key in (("prompts", "file"), ("lora", "start"), ("reward", "folder")):
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            values[key] = str((folder / values[key]).resolve())
    model = tree.get("model")
    if isinstance(model, dict):
        for key in {"name", "config"} & model.keys():
            if (folder / str(model[key])).exists():  # else a hub's or an embedded model
                model[key] = str((folder / str(model[key])).resolve())


def dump(config: Config) -> str:
    """The resolved configuration as TOML; reading it back gives the same Config."""
    import tomli_w

    tree = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps(tree)
