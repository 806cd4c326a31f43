"""The studies by question: which tasks, methods, settings and seeds each of them runs."""

from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from .methods import CREDIT_METHODS, Tree
from .recipes import HACKED


@dataclass(frozen=True)
class Setting:
    """What is tuned of a method; everything else of it is fixed."""

    learning_rate: float
    kl_weight: float = 0.0

    @property
    def name(self) -> str:
        return f"lr{self.learning_rate:g}-kl{self.kl_weight:g}"

    @property
    def title(self) -> str:
        return f"{self.learning_rate:g}, {self.kl_weight:g}"


class Beyond(NamedTuple):
    """The next values beyond a sweep, tried where a method's best settings lie on its edge.

    KL weights after the first are tried where even the choice has the largest one.
    """

    lower_rate: float
    higher_rate: float
    kl_weights: tuple[float, ...]


class Rung(NamedTuple):
    """A tuning seed, and how many of a method's settings are run on it: the best ones on the seeds before."""

    seed: int
    settings: int | None = None  # None: the whole sweep


@dataclass(frozen=True)
class Study:
    """How much is run. Tasks are pairs of recipe and reward, in the order in which they are run."""

    tasks: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    sweep: dict[str, tuple[Setting, ...]]  # by kind of model: the settings that every method is tuned over
    seeds: tuple[int, ...]
    prompts_per_update: int
    group_size: int
    steps: int  # of a rollout, unless the recipe has its own, and of an evaluation
    updates: int
    evaluate_every: int  # updates between evaluations; a run of more or fewer updates has as many evaluations
    images: int  # of the training prompts, in an evaluation
    reference_images: int  # that the Frechet distance is computed against
    tinyeval_prompts: int = 20  # of each of TinyEval's hard tasks, in an evaluation of a reported run; 0: none
    later: tuple[str, ...] = ()  # methods that are run once the others are finished in every task
    tuning: tuple[Rung, ...] = ()  # empty: the first setting of the sweep
    tuned_once: tuple[str, ...] = ()  # recipes whose runs are long: the first tuning seed alone chooses
    beyond: dict[str, Beyond] = field(default_factory=dict)  # by kind of model
    budgets: dict[str, int] = field(default_factory=dict)  # reward -> model evaluations of a run, in place of `updates`
    baseline: str = "ppo"  # that the others are compared with
    guard: Tree = field(default_factory=dict)  # the configuration's section
    held_out: tuple[str, ...] = ()  # rewards that the guard watches

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        return tuple(rung.seed for rung in self.tuning)

    def reads_tinyeval(self, seed: int) -> bool:
        """Whether the evaluations of a seed's runs have images of prompts that are never trained."""
        return self.tinyeval_prompts > 0 and seed not in self.tuning_seeds

    @property
    def evaluations(self) -> int:
        """Evaluations of a run after the one before its first update."""
        return -(-self.updates // self.evaluate_every)

    @property
    def waves(self) -> tuple[tuple[str, ...], ...]:
        """The methods in the order in which they are run."""
        return tuple(methods for methods in (self.methods, self.later) if methods)

    @property
    def every_method(self) -> tuple[str, ...]:
        return (*self.methods, *self.later)


def settings(learning_rates: tuple[float, ...], kl_weights: tuple[float, ...] = (0.0,)) -> tuple[Setting, ...]:
    return tuple(Setting(*pair) for pair in product(learning_rates, kl_weights))


DDIM_RATES = (6e-4, 2e-3, 6e-3)
SWEEPS = {  # coarser for ddim, whose runs take longer: on flow, which was run first, the highest rate was never chosen
    "flow": settings((1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.03, 0.3)),
    "ddim": settings(DDIM_RATES, (0.0, 0.1)),
}
RATES = {"flow": settings((1e-3, 3e-3, 1e-2)), "ddim": settings(DDIM_RATES)}
LARGER_KL = {"flow": (3.0, 30.0, 300.0), "ddim": (1.0, 10.0, 100.0)}
BEYOND_SWEEPS = {"flow": Beyond(3e-4, 1e-1, LARGER_KL["flow"]), "ddim": Beyond(2e-4, 2e-2, LARGER_KL["ddim"])}
BEYOND_RATES = {**BEYOND_SWEEPS, "flow": Beyond(3e-4, 3e-2, ())}

STUDIES = {
    "quick": Study(
        tasks=(("flow-grpo", "colorfulness"), ("dance-ddim", "colorfulness")),
        methods=("ppo", "pcpo", "pcpo-branch-1"),
        sweep={"flow": (Setting(6e-3),), "ddim": (Setting(3e-3),)},
        seeds=(0, 1),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=8,
        evaluate_every=4,
        images=32,
        reference_images=64,
    ),
    "frontier": Study(  # who gains most at the same price, and who follows prompts better
        tasks=(
            ("flow-grpo", "colorfulness"),
            ("flow-grpo", "tinyeval"),
            ("dance-ddim", "colorfulness"),
            ("dance-ddim", "tinyeval"),
        ),
        methods=("ppo", "pcpo", "pcpo-branch-1", "pcpo-branch-2", "pcpo-recommended", "nft"),
        later=(
            *("ppo-branch-1", "ppo-early", "pcpo-branch-3", "tempflow-grpo", "grpo-guard"),
            *("nft-options", "awm", "awm-options"),
        ),
        sweep=SWEEPS,
        tuning=(Rung(100), Rung(101, 2), Rung(102, 2)),
        beyond=BEYOND_SWEEPS,
        # colorfulness takes the fastest methods to their limits within the updates; following prompts takes longer
        budgets={"tinyeval": 6000},
        seeds=(0, 1, 2, 3, 4),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=16,
        evaluate_every=4,
        images=64,
        reference_images=256,
    ),
    "proportionality": Study(  # whether credit in proportion to time is what helps
        tasks=(
            ("flow-grpo", "colorfulness"),
            ("dance-sde", "colorfulness"),
            ("dance-ddim", "colorfulness"),
            ("dance-ddim-50", "colorfulness"),
        ),
        methods=tuple(CREDIT_METHODS),
        later=tuple(f"{name}-branch-1" for name in CREDIT_METHODS),
        sweep=RATES,
        tuning=(Rung(100), Rung(101, 2), Rung(102, 2)),
        tuned_once=("dance-ddim-50",),
        beyond=BEYOND_RATES,
        baseline="native",
        seeds=(0, 1, 2, 3, 4),
        prompts_per_update=2,
        group_size=8,
        steps=10,
        updates=16,
        evaluate_every=4,
        images=64,
        reference_images=256,
        tinyeval_prompts=0,
    ),
    "guard": Study(  # whether the guard stays within its limits, on rewards that are easily hacked
        tasks=tuple(("flow-grpo", reward) for reward in HACKED),
        methods=("pcpo-branch-1", "nft"),
        sweep={"flow": (Setting(1e-3),)},
        baseline="pcpo-branch-1",
        seeds=(0, 1, 2, 3, 4),
        prompts_per_update=2,
        group_size=8,
        steps=8,
        updates=60,
        evaluate_every=5,
        images=64,
        reference_images=256,
        guard={"every": 5, "action": "warn"},  # what it would have stopped is recorded; the run goes on without it
        held_out=("tinyeval", "polish"),
    ),
}
