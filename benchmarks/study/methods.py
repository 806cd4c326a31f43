"""Who competes, on which published recipe, and at which size: everything is a setting of the trainer's one loop."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

Tree = dict[str, Any]
Setting = tuple[float, float]  # learning rate, clip range
PROMPTS = ("a fox", "a panda", "a frog", "a rocket", "a house", "a butterfly", "a star", "a mushroom")


@dataclass(frozen=True)
class Recipe:
    """The sampler and the advantage of a published baseline, on an embedded model."""

    title: str
    model: str
    rollout: Tree
    advantage: Tree

    @property
    def kind(self) -> str:
        return "ddim" if self.rollout["method"] == "ddim" else "flow"


RECIPES = {
    "flow-grpo": Recipe(
        "Flow-GRPO: flow_sde 0.7, std of the batch",
        "emoji-flow",
        {"method": "flow_sde", "noise_level": 0.7},
        {"kind": "group", "spread": "batch"},
    ),
    "dance-sde": Recipe(
        "DanceGRPO: dance_sde 0.3, shared first noise",
        "emoji-flow",
        {"method": "dance_sde", "noise_level": 0.3, "shared_noise": True},
        {"kind": "group"},
    ),
    "dance-ddim": Recipe(
        "DanceGRPO: ddim eta 1, shared first noise",
        "emoji-eps",
        {"method": "ddim", "noise_level": 1.0, "shared_noise": True},
        {"kind": "group"},
    ),
    "ddpo": Recipe(
        "DDPO: ddim eta 1, window per prompt",
        "emoji-eps",
        {"method": "ddim", "noise_level": 1.0},
        {"kind": "window", "window": 32, "min_count": 16},
    ),
}


@dataclass(frozen=True)
class Contender:
    """An objective and what it changes in the rollout; `aim` x the smallest possible w* is its target weight."""

    title: str
    objective: Tree
    rollout: Tree = field(default_factory=dict)
    kind: str = ""  # ddim or flow where it exists for one only
    aim: float = 0.0
    clips: bool = True  # whether the clip range matters to it


# tempflow and guard are one credit (w s = |B|, see docs/paper.md), so one of them competes. Guard divided by dt differs
# from it where dt is uneven: on flow grids, not on ddim's.
# The paper's w* = 4.5 at 50 steps is 4.5 / 3.2748 of the smallest w* there; other step counts keep that proportion.
CONTENDERS = {
    "ppo": Contender("native PPO", {"name": "ppo", "credit": "native"}),
    "log-hinge": Contender("log-hinge only", {"name": "log_hinge", "credit": "native"}),
    "pcpo": Contender("PCPO", {"name": "log_hinge", "credit": "proportionate"}),
    "pcpo-paper": Contender(
        "PCPO, paper's sigma",
        {"name": "log_hinge", "credit": "proportionate"},
        {"sigma": "paper"},
        "ddim",
        4.5 / 3.2748,
    ),
    "pcpo-uniform": Contender(
        "PCPO, uniform sigma", {"name": "log_hinge", "credit": "proportionate"}, {"sigma": "uniform"}, "ddim", 1.0
    ),
    "tempflow": Contender("tempflow = guard", {"name": "ppo", "credit": "tempflow"}),
    "guard-dt": Contender("guard / dt", {"name": "ppo", "credit": "guard_dt"}, kind="flow"),
    "awm": Contender("AWM", {"name": "awm"}, {"noise_level": 0.0, "shared_noise": False}),
    "nft": Contender("DiffusionNFT", {"name": "nft"}, {"noise_level": 0.0, "shared_noise": False}, clips=False),
    "window": Contender("native PPO, SDE window", {"name": "ppo", "credit": "native"}, {"sde_window": 3}, "flow"),
    "pcpo-window": Contender(
        "PCPO, SDE window", {"name": "log_hinge", "credit": "proportionate"}, {"sde_window": 3}, "flow"
    ),
    "cps": Contender(
        "native PPO, cps", {"name": "ppo", "credit": "native"}, {"method": "cps", "noise_level": 0.7}, "flow"
    ),
    "pcpo-cps": Contender(
        "PCPO, cps", {"name": "log_hinge", "credit": "proportionate"}, {"method": "cps", "noise_level": 0.7}, "flow"
    ),
}
BASELINE, OURS = "ppo", "pcpo"
CORE = ("ppo", "log-hinge", "pcpo", "pcpo-paper", "pcpo-uniform", "tempflow", "awm", "nft")


@dataclass(frozen=True)
class Form:
    """How much is run. Tasks are pairs of recipe and reward, in the order in which they are done."""

    tasks: tuple[tuple[str, str], ...]
    contenders: tuple[str, ...]
    sweep: dict[str, tuple[Setting, ...]]  # by kind of model: what every contender chooses from
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts_per_update: int
    group_size: int
    steps: int
    updates: int
    every: int  # updates between evaluations
    each: int  # pictures per prompt of an evaluation
    reference: int  # pictures that the Frechet distance is taken to
    skips: tuple[tuple[str, str], ...] = ()  # pairs of recipe and contender that are left out
    common: dict[str, Setting] = field(default_factory=dict)  # by recipe: one of the sweep for all contenders
    tuned_as: dict[str, str] = field(default_factory=dict)  # recipes that take the settings chosen for another one
    fresh_seeds: tuple[int, ...] = ()  # for PCPO and its baseline at that setting once more

    @property
    def images_per_update(self) -> int:
        return self.prompts_per_update * self.group_size


REWARDS = ("colorfulness", "alignment", "polish", "jpeg_compressibility")
FORMS = {
    "quick": Form(
        tasks=(("flow-grpo", "colorfulness"), ("dance-ddim", "colorfulness")),
        contenders=("ppo", "log-hinge", "pcpo"),
        sweep={"flow": ((6e-3, 1e-3),), "ddim": ((3e-3, 1e-3),)},
        tuning_seeds=(),
        seeds=(0, 1),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=8,
        every=4,
        each=4,
        reference=64,
    ),
    "medium": Form(
        tasks=(
            ("flow-grpo", "colorfulness"),
            ("flow-grpo", "alignment"),
            ("flow-grpo", "polish"),
            ("dance-ddim", "colorfulness"),
            ("dance-sde", "jpeg_compressibility"),
            ("ddpo", "colorfulness"),
        ),
        contenders=CORE,
        sweep={
            "flow": ((5e-3, 1e-3), (5e-3, 5e-3), (1.2e-2, 5e-3)),
            "ddim": ((2e-3, 5e-3), (5e-3, 5e-3), (2e-3, 1e-3)),
        },
        tuning_seeds=(100,),
        seeds=(0, 1, 2, 3, 4),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=20,
        every=4,
        each=8,
        reference=256,
        skips=(("ddpo", "pcpo-paper"), ("ddpo", "pcpo-uniform")),
        common={"flow-grpo": (5e-3, 5e-3)},
        tuned_as={"ddpo": "dance-ddim"},
        fresh_seeds=(5, 6, 7, 8, 9),
    ),
    "full": Form(
        tasks=tuple((recipe, reward) for reward in REWARDS for recipe in RECIPES),
        contenders=tuple(CONTENDERS),
        sweep={
            "flow": tuple(product((2e-3, 5e-3, 1.2e-2), (1e-3, 5e-3, 2e-2))),
            "ddim": tuple(product((1e-3, 2e-3, 5e-3), (1e-3, 5e-3, 2e-2))),
        },
        common={"flow-grpo": (5e-3, 5e-3), "dance-sde": (5e-3, 5e-3), "dance-ddim": (2e-3, 5e-3), "ddpo": (2e-3, 5e-3)},
        fresh_seeds=(8, 9, 10, 11, 12, 13, 14, 15),
        tuning_seeds=(100, 101, 102),
        seeds=(0, 1, 2, 3, 4, 5, 6, 7),
        prompts_per_update=4,
        group_size=8,
        steps=10,
        updates=60,
        every=5,
        each=16,
        reference=512,
    ),
}
