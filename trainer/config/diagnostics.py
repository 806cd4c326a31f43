"""Notes on a valid configuration: what has no effect, a credit without scale, words that a model has not learned."""

import re

from comfyui_pcpo.method.credit import UNSCALED
from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES

from .schema import Config

GUARD_MEASURES = ("prompts", "images", "tolerance", "diversity_tolerance", "patience", "action")
"""Options of the guard's measurements."""
CONSTRAINTS = ("constraint_rate", "constraint_limit")


def without_effect(config: Config) -> list[str]:
    """One sentence for every changed setting that other settings disable, as far as the configuration alone shows."""
    defaults, r, a, o, g = Config(), config.rollout, config.advantage, config.objective, config.guard
    objective, guided = ALL_OBJECTIVES[o.name], r.cfg != 1
    deterministic = not objective.replays_steps and not r.noise_level
    idle = {
        "model.config": (not config.model.name.endswith(".safetensors"), "model.name is not a .safetensors file"),
        "prompts.negative": (not guided, "rollout.cfg is 1"),
        "rollout.detach_unconditional": (not guided, "rollout.cfg is 1"),
        "rollout.batch_cfg": (
            not guided or r.detach_unconditional,
            "rollout.detach_unconditional takes a call of its own" if guided else "rollout.cfg is 1",
        ),
        "rollout.method": (deterministic, f"{o.name} samples without noise"),
        "rollout.sigma": (deterministic, f"{o.name} samples without noise"),
        "rollout.sde_window": (
            deterministic or o.levels > 0,
            f"{o.name} samples without noise" if deterministic else "objective.levels decides the steps",
        ),
        "advantage.spread": (a.kind == "window", "advantage.kind is window"),
        "advantage.window": (a.kind == "group", "advantage.kind is group"),
        "advantage.min_count": (a.kind == "group", "advantage.kind is group"),
        "objective.clip_range": (o.kl_mask > 0, "objective.kl_mask takes its place"),
        **{f"objective.{key}": (True, f"objective.name is {o.name}") for key in objective.ignores},
        "objective.last_step": (o.skip_last is not None, "objective.skip_last is set"),
        "objective.train_steps": (bool(r.branch or o.levels), "rollout.branch or objective.levels decides the steps"),
        "objective.kl_every": (config.trains_kl or o.kl_images == 0, "the KL is trained, or measured on no image"),
        "rollout.branch_first": (not r.branch, "rollout.branch is 0"),
        "rollout.shared_noise": (r.branch > 0, "the images of a branch always share their first noise"),
        "objective.kl_images": (config.trains_kl, "the KL is trained and uses every image"),
        **{f"reward.{key}": (not config.reward.constraints, "reward.constraints is empty") for key in CONSTRAINTS},
        "optimizer.ema_every": (not config.optimizer.ema_decay, "optimizer.ema_decay is 0"),
        **{f"guard.{key}": (not g.every, "guard.every is 0") for key in GUARD_MEASURES},
        "guard.kl_start": (not g.kl_budget, "guard.kl_budget is 0"),
    }

    def changed(key: str) -> bool:
        section, name = key.split(".")
        return getattr(getattr(config, section), name) != getattr(getattr(defaults, section), name)

    found = [f"{key} has no effect, because {why}." for key, (is_idle, why) in idle.items() if is_idle and changed(key)]
    return [*found, *unscaled_credit(config)]


def unscaled_credit(config: Config) -> list[str]:
    """A sentence for a credit without the constant that makes it a weight."""
    o = config.objective
    if o.rescale_credit or not ALL_OBJECTIVES[o.name].replays_steps or o.credit in UNSCALED:
        return []
    return [
        f"objective.rescale_credit = false leaves credit = {o.credit} without its scale, which for proportionate "
        "credit is PCPO's zeta; of the credits without one, only guard_dt was published so."
    ]


def unknown_words(config: Config) -> list[str]:
    """A sentence if prompts of an embedded model contain words it was not trained on."""
    from comfyui_pcpo.tiny.captions import OBJECTS, SHAPE_NAMES, VOCABULARY
    from comfyui_pcpo.tiny.pipelines import EMBEDDED  # imports torch

    if config.model.name not in EMBEDDED:
        return []
    words = {word for line in config.prompts.collect() for word in re.findall(r"[a-z]+", line.lower())}
    unknown = sorted(words - set(VOCABULARY))
    known = f"Known objects: {', '.join((*OBJECTS, *SHAPE_NAMES))}."
    return [f"{config.model.name} was not trained on: {', '.join(unknown)}. {known}"] if unknown else []
