"""THE loop: plan, sample, score, compare, take gradient steps, record."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from comfyui_pcpo.method.adaptive_kl import adapted_kl_weight
from comfyui_pcpo.method.branching import branch_rollout
from comfyui_pcpo.method.forward_process import predicted_x0, scales
from comfyui_pcpo.method.rollout import GroupNoise, Predict, Trajectory, rollout, rollout_chunks
from comfyui_pcpo.reward.base import Reward

from ..config.schema import Config
from ..memory.transfer import upload
from ..policy.base import Condition, Progress, no_progress
from .distributed import Processes
from .finite import check_rollout
from .interrupts import interrupts
from .objectives import Objective, make_objective
from .overlap import Overlap, overlapping
from .plan import Plan, make_plan
from .records import Measured, record
from .scoring import ImageGroups, ScoredRollout, Stopwatch, check_failures, compare_scores, score
from .state import TrainingState
from .update import UpdateBatch, improve


class UpdateGuard(Protocol):
    """What the loop asks of a guard (trainer/guard)."""

    @property
    def stopped(self) -> bool:
        """Whether the run has to end."""
        ...

    def check(self, state: TrainingState, number: int) -> dict[str, Any]:
        """The metrics that it adds to a finished update."""
        ...


@dataclass(frozen=True)
class Job:
    """Inputs of a run: configuration, prompts, rewards."""

    config: Config
    prompts: Sequence[str]
    rewards: dict[str, Reward]  # the trained and the held-out ones, by name
    processes: Processes = field(default_factory=Processes)
    tick: Callable[[], None] = lambda: None  # called before every model call; may raise
    waiting: Callable[[], None] = lambda: None  # the same, several times a second while rewards elsewhere score
    guard: UpdateGuard | None = None
    encoding: Progress = no_progress  # over the prompts
    content: str | None = None  # of a model that a host has loaded: what tells it from others of its kind

    @cached_property
    def objective(self) -> Objective:
        return make_objective(self.config)

    def overlap(self, plan: Plan) -> Overlap:
        """The rewards that score while the policy samples."""
        elsewhere = {name: reward for name, reward in self.rewards.items() if reward.elsewhere}
        return Overlap(elsewhere, plan, self.config.reward.overlap, self.waiting)


@dataclass
class Update:
    """One finished update: its record and its images."""

    number: int
    metrics: dict[str, Any]
    images: Tensor  # (B, H, W, 3) in [0, 1], group after group
    prompts: list[str]  # (B,)
    scores: Tensor  # (B,) what was trained on, before advantages


@dataclass(frozen=True)
class Samples:
    """One update's images of this process, and the trajectory behind them."""

    path: Trajectory  # as far as the objective trains it
    images: Tensor  # (B, H, W, 3) in [0, 1]
    predict: Predict


def align(state: TrainingState, job: Job) -> Iterator[Update]:
    """Align the policy to the rewards, one Update after another, from `state.done` to `config.run.updates`.

    PCPO (arXiv 2509.25774), Algorithm 1, with DDPO, DanceGRPO, Flow-GRPO, AWM and DiffusionNFT as settings of it.
    An update is all or nothing: whatever interrupts it leaves the state as it was. A guard may end the run early.
    """
    with interrupts.allow():
        condition = state.policy.encode([str(prompt) for prompt in job.prompts], job.encoding)
    for number in range(state.done + 1, job.config.run.updates + 1):
        with state.all_or_nothing(), interrupts.allow():
            seconds = Stopwatch()
            plan = make_plan(state.policy, job.config, job.objective, job.prompts, number)
            with overlapping(job.overlap(plan)) as overlap:
                with seconds("rollout"):
                    samples = roll_out(state, job, overlap, condition)
                with seconds("reward"):
                    scored = score_rollout(state, job, overlap, samples.images)
            with seconds("update"):
                statistics = improve(state, update_batch(state, job, plan, samples, scored), job.processes)
            images = samples.images
            del samples  # its trajectory: the next rollout takes as much memory
            state.done = number
            metrics = record(Measured(plan, scored, statistics, seconds, state.learning_rate), job.config)
            if overlap.rewards:
                metrics["seconds_saved"] = round(overlap.saved, 4)
            metrics |= guarded(state, job, metrics["kl"])
        yield Update(number, metrics, images, plan.texts, own_rows(scored.combined, job))
        if job.guard is not None and job.guard.stopped:
            return


