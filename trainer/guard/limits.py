"""What the guard decides, from its rows in metrics.jsonl alone, so that a resumed run decides the same."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.metrics.frechet import diversity

from ..config.schema import Config, GuardConfig, RewardConfig
from .probe import ImageMeasures

LEAST = 1e-8  # denominators of losses


@dataclass(frozen=True)
class GuardVerdict:
    """The state of a guarded run after its last measurement."""

    kept: int | None = None  # update of the best measurement within the limits
    reward: float = -math.inf  # of that update
    violations: int = 0  # successive measurements beyond the limits
    reason: str | None = None  # what the last one violates


def guard_row(now: ImageMeasures, base: ImageMeasures, config: Config) -> dict[str, Any]:
    """One measurement: the trained reward, held-out rewards, diversity, distance, and what was lost."""
    group, held_out = config.guard.images, config.reward.held_out
    variety, base_variety = diversity(now.features, group), diversity(base.features, group)
    lost = {name: lost_deviations(now.scores[name], base.scores[name]) for name in held_out}
    return {
        "reward": trained_reward(now, base, config.reward),
        "held_out": {name: valid_mean(now.scores[name]) for name in held_out},
        "diversity": variety,
        "distance": float((1 - F.cosine_similarity(now.features.double(), base.features.double())).mean()),
        "lost": {**lost, "diversity": (base_variety - variety) / max(base_variety, LEAST)},
    }


def trained_reward(now: ImageMeasures, base: ImageMeasures, reward: RewardConfig) -> float:
    """What updates are ranked by: the weighted sum of the trained rewards' means.

    Where training standardises several, their gains over the base model are summed in standard deviations of its
    scores; otherwise the reward with the largest unit would decide alone.
    """
    weights = reward.last_weights
    if not reward.standardises:
        return sum(weight * valid_mean(now.scores[name]) for name, weight in weights.items())
    return -sum(weight * lost_deviations(now.scores[name], base.scores[name]) for name, weight in weights.items())


def lost_deviations(now: Tensor, base: Tensor) -> float:
    """How far the mean score fell, in standard deviations of the base model's scores.

    Where those are all equal, as of a reward that counts right images and finds only such, the deviation of the scores
    now takes their place, and where these are all equal too, that of both together: no loss is infinite.
    """
    base, now = base[base.isfinite()], now[now.isfinite()]
    deviations = (float(scores.std(correction=0)) for scores in (base, now, torch.cat([base, now])))
    deviation = next((one for one in deviations if one > LEAST), 1.0)
    return (valid_mean(base) - valid_mean(now)) / deviation


def valid_mean(values: Tensor) -> float:
    """Mean of the scores that did not fail; NaN where all did."""
    return float(values[values.isfinite()].mean())


def next_verdict(before: GuardVerdict, row: dict[str, Any], number: int, guard: GuardConfig) -> GuardVerdict:
    """The verdict after one more measurement, that of update `number`."""
    reason = violation(row["lost"], guard)
    if reason is not None:
        return GuardVerdict(before.kept, before.reward, before.violations + 1, reason)
    reward = -math.inf if row["reward"] is None else row["reward"]
    if reward > before.reward:
        return GuardVerdict(number, reward)
    return GuardVerdict(before.kept, before.reward)


def replay(
    records: Sequence[dict[str, Any]], guard: GuardConfig, saved: Container[int], probe: str | None = None
) -> GuardVerdict:
    """The verdict after all recorded measurements; of the updates, only those with a `saved` checkpoint can be kept.

    An update that the limits of its time excluded was not saved, and one that a later update surpassed may be pruned.
    `probe` is the digest of what measures from now on.
    """
    verdict, last = GuardVerdict(), None
    for record in records:
        if "guard" in record:
            row = record["guard"]
            verdict, last = renewed(verdict, last, row.get("probe")), row.get("probe")
            after = next_verdict(verdict, row, record["update"], guard)
            lacking = after.kept is not None and after.kept not in saved
            verdict = replace(after, kept=verdict.kept, reward=verdict.reward) if lacking else after
    return renewed(verdict, last, probe)


def renewed(verdict: GuardVerdict, before: str | None, now: str | None) -> GuardVerdict:
    """The verdict when another probe takes over: rewards and violations count anew.

    The kept update stays until another one is kept. Older rows name no probe and count as those of the next one.
    """
    return verdict if before == now or None in (before, now) else GuardVerdict(verdict.kept)


def violation(lost: dict[str, float | None], guard: GuardConfig) -> str | None:
    """Why a measurement is beyond the limits, with all that it exceeds; None where it is within them."""
    return "; ".join(reason for name, amount in lost.items() if (reason := _excess(name, amount, guard))) or None


def _excess(name: str, amount: float | None, guard: GuardConfig) -> str | None:
    if amount is None or math.isnan(amount):  # JSON has null for NaN
        return f"{name} could not be measured: it failed on every image"
    if name == "diversity":
        option, limit = "diversity_tolerance", guard.diversity_tolerance
        loss, allowed = f"{100 * amount:.0f} %", f"{100 * limit:g} %"
    else:
        option, limit = "tolerance", guard.tolerance
        loss, allowed = f"{amount:.2f} standard deviations", f"{limit:g}"
    if amount <= limit:
        return None
    return f"{name} lost {loss} against the base model, more than the {allowed} that guard.{option} allows"
