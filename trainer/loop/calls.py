"""How many model calls a run makes, counted by going through planned updates with latents of one element."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from comfyui_pcpo.method.branching import branch_rollout
from comfyui_pcpo.method.rollout import rollout

from ..config.loading import with_options
from ..config.schema import Config
from ..policy.base import Policy
from .objectives import Objective, make_objective
from .plan import Plan, make_plan
from .update import UpdateBatch, drawn_chunks, step_rows

AVERAGED = 20
"""Updates over which the counts of a branching run are averaged, since they depend on the branch steps."""


@dataclass
class Count:
    """Model calls, and the latents that they predict."""

    calls: float = 0
    evaluations: float = 0

    def add(self, latents: int, times: float = 1) -> None:
        self.calls += times
        self.evaluations += times * latents

    def text(self) -> str:
        return f"{self.calls:.0f} model calls ({self.evaluations:.0f} images)"


@dataclass
class ModelCalls:
    """What one update calls the model for; the KL's reference and the guard are counted per measurement."""

    rollout: Count = field(default_factory=Count)
    update: Count = field(default_factory=Count)  # with gradient
    reference: Count = field(default_factory=Count)  # without the LoRA, for the KL
    guard: Count = field(default_factory=Count)


def count_model_calls(policy: Policy, config: Config, prompts: int) -> ModelCalls:
    """The model calls of a run with that many prompts, over all processes."""
    measuring = with_options(config, {"objective": {"kl_every": 1}})
    objective, counts = make_objective(config), ModelCalls()
    updates = min(config.run.updates, AVERAGED) if config.rollout.branch else 1
    for number in range(1, updates + 1):
        plan = make_plan(policy, measuring, objective, [""], number)
        _count_update(counts, plan, objective, measuring, 1 / updates)
    g, r = config.guard, config.rollout
    if g.every:
        for rows in torch.arange(min(g.prompts, prompts) * g.images).split(r.images_at_once):
            counts.guard.add(len(rows), r.steps)
    return counts


def _count_update(counts: ModelCalls, plan: Plan, objective: Objective, config: Config, share: float) -> None:
    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        counts.rollout.add(len(x), share)
        return torch.zeros_like(x)

    noise = plan.noise(0, (1, 1, 1))
    if plan.branches is None:
        path = rollout(predict, plan.grid, plan.transitions, noise, plan.chunks)
    else:
        path = branch_rollout(predict, plan.grid, plan.branches, noise, plan.chunks)
    path = objective.prepare(path, plan, noise, predict)
    batch = UpdateBatch(plan, objective, path, torch.zeros(0), predict, config)
    minibatches = plan.minibatches * config.optimizer.epochs
    for number, chunks in enumerate(minibatches):
        for i in plan.trained:
            for rows in drawn_chunks(batch, i, chunks):
                step = step_rows(batch, i, rows, first=number == 0)
                counts.update.add(len(path.unique_rows(i, rows)[0]), share)
                if step.measured.any():
                    counts.reference.add(len(path.unique_rows(i, rows[step.measured])[0]), share)
