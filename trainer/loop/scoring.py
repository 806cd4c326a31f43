"""From images to advantages: every reward scores, failures are counted, rewards are combined and compared."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comfyui_pcpo.method.advantage import AdvantageRule, failed_share, score_groups
from comfyui_pcpo.reward.base import Reward, on_its_device

from ..config.schema import Config
from .plan import Plan
from .state import TrainingState


class RunError(RuntimeError):
    """A run that cannot continue; the message gives the reason and the fix."""


@dataclass
class Stopwatch:
    """Seconds spent by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        return {name: round(seconds, 4) for name, seconds in self.seconds.items()}


@dataclass(frozen=True)
class ImageGroups:
    """Images (B, H, W, 3), group after group, the prompt of each (B,), and the number of images per group."""

    images: Tensor
    prompts: list[str]
    group_size: int


def score(
    rewards: dict[str, Reward],
    groups: ImageGroups,
    stopwatch: Stopwatch | None = None,
    offload: bool = True,
) -> dict[str, Tensor]:
    """Every reward of every image, name -> (B,); each reward's seconds go to the stopwatch."""
    stopwatch, scores = stopwatch or Stopwatch(), {}
    for name, reward in rewards.items():
        with stopwatch(name), on_its_device(reward, offload):
            scores[name] = reward.score(groups.images, groups.prompts, groups.group_size).float().cpu()
    return scores


def unattended(rewards: dict[str, Reward]) -> dict[str, Reward]:
    """The rewards for measurements beside the training, when nobody is to be asked."""
    return {name: reward.unattended() for name, reward in rewards.items()}


@dataclass
class ScoredRollout:
    """The rewards of one update's images, those of every process."""

    scores: dict[str, Tensor]  # name -> (P * G,)
    combined: Tensor  # (P, G) what is trained on
    advantage: Tensor  # (P, G)
    seconds: Stopwatch  # of each reward
    weights: dict[str, float]  # of the trained rewards and the constraints


def compare_scores(
    scores: dict[str, Tensor], plan: Plan, state: TrainingState, config: Config, seconds: Stopwatch
) -> ScoredRollout:
    """Scores of all groups, name -> (P * G,) -> ScoredRollout; the state's window and constraints take them in."""
    constraints, a = state.constraints, config.advantage
    weights = config.reward.weights_at(plan.number) | {name: c.weight for name, c in constraints.items()}
    rule = AdvantageRule(a.kind, a.spread, config.reward.standardise, a.clip)
    stacked = torch.stack([scores[name].view(-1, plan.group_size) for name in weights])
    groups = score_groups(stacked, list(weights.values()), rule, [str(prompt) for prompt in plan.prompts], state.window)
    for name, constraint in constraints.items():
        constraint.observe(scores[name])
    return ScoredRollout(scores, groups.combined, groups.advantage, seconds, weights)


def check_failures(scores: dict[str, Tensor], rewards: dict[str, Reward], config: Config, number: int) -> None:
    """Raise RunError when more scores of a trained reward failed than the run allows, or all of them."""
    trained, allowed = (*config.reward.weights, *config.reward.constraints), config.reward.max_failed
    for name in trained:
        share = failed_share(scores[name])
        if share > allowed or share == 1:
            rule = f"more than reward.max_failed = {allowed:g} allows" if share > allowed else "so none can be compared"
            failed = f"{100 * share:.0f} % of the {name} scores failed ({rewards[name].failure_reason})"
            raise RunError(f"update {number}: {failed}, {rule}. Fix the reward.")
    complete = torch.stack([scores[name].isfinite() for name in trained])
    if not complete.all(0).any():
        failed = [name for name in trained if not scores[name].isfinite().all()]
        raise RunError(
            f"update {number}: every image has a failed score from one of {', '.join(failed)}, so no images can be "
            "compared. Fix the rewards."
        )
