"""The studies by size: which tasks, methods, settings and seeds each of them runs."""

from dataclasses import dataclass, field
from itertools import product

from .methods import CORE, STUDY_METHODS
from .recipes import RECIPES, STUDY_REWARDS

Setting = tuple[float, float]  # learning rate, clip range


@dataclass(frozen=True)
class Study:
    """How much is run. Tasks are pairs of recipe and reward, in the order in which they are run."""

    tasks: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    sweep: dict[str, tuple[Setting, ...]]  # by kind of model: the settings that every method is tuned over
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts_per_update: int
    group_size: int
    steps: int
    updates: int
    evaluate_every: int  # updates between evaluations
    images_per_prompt: int  # of an evaluation
    reference_images: int  # that the Frechet distance is computed against
    skips: tuple[tuple[str, str], ...] = ()  # pairs of recipe and method that are left out
    common: dict[str, Setting] = field(default_factory=dict)  # by recipe: one setting of the sweep for all methods
    tuned_as: dict[str, str] = field(default_factory=dict)  # recipes that reuse the settings chosen for another one
    fresh_seeds: tuple[int, ...] = ()  # for PCPO and its baseline at the common setting once more

    @property
    def images_per_update(self) -> int:
        return self.prompts_per_update * self.group_size


STUDIES = {
    "quick": Study(
        tasks=(("flow-grpo", "colorfulness"), ("dance-ddim", "colorfulness")),
        methods=("ppo", "log-hinge", "pcpo"),
        sweep={"flow": ((6e-3, 1e-3),), "ddim": ((3e-3, 1e-3),)},
        tuning_seeds=(),
        seeds=(0, 1),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=8,
        evaluate_every=4,
        images_per_prompt=4,
        reference_images=64,
    ),
    "evaluations": Study(  # reward gained per model evaluation, at one setting for all methods
        tasks=(
            ("flow-grpo", "colorfulness"),
            ("flow-grpo", "alignment"),
            ("dance-ddim", "colorfulness"),
            ("dance-ddim", "alignment"),
        ),
        methods=(
            *("ppo", "pcpo", "pcpo-branch-1", "pcpo-branch-2", "pcpo-branch-3"),
            *("nft", "nft-options", "awm", "awm-options"),
        ),
        sweep={"flow": ((5e-3, 5e-3),), "ddim": ((2e-3, 5e-3),)},
        tuning_seeds=(),
        seeds=(20, 21, 22),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=20,
        evaluate_every=5,
        images_per_prompt=8,
        reference_images=256,
    ),
    "medium": Study(
        tasks=(
            ("flow-grpo", "colorfulness"),
            ("flow-grpo", "alignment"),
            ("flow-grpo", "polish"),
            ("dance-ddim", "colorfulness"),
            ("dance-sde", "jpeg_compressibility"),
            ("ddpo", "colorfulness"),
        ),
        methods=CORE,
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
        evaluate_every=4,
        images_per_prompt=8,
        reference_images=256,
        skips=(("ddpo", "pcpo-paper"), ("ddpo", "pcpo-uniform")),
        common={"flow-grpo": (5e-3, 5e-3)},
        tuned_as={"ddpo": "dance-ddim"},
        fresh_seeds=(5, 6, 7, 8, 9),
    ),
    "full": Study(
        tasks=tuple((recipe, reward) for reward in STUDY_REWARDS for recipe in RECIPES),
        methods=tuple(STUDY_METHODS),
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
        evaluate_every=5,
        images_per_prompt=16,
        reference_images=512,
    ),
}
