"""The gradient steps of one update: each stored denoising step is predicted again and its loss differentiated."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from comfyui_pcpo.method.rollout import Predict, Trajectory

from ..config.schema import Config
from ..memory.shard import sharded
from ..memory.transfer import upload
from ..policy.base import Policy
from .distributed import Processes
from .finite import check_gradient, check_parameters
from .objectives import Objective, StepRows, Terms
from .plan import Plan
from .state import TrainingState
from .statistics import StepStatistics


@dataclass(frozen=True)
class UpdateBatch:
    """What the gradient steps of one update need: stored steps and the advantages of this process's B images."""

    plan: Plan
    objective: Objective
    path: Trajectory
    advantage: Tensor  # (B,)
    predict: Predict
    config: Config
    failed: Tensor | None = None  # (B,) bool: images without a score, whose loss is left out; None: no image


def improve(state: TrainingState, batch: UpdateBatch, processes: Processes) -> StepStatistics:
    """One optimizer step per minibatch, `optimizer.epochs` times over."""
    parameters, trained, o = state.policy.trainable(), batch.plan.trained, batch.config.optimizer
    kl_weight = batch.config.objective.kl_weight if state.kl_weight is None else state.kl_weight
    statistics = StepStatistics(trained)
    statistics.evaluations["rollout"] = batch.path.evaluations
    minibatches = [chunks for _ in range(o.epochs) for chunks in batch.plan.minibatches]
    for number, chunks in enumerate(minibatches):
        share = 1 / (count_pairs(batch, chunks) * processes.size)
        gradient = [torch.zeros_like(p) for p in parameters]
        for column, i in enumerate(trained):
            for rows in drawn_chunks(batch, i, chunks):
                step = step_rows(batch, i, rows, first=number == 0)
                terms, divergence = step_terms(state.policy, batch, step)
                loss = (terms.loss.sum() + kl_weight * divergence.sum()) * share
                loss.backward()
                statistics.add(column, number == 0, terms, divergence, loss / len(minibatches))
                statistics.count(batch.path, step)
            statistics.step_norms.append(take_gradients(parameters, gradient, processes))
        for p, total in zip(parameters, gradient, strict=True):
            p.grad = total
        statistics.norms.append(nn.utils.clip_grad_norm_(parameters, o.max_grad_norm))
        check_gradient(statistics.norms[-1], number + 1)
        state.step()
    check_parameters(parameters)
    statistics.settle(processes)
    return statistics


def drawn_chunks(batch: UpdateBatch, i: int, chunks: list[Tensor]) -> list[Tensor]:
    """The rows of each chunk whose step i is stochastic; chunks without any are left out."""
    return [rows for rows in (batch.path.drawn(i, chunk) for chunk in chunks) if len(rows)]


def count_pairs(batch: UpdateBatch, chunks: list[Tensor]) -> int:
    """How many (image, step) pairs a minibatch trains on this process."""
    return sum(len(rows) for i in batch.plan.trained for rows in drawn_chunks(batch, i, chunks))


def step_terms(policy: Policy, batch: UpdateBatch, step: StepRows) -> tuple[Terms, Tensor]:
    """The objective's terms, and the divergence from the reference of the images on which it is measured."""
    out = predicted(batch, step.i, step.rows)
    advantage = upload(batch.advantage[step.rows], out.device)
    terms = batch.objective.terms(batch.path, batch.plan, step, out, advantage)
    terms = replace(terms, loss=terms.loss * float(batch.plan.loss_weights[step.i]))
    if batch.failed is not None:  # an advantage of 0 is not enough: nft's loss then pulls towards the old model
        terms = replace(terms, loss=terms.loss.masked_fill(upload(batch.failed[step.rows], out.device), 0.0))
    measured = step.rows[step.measured]
    if not len(measured):
        if step.together:
            with torch.no_grad(), policy.reference():
                predicted(batch, step.i, step.rows[:1])
        return terms, out.new_zeros(0)
    with torch.no_grad(), policy.reference():
        reference = predicted(batch, step.i, measured)
    if not batch.config.trains_kl:
        out = out.detach().index_select(0, upload(step.measured.nonzero()[:, 0], out.device))
    return terms, batch.objective.divergence(out - reference, batch.plan, step.i)


def predicted(batch: UpdateBatch, i: int, rows: Tensor) -> Tensor:
    """The model's outputs at step i, (b,) -> (b, C, H, W); images of a branch share their latent, so one prediction."""
    path = batch.path
    unique, places = path.unique_rows(i, rows)
    out = batch.predict(path.latents[i, unique], path.timesteps[i], unique).float()
    return out if unique is rows else out.index_select(0, upload(places, out.device))


def measures_kl(batch: UpdateBatch) -> bool:
    """Whether this update measures the KL: always if it is trained, else every `kl_every`-th on `kl_images` images."""
    o = batch.config.objective
    return batch.config.trains_kl or (o.kl_images > 0 and batch.plan.number % o.kl_every == 0)


def step_rows(batch: UpdateBatch, i: int, rows: Tensor, first: bool) -> StepRows:
    """Step i of a chunk's images, and on which of them the KL is measured: on all if it is trained.

    Otherwise, where `measures_kl`, on the first `kl_images` images of the `first` minibatch, whichever process has
    them; with branches on as many of every group, since groups train different steps. In one minibatch they share
    model calls, and what is measured is the LoRA before the update. Processes of a sharded model gather its weights for
    every prediction, so they make as many.
    """
    together = first and measures_kl(batch) and sharded(batch.config.model)
    return StepRows(i, rows, measured_rows(batch, rows, first), together)


def measured_rows(batch: UpdateBatch, rows: Tensor, first: bool) -> Tensor:
    """Those of a chunk's images on which the KL is measured, (b,) -> (b,) bool."""
    o, plan = batch.config.objective, batch.plan
    if batch.config.trains_kl:
        return torch.ones(len(rows), dtype=torch.bool)
    if not first or not measures_kl(batch):
        return torch.zeros(len(rows), dtype=torch.bool)
    parts = len(plan.minibatches)
    group, image = torch.tensor(plan.groups)[rows // plan.group_size], rows % plan.group_size // parts
    if plan.branches is not None:
        return image < -(-o.kl_images // len(plan.prompts))
    return group * (plan.group_size // parts) + image < o.kl_images


@torch.no_grad()
def take_gradients(parameters: list[nn.Parameter], total: list[Tensor], processes: Processes) -> Tensor:
    """Add p.grad, summed over processes, to `total`, clear it, and return its norm, ()."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for gradient in gradients:
        processes.sum(gradient)
    torch._foreach_add_(total, gradients)
    for p in parameters:
        p.grad = None
    return torch.stack(torch._foreach_norm(gradients)).norm()
