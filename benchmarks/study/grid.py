"""The grid: its cells, their configurations, and which settings the tuning seeds chose."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from comfyui_pcpo.method.ddim_variance import smallest_target
from trainer.config.loading import build, merge
from trainer.config.schema import Config, ConfigError
from trainer.policy.loading import make_policy

from .methods import BASELINE, CONTENDERS, OURS, PROMPTS, RECIPES, Contender, Form, Setting
from .statistics import area


@dataclass(frozen=True)
class Task:
    """What the contenders compete in."""

    recipe: str
    reward: str

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.reward}"


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: Task
    contender: str
    learning_rate: float
    clip_range: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.contender}/lr{self.learning_rate:g}-clip{self.clip_range:g}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.task.recipe / self.task.reward / self.name


KEEPS = 0.9  # share of the base model's right objects below which an examination has lost the pictures


def tasks(form: Form) -> list[Task]:
    return [Task(*pair) for pair in form.tasks]


def competing(form: Form, task: Task) -> list[str]:
    """The contenders that exist for the task's kind of model, without those that the form leaves out."""
    kind = RECIPES[task.recipe].kind
    known = [name for name in form.contenders if CONTENDERS[name].kind in ("", kind)]
    return [name for name in known if (task.recipe, name) not in form.skips]


def settings(form: Form, task: Task, contender: str) -> list[Setting]:
    """What to choose from, the same for all; without clipping the range says nothing, so each rate comes once."""
    sweep = form.sweep[RECIPES[task.recipe].kind]
    if CONTENDERS[contender].clips:
        return list(sweep)
    first: dict[float, float] = {}
    for rate, clip in sweep:
        first.setdefault(rate, clip)
    return list(first.items())


def tuned_as(form: Form, task: Task) -> Task:
    """The task whose tuning seeds choose this one's settings: itself, or that of a recipe with the same sampler."""
    return Task(form.tuned_as.get(task.recipe, task.recipe), task.reward)


def tuning_cells(form: Form, task: Task) -> list[Cell]:
    """The runs that a task's settings are chosen by."""
    task = tuned_as(form, task)
    return [
        Cell(task, contender, *setting, seed)
        for contender in competing(form, task)
        for setting in settings(form, task, contender)
        for seed in form.tuning_seeds
    ]


def common_settings(form: Form, task: Task) -> dict[str, Setting]:
    """The one setting that all contenders are also compared at; empty where the form has none for the recipe."""
    wanted = form.common.get(task.recipe)
    if wanted is None:
        return {}
    found = {}
    for name in competing(form, task):
        same = [one for one in settings(form, task, name) if one[0] == wanted[0]]
        found[name] = wanted if wanted in same else same[0]
    return found


def reported_cells(form: Form, task: Task, chosen: dict[str, Setting]) -> list[Cell]:
    """Seed after seed, so that a grid that was stopped has whole blocks of contenders."""
    return [Cell(task, name, *setting, seed) for seed in form.seeds for name, setting in chosen.items()]


def fresh_cells(form: Form, task: Task) -> list[Cell]:
    """PCPO and its baseline at the one setting for all, on seeds that nothing was decided by."""
    common = common_settings(form, task)
    pair = [(name, common[name]) for name in (BASELINE, OURS) if name in common]
    return [Cell(task, name, *setting, seed) for seed in form.fresh_seeds for name, setting in pair]


def read_result(cell: Cell, form: Form, out: Path) -> dict[str, Any] | None:
    """What a finished cell found, None while it is not finished. Raises ConfigError where it was another run."""
    folder = cell.folder(out)
    file = folder / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if "config" not in result:
        raise ConfigError(f"{file} does not say what it was run with. Remove {folder}, or give another --out.")
    require_same(build(result["config"], str(file)), cell_config(cell, form, out), folder)
    return result


def configuration(config: Config) -> dict[str, Any]:
    """All that a result depends on: everything but where the run lies."""
    return config.model_dump(mode="json", exclude={"run": {"folder"}})


def require_same(ran: Config, wanted: Config, folder: Path) -> None:
    """Raise ConfigError that names every setting in which what lies in `folder` differs from what is asked for."""
    old, new = configuration(ran), configuration(wanted)
    changed = [
        f"{section}.{key} = {old[section][key]} there, {value} asked for"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(changed)}), and a result counts only for "
            "the configuration that it was run with. Give another folder with --out, or remove that one."
        )


def gain(row: dict[str, Any], before: dict[str, Any], reward: str) -> float:
    """A reward's rise between two examinations, in standard deviations of the first one's pictures."""
    return (row[reward] - before[reward]) / before[f"{reward}_std"]


