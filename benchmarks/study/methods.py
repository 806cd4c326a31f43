"""The methods that are compared: each is an objective and what it changes in the rollout."""

from dataclasses import dataclass, field, replace
from typing import Any

from comfyui_pcpo.method.credit import PUBLISHED
from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES

Tree = dict[str, Any]  # a section of the trainer's configuration
CLIP_RANGE = 1e-3  # of every method that clips: the trainer's default, wider than 1e-4 because the latents are small


@dataclass(frozen=True)
class StudyMethod:
    """An objective and its changes to the recipe's rollout and to the optimizer."""

    title: str
    objective: Tree
    rollout: Tree = field(default_factory=dict)
    optimizer: Tree = field(default_factory=dict)
    model_kind: str = ""  # ddim or flow if the method exists for one of them only
    first_share: float = 1.0  # share of the denoising steps that is trained, the noisiest ones

    @property
    def clips(self) -> bool:
        """Whether the objective has a clip range."""
        return "clip_range" not in ALL_OBJECTIVES[self.objective["name"]].ignores


def published(name: str, objective: str = "ppo") -> Tree:
    """The objective section of a published weighting of steps."""
    how = PUBLISHED[name]
    weighting = {"form": how.form, "rescale_credit": how.rescaled, "loss_weight": how.loss_weight}
    return {"name": objective, "credit": how.credit, **weighting}


def branched(method: StudyMethod, steps: int, title: str = "") -> StudyMethod:
    """The method with branching rollouts of `steps` stochastic steps, which its title names unless another is given."""
    rollout = {**method.rollout, "branch": steps, "shared_noise": True}
    return replace(method, title=title or f"{method.title}, branch of {steps}", rollout=rollout)


NO_NOISE: Tree = {"noise_level": 0.0, "shared_noise": False}
SHARED_OPTIONS: Tree = {"shared_noise": True, "levels": 4}  # V-GRPO: noise shared in a group, stratified levels
SLOW: Tree = {"ema_decay": 0.5, "ema_every": 2}  # DiffusionNFT's old policy, an average over updates
PCPO = StudyMethod("PCPO", published("pcpo", "log_hinge"))
TEMPFLOW = StudyMethod("TempFlow-GRPO", published("tempflow_grpo"), model_kind="flow")
PPO = StudyMethod("native PPO", {"name": "ppo", "credit": "native"})
NATIVE: Tree = {"name": "log_hinge", "credit": "native"}
# what branches save is spent on larger groups
RECOMMENDED = branched(replace(PCPO, rollout={"branch_first": 3, "group_size": 16}), 1, "PCPO, early branch")

# one objective, the log-hinge, under every credit; the last step is never trained, as in all published recipes
CREDIT_METHODS = {
    "native": StudyMethod("native", NATIVE),
    "proportionate": replace(PCPO, title="proportionate"),
    # on ddim's even grid the same as proportionate
    "uniform": StudyMethod("uniform", {"name": "log_hinge", "credit": "uniform"}, model_kind="flow"),
    "first-steps": StudyMethod("native, first 40 % of the steps", NATIVE, first_share=0.4),  # RSM: 4 of 10
    "early": StudyMethod("native, one step less", {**NATIVE, "skip_last": 2}),
}

STUDY_METHODS = {
    "ppo": PPO,
    "ppo-branch-1": branched(PPO, 1),
    "ppo-early": StudyMethod("native PPO, one step less", {"name": "ppo", "credit": "native", "skip_last": 2}),
    "pcpo": PCPO,
    **{f"pcpo-branch-{steps}": branched(PCPO, steps) for steps in (1, 2, 3)},
    "pcpo-recommended": RECOMMENDED,
    "tempflow-grpo": branched(TEMPFLOW, 1, TEMPFLOW.title),
    "grpo-guard": StudyMethod("GRPO-Guard", published("grpo_guard"), model_kind="flow"),
    "nft": StudyMethod("DiffusionNFT", {"name": "nft"}, NO_NOISE),
    "nft-options": StudyMethod(
        "DiffusionNFT with options", {"name": "nft", **SHARED_OPTIONS}, {**NO_NOISE, "policy": "ema"}, SLOW
    ),
    "awm": StudyMethod("AWM", {"name": "awm"}, NO_NOISE),
    "awm-options": StudyMethod(
        "AWM with options", {"name": "awm", **SHARED_OPTIONS, "likelihood": "adaptive"}, NO_NOISE
    ),
    **CREDIT_METHODS,
    **{f"{name}-branch-1": branched(method, 1) for name, method in CREDIT_METHODS.items()},
}
OURS = "pcpo"
