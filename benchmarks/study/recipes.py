"""Published recipes on the embedded models: sampler and advantage of each, and the prompts and rewards of the study."""

from dataclasses import dataclass

from .methods import Tree

STUDY_PROMPTS = ("a fox", "a panda", "a frog", "a rocket", "a house", "a butterfly", "a star", "a mushroom")
STUDY_REWARDS = ("colorfulness", "alignment", "polish", "jpeg_compressibility")


@dataclass(frozen=True)
class Recipe:
    """The sampler and the advantage of a published baseline, on an embedded model."""

    paper: str
    sampler: str
    model: str
    rollout: Tree
    advantage: Tree

    @property
    def title(self) -> str:
        return f"{self.paper}'s sampler ({self.sampler})"

    @property
    def kind(self) -> str:
        return "ddim" if self.rollout["method"] == "ddim" else "flow"


RECIPES = {
    "flow-grpo": Recipe(
        "Flow-GRPO",
        "flow_sde 0.7",
        "emoji-flow",
        {"method": "flow_sde", "noise_level": 0.7},
        {"kind": "group", "spread": "batch"},
    ),
    "dance-sde": Recipe(
        "DanceGRPO",
        "dance_sde 0.3, shared first noise",
        "emoji-flow",
        {"method": "dance_sde", "noise_level": 0.3, "shared_noise": True},
        {"kind": "group"},
    ),
    "dance-ddim": Recipe(
        "DanceGRPO",
        "ddim, eta 1, shared first noise",
        "emoji-eps",
        {"method": "ddim", "noise_level": 1.0, "shared_noise": True},
        {"kind": "group"},
    ),
    "ddpo": Recipe(
        "DDPO",
        "ddim, eta 1",
        "emoji-eps",
        {"method": "ddim", "noise_level": 1.0},
        {"kind": "window", "window": 32, "min_count": 16},
    ),
}