def exams(form: Form) -> list[int]:
    """The updates after which a run is examined."""
    return [u for u in range(1, form.updates + 1) if u % form.every == 0 or u == form.updates]


def kept_share(row: dict[str, Any], before: dict[str, Any]) -> float:
    """Share of the base model's right objects that an examination still finds."""
    return row["object"] / before["object"]


def keeping(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each examination keeps at least KEEPS of the right objects of the first, which is the base model's."""
    return [kept_share(row, rows[0]) >= KEEPS for row in rows]


def kept_gains(result: dict[str, Any]) -> list[float]:
    """Gains of the latest examination that keeps the pictures: what somebody has who stops before they are ruined.

    A reward such as colourfulness can be had by ruining the picture; such gains do not count.
    """
    kept = []
    for gain, keeps in zip(result["gains"], keeping(result["rows"]), strict=True):
        kept.append(gain if keeps else kept[-1])
    return kept


def outcome(result: dict[str, Any]) -> float:
    """The one number that settings are chosen by and contenders are compared in: the mean kept gain on the way.

    It asks for speed, as the paper does, and no single examination decides.
    """
    return area(result["updates"], kept_gains(result))


@dataclass(frozen=True)
class Tried:
    """What a setting did on the tuning seeds so far."""

    seeds: int
    gain: float  # mean outcome
    kept: float  # share of the base model's right objects at the end, mean


def tried(form: Form, task: Task, contender: str, out: Path) -> dict[Setting, Tried]:
    """A contender's settings of which at least one tuning seed is finished."""
    task, found = tuned_as(form, task), {}
    for setting in settings(form, task, contender):
        cells = [Cell(task, contender, *setting, seed) for seed in form.tuning_seeds]
        results = [result for _, result in finished(cells, form, out)]
        if results:
            gains = [outcome(result) for result in results]
            kept = [kept_share(result["rows"][-1], result["rows"][0]) for result in results]
            found[setting] = Tried(len(results), sum(gains) / len(gains), sum(kept) / len(kept))
    return found


def choose(form: Form, task: Task, out: Path) -> dict[str, Setting] | None:
    """Each contender's setting with the highest outcome on the tuning seeds; None while cells are missing."""
    chosen = {}
    for contender in competing(form, task):
        options = settings(form, task, contender)
        found = tried(form, task, contender, out)
        if not form.tuning_seeds:
            chosen[contender] = options[0]
            continue
        if len(found) < len(options) or any(one.seeds < len(form.tuning_seeds) for one in found.values()):
            return None
        chosen[contender] = max(options, key=lambda setting: found[setting].gain)
    return chosen


@cache
def least_target(model: str, steps: int) -> float:
    """The smallest w* that every step of the model's ddim grid can carry."""
    config = build({"model": {"name": model, "device": "cpu"}}, model)
    return smallest_target(make_policy(config).grid(steps))


def sampler(form: Form, recipe: str, contender: Contender) -> dict[str, Any]:
    """The rollout section: the recipe's, with what the contender changes laid on it."""
    given = RECIPES[recipe]
    size = {"prompts_per_update": form.prompts_per_update, "group_size": form.group_size, "steps": form.steps}
    tree = {**size, **given.rollout, **contender.rollout, "images_at_once": 16}
    if contender.aim:
        least = least_target(given.model, form.steps)
        tree["target_weight"] = round(contender.aim * least * (1 + 1e-6) + 5e-5, 4)
    return tree


def cell_config(cell: Cell, form: Form, out: Path) -> Config:
    """The run that a cell is: the recipe with the contender's objective and the setting."""
    recipe, contender = RECIPES[cell.task.recipe], CONTENDERS[cell.contender]
    folder = cell.folder(out)
    tree = {
        "model": {"name": recipe.model},
        "prompts": {"lines": list(PROMPTS)},
        "rollout": sampler(form, cell.task.recipe, contender),
        "reward": {"weights": {cell.task.reward: 1.0}},
        "advantage": recipe.advantage,
        "objective": {**contender.objective, "clip_range": cell.clip_range},
        "lora": {"rank": 8, "targets": "all" if recipe.kind == "ddim" else "linear"},
        "optimizer": {"learning_rate": cell.learning_rate, "minibatches": 2},
        "run": {"name": folder.name, "folder": str(folder.parent), "seed": cell.seed},
    }
    length = {"updates": form.updates, "preview_every": 0, "save_every": form.every}
    return build(merge(tree, {"run": length}), cell.name)


def finished(cells: Sequence[Cell], form: Form, out: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The finished ones of `cells` with their results."""
    for cell in cells:
        result = read_result(cell, form, out)
        if result is not None:
            yield cell, result
