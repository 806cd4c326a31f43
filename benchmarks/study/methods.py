"""The methods that are compared: each is an objective and what it changes in the rollout."""

from dataclasses import dataclass, field
from typing import Any

from comfyui_pcpo.method.credit import PUBLISHED

Tree = dict[str, Any]  # a section of the trainer's configuration


@dataclass(frozen=True)
class StudyMethod:
    """An objective and its changes to the recipe's rollout and to the optimizer."""

    title: str
    objective: Tree
    rollout: Tree = field(default_factory=dict)
    optimizer: Tree = field(default_factory=dict)
    model_kind: str = ""  # ddim or flow if the method exists for one of them only
    target_scale: float = 0.0  # target weight w* as a multiple of the smallest possible one; 0 leaves it automatic
    clips: bool = True  # whether the clip range has an effect


def published(name: str, objective: str = "ppo") -> Tree:
    """The objective section of a published weighting of steps."""
    how = PUBLISHED[name]
    weighting = {"form": how.form, "rescale_credit": how.rescaled, "loss_weight": how.loss_weight}
    return {"name": objective, "credit": how.credit, **weighting}


NO_NOISE: Tree = {"noise_level": 0.0, "shared_noise": False}
SHARED_OPTIONS: Tree = {"shared_noise": True, "levels": 4}  # V-GRPO: noise shared in a group, stratified levels
SLOW: Tree = {"ema_decay": 0.5, "ema_every": 2}  # DiffusionNFT's old policy, an average over updates

# tempflow and guard are the same credit (w s = |B|, see docs/paper.md), so only one of them is run. Guard divided by dt
# differs from it where dt is uneven: on flow grids, but not on ddim's.
# The paper's w* = 4.5 at 50 steps is 4.5 / 3.2748 of the smallest w* there; other step counts keep that proportion.
STUDY_METHODS = {
    "ppo": StudyMethod("native PPO", {"name": "ppo", "credit": "native"}),
    "log-hinge": StudyMethod("log-hinge only", {"name": "log_hinge", "credit": "native"}),
    "pcpo": StudyMethod("PCPO", published("pcpo", "log_hinge")),
    "pcpo-paper": StudyMethod(
        "PCPO, paper's sigma",
        published("pcpo", "log_hinge"),
        {"sigma": "paper"},
        model_kind="ddim",
        target_scale=4.5 / 3.2748,
    ),
    "pcpo-uniform": StudyMethod(
        "PCPO, uniform sigma",
        published("pcpo", "log_hinge"),
        {"sigma": "uniform"},
        model_kind="ddim",
        target_scale=1.0,
    ),
    **{
        f"pcpo-branch-{steps}": StudyMethod(
            f"PCPO, branch of {steps}", published("pcpo", "log_hinge"), {"branch": steps, "shared_noise": True}
        )
        for steps in (1, 2, 3)
    },
    "tempflow": StudyMethod("tempflow = guard", {"name": "ppo", "credit": "tempflow"}),
    "guard-dt": StudyMethod("guard / dt", {"name": "ppo", "credit": "guard_dt"}, model_kind="flow"),
    "tempflow-grpo": StudyMethod("TempFlow-GRPO", published("tempflow_grpo"), model_kind="flow"),
    "grpo-guard": StudyMethod("GRPO-Guard", published("grpo_guard"), model_kind="flow"),
    "awm": StudyMethod("AWM", {"name": "awm"}, NO_NOISE),
    "awm-options": StudyMethod(
        "AWM, new options", {"name": "awm", **SHARED_OPTIONS, "likelihood": "adaptive"}, NO_NOISE
    ),
    "nft": StudyMethod("DiffusionNFT", {"name": "nft"}, NO_NOISE, clips=False),
    "nft-options": StudyMethod(
        "DiffusionNFT, new options", {"name": "nft", **SHARED_OPTIONS}, {**NO_NOISE, "policy": "ema"}, SLOW, clips=False
    ),
    "window": StudyMethod(
        "native PPO, SDE window", {"name": "ppo", "credit": "native"}, {"sde_window": 3}, model_kind="flow"
    ),
    "pcpo-window": StudyMethod(
        "PCPO, SDE window", published("pcpo", "log_hinge"), {"sde_window": 3}, model_kind="flow"
    ),
    "cps": StudyMethod(
        "native PPO, cps",
        {"name": "ppo", "credit": "native"},
        {"method": "cps", "noise_level": 0.7},
        model_kind="flow",
    ),
    "pcpo-cps": StudyMethod(
        "PCPO, cps", published("pcpo", "log_hinge"), {"method": "cps", "noise_level": 0.7}, model_kind="flow"
    ),
}
BASELINE, OURS = "ppo", "pcpo"
CORE = ("ppo", "log-hinge", "pcpo", "pcpo-paper", "pcpo-uniform", "tempflow", "awm", "nft")
