"""Published recipes on the embedded models: the sampler and advantage of each, prompts and rewards of the studies."""

from dataclasses import dataclass

from trainer.evaluation.demo import DEMO_PROMPTS

from .methods import Tree

STUDY_PROMPTS = ("a fox", "a panda", "a frog", "a rocket", "a house", "a butterfly", "a star", "a mushroom")
STUDY_REWARDS = ("colorfulness", "alignment", "polish", "jpeg_compressibility", "redness", "tinyeval")  # evaluated
FOLLOWING = "tinyeval"  # the reward of following the prompt
HACKED = ("colorfulness", "redness", "jpeg_compressibility")  # rewards that any flat or loud image satisfies


def training_prompts(reward: str) -> tuple[str, ...]:
    """Combinations of several things for the reward of following the prompt, single objects for the others.

    Neither has a combination that TinyEval holds out.
    """
    return DEMO_PROMPTS if reward == FOLLOWING else STUDY_PROMPTS


@dataclass(frozen=True)
class Recipe:
    """The sampler and the advantage of a published baseline, on an embedded model."""

    paper: str
    sampler: str
    model: str
    rollout: Tree
    advantage: Tree
    train_steps: float = 1.0  # random share of the denoising steps that an update trains, unless it branches

    @property
    def title(self) -> str:
        return f"{self.paper}'s sampler ({self.sampler})"

    @property
    def kind(self) -> str:
        return "ddim" if self.rollout["method"] == "ddim" else "flow"


DANCE_DDIM: Tree = {"method": "ddim", "noise_level": 1.0, "shared_noise": True}

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
    "dance-ddim": Recipe("DanceGRPO", "ddim, eta 1, shared first noise", "emoji-eps", DANCE_DDIM, {"kind": "group"}),
    "dance-ddim-50": Recipe(
        "DanceGRPO",
        "ddim, eta 1, 50 steps, shared first noise",
        "emoji-eps",
        {**DANCE_DDIM, "steps": 50},
        {"kind": "group"},
        train_steps=0.2,
    ),
}
