"""The trainer's configuration of a cell, and the check that a result belongs to it."""

from pathlib import Path
from typing import Any

from trainer.config.loading import build, merge, with_options
from trainer.config.schema import Config, ConfigError

from .budget import updates_within
from .grid import Cell, StudyTask
from .methods import CLIP_RANGE, STUDY_METHODS, StudyMethod, Tree
from .recipes import RECIPES, STUDY_REWARDS, Recipe, training_prompts
from .studies import Study


def rollout_section(study: Study, task: StudyTask, method: StudyMethod) -> Tree:
    """The recipe's rollout section with the method's changes applied."""
    size = {"prompts_per_update": study.prompts_per_update, "group_size": study.group_size, "steps": study.steps}
    return {**size, **RECIPES[task.recipe].rollout, **method.rollout, "images_at_once": 16}


def objective_section(recipe: Recipe, method: StudyMethod, steps: int) -> Tree:
    """The method's objective; the KL, which costs model evaluations, is measured only where it is trained."""
    shared = {"train_steps": recipe.train_steps, "clip_range": CLIP_RANGE, "kl_images": 0}
    fewer = {"first_steps": round(method.first_share * steps)} if method.first_share < 1 else {}
    return {**method.objective, **fewer, **shared}


def cell_config(cell: Cell, study: Study, out: Path) -> Config:
    """The recipe with the method's objective, at the cell's setting and seed."""
    recipe, method, folder = RECIPES[cell.task.recipe], STUDY_METHODS[cell.method], cell.folder(out)
    rollout = rollout_section(study, cell.task, method)
    tree = {
        "model": {"name": recipe.model, "device": "cpu"},  # prices are CPU seconds
        "prompts": {"lines": list(training_prompts(cell.task.reward))},
        "rollout": rollout,
        "reward": {
            "weights": {cell.task.reward: 1.0},
            "held_out": [name for name in study.held_out if name != cell.task.reward],
        },
        "advantage": recipe.advantage,
        "objective": objective_section(recipe, method, rollout["steps"]),
        "lora": {"rank": 8, "targets": "all" if recipe.kind == "ddim" else "linear"},
        "optimizer": {**method.optimizer, "minibatches": 2},
        "guard": study.guard,
        "run": {"name": folder.name, "folder": str(folder.parent), "seed": cell.seed},
    }
    setting = {
        "objective": {"kl_weight": cell.setting.kl_weight},
        "optimizer": {"learning_rate": cell.setting.learning_rate},
        "run": {"updates": study.updates, "preview_every": 0, "save_every": study.evaluate_every},
    }
    config = build(merge(tree, setting), cell.name)
    budget = study.budgets.get(cell.task.reward)
    if budget is None:
        return config
    return with_options(config, {"run": {"updates": updates_within(config, budget, study.evaluations)}})


def identity(config: Config) -> dict[str, Any]:
    """What the training of a result depends on: the configuration without its location and the device, a CPU."""
    return config.model_dump(mode="json", exclude={"run": {"folder"}, "model": {"device"}})


def evaluation_identity(study: Study, tinyeval: bool) -> dict[str, Any]:
    """What the evaluations of a result depend on: the sampled images and the rewards; TinyEval's where it is read."""
    sampled = {"images": study.images, "reference_images": study.reference_images, "steps": study.steps}
    held_out = {"tinyeval_prompts": study.tinyeval_prompts} if tinyeval else {}
    return {**sampled, **held_out, "rewards": list(STUDY_REWARDS)}


def require_same(existing: Config, requested: Config, folder: Path) -> None:
    """Raise ConfigError that names every setting in which the run in `folder` differs from the requested one."""
    old, new = identity(existing), identity(requested)
    changed = [
        f"{section}.{key} is {old[section][key]}, requested {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]
    _refuse(changed, "configuration", folder)


def require_same_evaluation(existing: dict[str, Any] | None, requested: dict[str, Any], folder: Path) -> None:
    """The same for the evaluations; without an entry, as in older runs, they are the present ones."""
    old = requested if existing is None else existing
    changed = [
        f"{key} is {old.get(key)}, requested {value}" for key, value in requested.items() if old.get(key) != value
    ]
    _refuse(changed, "evaluation", folder)


def _refuse(changed: list[str], what: str, folder: Path) -> None:
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another {what} ({'; '.join(changed)}). A result is only valid for the {what} "
            "that produced it. Use another --out, or remove the folder."
        )
