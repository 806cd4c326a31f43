"""The methods that are compared: each is an objective and what it changes in the rollout."""

from dataclasses import dataclass, field
from typing import Any

Tree = dict[str, Any]  # a section of the trainer's configuration


@dataclass(frozen=True)
class StudyMethod:
    """An objective and its changes to the recipe's rollout."""

    title: str
    objective: Tree
    rollout: Tree = field(default_factory=dict)
    model_kind: str = ""  # ddim or flow if the method exists for one of them only
    target_scale: float = 0.0  # target weight w* as a multiple of the smallest possible one; 0 leaves it automatic
    clips: bool = True  # whether the clip range has an effect


# tempflow and guard are the same credit (w s = |B|, see docs/paper.md), so only one of them is run. Guard divided by dt
# differs from it where dt is uneven: on flow grids, but not on ddim's.
# The paper's w* = 4.5 at 50 steps is 4.5 / 3.2748 of the smallest w* there; other step counts keep that proportion.
STUDY_METHODS = {
    "ppo": StudyMethod("native PPO", {"name": "ppo", "credit": "native"}),
    "log-hinge": StudyMethod("log-hinge only", {"name": "log_hinge", "credit": "native"}),
    "pcpo": StudyMethod("PCPO", {"name": "log_hinge", "credit": "proportionate"}),
    "pcpo-paper": StudyMethod(
        "PCPO, paper's sigma",
        {"name": "log_hinge", "credit": "proportionate"},
        {"sigma": "paper"},
        "ddim",
        4.5 / 3.2748,
    ),
    "pcpo-uniform": StudyMethod(
        "PCPO, uniform sigma", {"name": "log_hinge", "credit": "proportionate"}, {"sigma": "uniform"}, "ddim", 1.0
    ),
    "tempflow": StudyMethod("tempflow = guard", {"name": "ppo", "credit": "tempflow"}),
    "guard-dt": StudyMethod("guard / dt", {"name": "ppo", "credit": "guard_dt"}, model_kind="flow"),
    "awm": StudyMethod("AWM", {"name": "awm"}, {"noise_level": 0.0, "shared_noise": False}),
    "nft": StudyMethod("DiffusionNFT", {"name": "nft"}, {"noise_level": 0.0, "shared_noise": False}, clips=False),
    "window": StudyMethod("native PPO, SDE window", {"name": "ppo", "credit": "native"}, {"sde_window": 3}, "flow"),
    "pcpo-window": StudyMethod(
        "PCPO, SDE window", {"name": "log_hinge", "credit": "proportionate"}, {"sde_window": 3}, "flow"
    ),
    "cps": StudyMethod(
        "native PPO, cps", {"name": "ppo", "credit": "native"}, {"method": "cps", "noise_level": 0.7}, "flow"
    ),
    "pcpo-cps": StudyMethod(
        "PCPO, cps", {"name": "log_hinge", "credit": "proportionate"}, {"method": "cps", "noise_level": 0.7}, "flow"
    ),
}
BASELINE, OURS = "ppo", "pcpo"
CORE = ("ppo", "log-hinge", "pcpo", "pcpo-paper", "pcpo-uniform", "tempflow", "awm", "nft")