def roll_out(state: TrainingState, job: Job, overlap: Overlap, condition: Condition) -> Samples:
    """Roll out this process's groups and decode their images."""
    policy, plan, r = state.policy, overlap.plan, job.config.rollout
    prompts = list(dict.fromkeys(plan.texts))
    own = condition.rows([job.prompts.index(text) for text in prompts])
    places = [prompts.index(text) for text in plan.texts]

    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        interrupts.check()
        job.tick()
        overlap.check()
        return policy.predict(upload(x, policy.device), t, own.rows([places[i] for i in rows.tolist()]))

    noise = plan.noise(job.config.run.seed, policy.latent_shape, shared=r.shared_noise)
    path: Trajectory | None = None
    with state.sampling(r.policy):
        for path, rows in sampled_parts(predict, plan, noise, by_chunk=bool(overlap.rewards)):
            check_rollout(path, predict, policy, job.processes, plan.number)
            if overlap.rewards:
                for part in rows.split(r.images_at_once):
                    overlap.add(part, policy.decode(clean_latents(path, plan, r.decode)[part]))
    assert path is not None  # there is at least one chunk
    if overlap.rewards:
        return Samples(job.objective.kept(path), overlap.images, predict)
    final = clean_latents(path, plan, r.decode)
    images = torch.cat([policy.decode(x) for x in final.split(len(plan.chunks[0]))])
    return Samples(job.objective.kept(path), images, predict)


def sampled_parts(
    predict: Predict, plan: Plan, noise: GroupNoise, by_chunk: bool
) -> Iterator[tuple[Trajectory, Tensor]]:
    """The trajectory and the rows that it has newly sampled: chunk after chunk, or all at once, as branches are."""
    if plan.branches is not None:
        yield branch_rollout(predict, plan.grid, plan.branches, noise, plan.chunks), torch.cat(plan.chunks)
    elif by_chunk:
        yield from rollout_chunks(predict, plan.grid, plan.transitions, noise, plan.chunks)
    else:
        yield rollout(predict, plan.grid, plan.transitions, noise, plan.chunks), torch.cat(plan.chunks)


def clean_latents(path: Trajectory, plan: Plan, decode: str) -> Tensor:
    """What is decoded, (B, C, H, W): the final latents, or those that the last step predicts, without its noise."""
    if decode == "final":
        return path.final
    return predicted_x0(path.latents[-2], path.outs[-1], scales(plan.grid)[-1], plan.grid.kind)


def score_rollout(state: TrainingState, job: Job, overlap: Overlap, images: Tensor) -> ScoredRollout:
    """The scores of every process's images and their advantages."""
    seconds, plan = Stopwatch(), overlap.plan
    here = {name: reward for name, reward in job.rewards.items() if name not in overlap.rewards}
    own = score(here, ImageGroups(images, plan.texts, plan.group_size), seconds, job.config.reward.offload)
    own |= overlap.finish()
    own = {name: own[name] for name in job.rewards}
    seconds.seconds |= overlap.seconds
    scores = {name: job.processes.gather(values) for name, values in own.items()}
    check_failures(scores, job.rewards, job.config, plan.number)
    return compare_scores(scores, plan, state, job.config, seconds)


def update_batch(state: TrainingState, job: Job, plan: Plan, samples: Samples, scored: ScoredRollout) -> UpdateBatch:
    """What the gradient steps need of this process's images."""
    shared = job.config.objective.shared_noise
    noise = plan.noise(job.config.run.seed, state.policy.latent_shape, 1, shared=shared)
    with state.sampling(job.config.rollout.policy):
        path = job.objective.prepare(samples.path, plan, noise, samples.predict)
    advantage, failed = own_rows(scored.advantage, job), own_rows(scored.combined, job).isnan()
    return UpdateBatch(plan, job.objective, path, advantage, samples.predict, job.config, failed)


def guarded(state: TrainingState, job: Job, kl: float) -> dict[str, Any]:
    """Adapt the KL weight and let the guard measure, -> what they add to the update's metrics."""
    g, metrics = job.config.guard, {}
    if state.kl_weight is not None:
        metrics["kl_weight"] = state.kl_weight
        state.kl_weight = adapted_kl_weight(state.kl_weight, kl, g.kl_budget, g.kl_start)
    return metrics if job.guard is None else metrics | job.guard.check(state, state.done)


def own_rows(values: Tensor, job: Job) -> Tensor:
    """This process's part of gathered values, (P, G) -> (B,)."""
    return values.flatten()[job.processes.slice(values.numel())]
