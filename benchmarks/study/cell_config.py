"""The trainer's configuration of a cell, and the check that a result belongs to it."""

from functools import cache
from pathlib import Path
from typing import Any

from comfyui_pcpo.method.ddim_variance import smallest_target
from trainer.config.loading import build, merge
from trainer.config.schema import Config, ConfigError
from trainer.policy.loading import make_policy

from .grid import Cell
from .methods import STUDY_METHODS, StudyMethod, Tree
from .recipes import RECIPES, STUDY_PROMPTS
from .studies import Study


@cache
def least_target(model: str, steps: int) -> float:
    """The smallest w* that every step of the model's ddim grid can reach."""
    config = build({"model": {"name": model, "device": "cpu"}}, model)
    return smallest_target(make_policy(config).grid(steps))


def rollout_section(study: Study, recipe_name: str, method: StudyMethod) -> Tree:
    """The recipe's rollout section with the method's changes applied."""
    recipe = RECIPES[recipe_name]
    size = {"prompts_per_update": study.prompts_per_update, "group_size": study.group_size, "steps": study.steps}
    section = {**size, **recipe.rollout, **method.rollout, "images_at_once": 16}
    if method.target_scale:
        least = least_target(recipe.model, study.steps)
        section["target_weight"] = round(method.target_scale * least * (1 + 1e-6) + 5e-5, 4)
    return section


def cell_config(cell: Cell, study: Study, out: Path) -> Config:
    """The recipe with the method's objective, at the cell's setting and seed."""
    recipe, method = RECIPES[cell.task.recipe], STUDY_METHODS[cell.method]
    folder = cell.folder(out)
    tree = {
        "model": {"name": recipe.model},
        "prompts": {"lines": list(STUDY_PROMPTS)},
        "rollout": rollout_section(study, cell.task.recipe, method),
        "reward": {"weights": {cell.task.reward: 1.0}},
        "advantage": recipe.advantage,
        "objective": {**method.objective, "clip_range": cell.clip_range},
        "lora": {"rank": 8, "targets": "all" if recipe.kind == "ddim" else "linear"},
        "optimizer": {**method.optimizer, "learning_rate": cell.learning_rate, "minibatches": 2},
        "run": {"name": folder.name, "folder": str(folder.parent), "seed": cell.seed},
    }
    length = {"updates": study.updates, "preview_every": 0, "save_every": study.evaluate_every}
    return build(merge(tree, {"run": length}), cell.name)


def identity(config: Config) -> dict[str, Any]:
    """Everything that a result depends on: the configuration without the run's location."""
    return config.model_dump(mode="json", exclude={"run": {"folder"}})


def require_same(existing: Config, requested: Config, folder: Path) -> None:
    """Raise ConfigError that names every setting in which the run in `folder` differs from the requested one."""
    old, new = identity(existing), identity(requested)
    changed = [
        f"{section}.{key} is {old[section][key]}, requested {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another configuration ({'; '.join(changed)}). A result is only valid for the "
            "configuration that produced it. Use another --out, or remove the folder."
        )
