"""The gradient steps of one update: each stored denoising step is predicted again and its loss differentiated."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comfyui_pcpo.method.rollout import Predict

from ..config.schema import Config
from ..policy.base import Policy
from .distributed import Processes
from .objectives import Objective, StoredSteps, Terms
from .plan import Plan
from .state import TrainingState
from .statistics import StepStatistics


@dataclass(frozen=True)
class UpdateBatch:
    """What the gradient steps of one update need: stored steps and the advantages of this process's B images."""

    plan: Plan
    objective: Objective
    steps: StoredSteps
    advantage: Tensor  # (B,)
    predict: Predict
    config: Config


def improve(state: TrainingState, batch: UpdateBatch, processes: Processes) -> StepStatistics:
    """One optimizer step per minibatch, `optimizer.epochs` times over."""
    parameters, trained, o = state.policy.trainable(), batch.plan.trained, batch.config.optimizer
    statistics = StepStatistics(trained)
    minibatches = [chunks for _ in range(o.epochs) for chunks in batch.plan.minibatches]
    for number, chunks in enumerate(minibatches):
        share = 1 / (sum(len(rows) for rows in chunks) * len(trained) * processes.size)
        gradient = [torch.zeros_like(p) for p in parameters]
        for column, i in enumerate(trained):
            for rows in chunks:
                terms, divergence = step_terms(state.policy, batch, i, rows)
                loss = (terms.loss.sum() + batch.config.objective.kl_weight * divergence.sum()) * share
                loss.backward()
                statistics.add(column, number == 0, terms, divergence, loss / len(minibatches))
            statistics.step_norms.append(take_gradients(parameters, gradient, processes))
        for p, total in zip(parameters, gradient, strict=True):
            p.grad = total
        statistics.norms.append(nn.utils.clip_grad_norm_(parameters, o.max_grad_norm))
        check_gradient(statistics.norms[-1], number + 1)
        state.step()
    statistics.settle(processes)
    return statistics


def step_terms(policy: Policy, batch: UpdateBatch, i: int, rows: Tensor) -> tuple[Terms, Tensor]:
    """The objective's terms at step i, and the divergence from the reference of those images that it is needed of."""
    steps, o = batch.steps, batch.config.objective
    out = batch.predict(steps.latents[i, rows], steps.timesteps[i], rows).float()
    terms = batch.objective.terms(steps, batch.plan, i, rows, out, batch.advantage[rows].to(out.device))
    watched = rows if o.kl_weight else rows[rows < o.kl_images]
    if len(watched) == 0:
        return terms, out.new_zeros(0)
    with torch.no_grad(), policy.reference():
        reference = batch.predict(steps.latents[i, watched], steps.timesteps[i], watched).float()
    new = out[: len(watched)]  # rows rise, so the watched ones come first
    return terms, batch.objective.divergence((new if o.kl_weight else new.detach()) - reference, batch.plan, i)


@torch.no_grad()
def take_gradients(parameters: list[nn.Parameter], total: list[Tensor], processes: Processes) -> Tensor:
    """Add p.grad, summed over processes, to `total`, clear it, and return its norm, ()."""
    pairs = [(p, kept) for p, kept in zip(parameters, total, strict=True) if p.grad is not None]
    gradients = [processes.sum(p.grad) for p, _ in pairs if p.grad is not None]
    torch._foreach_add_([kept for _, kept in pairs], gradients)
    for p, _ in pairs:
        p.grad = None
    return torch.stack(torch._foreach_norm(gradients)).norm()


def check_gradient(norm: Tensor, minibatch: int) -> None:
    """Raise FloatingPointError for a gradient that is not finite."""
    if not norm.isfinite():
        raise FloatingPointError(
            f"the gradient norm is {norm.item()} in minibatch {minibatch}. This update was undone; finished updates "
            "are kept. Check the rewards, lower optimizer.learning_rate, or train in float32."
        )
