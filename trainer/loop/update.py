"""The gradient steps of one update: each stored denoising step is predicted again and its surrogate differentiated."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comfyui_pcpo.method.forward_process import output_distance
from comfyui_pcpo.method.surrogate import FORMS, OBJECTIVES, is_clipped, kl, taylor_error

from .distributed import Processes
from .forward_update import forward_terms
from .state import TrainingState
from .update_batch import Renoised, UpdateBatch

CLIPS = {"awm": "ppo", "nft": "matching"}  # whose flat region a forward-process objective has
COUNTS = ("count", "log_ratio", "log_ratio_abs", "clipped", "taylor", "kl", "kl_count")
ROWS = (*COUNTS, "loss", "largest")


@dataclass
class StepStatistics:
    """Sums over images, one column per trained step, and gradient norms per optimizer step."""

    steps: list[int]
    sums: Tensor  # (len(COUNTS), S) float64
    largest: Tensor  # (S,) largest |log ratio|
    first_largest: Tensor  # (S,) the same before any optimizer step of this update
    grad_norms: Tensor  # (minibatches, S) of each step's own share of the gradient
    totals: Tensor  # (minibatches,) norm of the whole gradient, before clipping
    loss: float
    waiting: list[tuple[int, bool, Tensor]]  # (column, in the first minibatch, (len(ROWS),)) on the model's device
    norms: list[Tensor]  # grad_norms, row after row, on the model's device

    def settle(self) -> None:
        """Fetch all that was measured from the model's device, at once: to wait for each would idle a GPU."""
        values = torch.stack([row for _, _, row in self.waiting]).double().cpu()
        for (column, first, _), row in zip(self.waiting, values, strict=True):
            self.sums[:, column] += row[: len(COUNTS)]
            self.loss += float(row[ROWS.index("loss")])
            largest = row[ROWS.index("largest")].float()
            self.largest[column] = torch.maximum(self.largest[column], largest)
            if first:
                self.first_largest[column] = torch.maximum(self.first_largest[column], largest)
        self.grad_norms = torch.stack(self.norms).cpu().view(self.grad_norms.shape)

    def reduce(self, processes: Processes) -> None:
        """Make these the statistics of all processes; gradient norms are so already."""
        self.settle()
        processes.sum(self.sums)
        processes.max(self.largest)
        processes.max(self.first_largest)
        self.loss = float(processes.sum(torch.tensor(self.loss, dtype=torch.float64)))

    def _mean(self, name: str) -> Tensor:
        count = self.sums[COUNTS.index("kl_count" if name == "kl" else "count")]
        return self.sums[COUNTS.index(name)] / count

    def per_step(self) -> dict[str, list[float]]:
        return {
            "log_ratio": self._mean("log_ratio").tolist(),
            "log_ratio_abs": self._mean("log_ratio_abs").tolist(),
            "clip_fraction": self._mean("clipped").tolist(),
            "taylor_error": self._mean("taylor").tolist(),
            "kl": self._mean("kl").tolist(),
            "grad_norm": self.grad_norms.mean(0).tolist(),
        }

    def overall(self) -> dict[str, float]:
        whole = self.sums.sum(1)
        count = whole[COUNTS.index("count")]
        return {
            "loss": self.loss,
            "log_ratio_mean": float(whole[COUNTS.index("log_ratio")] / count),
            "log_ratio_abs_max": float(self.largest.max()),
            "first_log_ratio_abs_max": float(self.first_largest.max()),
            "clip_fraction": float(whole[COUNTS.index("clipped")] / count),
            "kl": float(whole[COUNTS.index("kl")] / whole[COUNTS.index("kl_count")]),
            "grad_norm": float(self.totals.mean()),
        }


def no_statistics(steps: list[int], rounds: int) -> StepStatistics:
    """Of no image yet."""
    count = len(steps)
    return StepStatistics(
        steps,
        sums=torch.zeros(len(COUNTS), count, dtype=torch.float64),
        largest=torch.zeros(count),
        first_largest=torch.zeros(count),
        grad_norms=torch.zeros(rounds, count),
        totals=torch.zeros(rounds),
        loss=0.0,
        waiting=[],
        norms=[],
    )


def improve(learner: TrainingState, lesson: UpdateBatch, processes: Processes) -> StepStatistics:
    """One optimizer step per minibatch, `optimizer.epochs` times over."""
    parameters, trained, o = learner.policy.trainable(), lesson.plan.trained, lesson.config.optimizer
    rounds = [part for _ in range(o.epochs) for part in lesson.plan.minibatches]
    statistics = no_statistics(trained, len(rounds))
    for number, chunks in enumerate(rounds):
        share = 1.0 / (sum(len(rows) for rows in chunks) * len(trained) * processes.size)
        total = [torch.zeros_like(p) for p in parameters]
        for column, i in enumerate(trained):
            for rows in chunks:
                loss, row = step_loss(lesson, i, rows)
                (loss * share).backward()
                row[ROWS.index("loss")] *= share / len(rounds)
                statistics.waiting.append((column, number == 0, row))
            statistics.norms.append(take_gradients(parameters, total, processes))
        for p, gradient in zip(parameters, total, strict=True):
            p.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, o.max_grad_norm)
        statistics.totals[number] = norm
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} in minibatch {number + 1}. This update was undone, finished ones "
                "are kept. Look at the rewards, or start again with a lower optimizer.learning_rate or in float32."
            )
        learner.optimizer.step()
        if learner.average is not None:
            learner.average.step()
        learner.optimizer.zero_grad(set_to_none=True)
    statistics.reduce(processes)
    return statistics


def step_loss(lesson: UpdateBatch, i: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Summed surrogate (and KL) of one denoising step over `rows`, (), and what is recorded of it, (len(ROWS),)."""
    o, path = lesson.config.objective, lesson.path
    out = lesson.predict(path.latents[i, rows], path.timesteps[i], rows)
    d = out.float() - path.outs[i, rows].to(out.device)
    a = lesson.advantage[rows].to(out.device)
    if isinstance(path, Renoised):
        log_ratio, losses = forward_terms(lesson, path, i, rows, d)
    else:
        weight = float(lesson.plan.weights[i])
        log_ratio = FORMS[o.form](d, path.noises[i, rows].to(out.device), weight, path.transitions[i].weight)
        losses = OBJECTIVES[o.name](log_ratio, a, o.clip_range)
    loss = losses.sum()
    watched = len(rows) if o.kl_weight else int((rows < o.kl_images).sum())
    divergence = reference_kl(lesson, i, rows[:watched], out)
    if o.kl_weight:
        loss = loss + o.kl_weight * divergence.sum()
    with torch.no_grad():
        clipped = is_clipped(log_ratio, a, o.clip_range, CLIPS.get(o.name, o.name))
        values = {
            "count": log_ratio.new_tensor(len(log_ratio)),
            "log_ratio": log_ratio.sum(),
            "log_ratio_abs": log_ratio.abs().sum(),
            "clipped": clipped.sum(),
            "taylor": taylor_error(log_ratio).sum(),
            "kl": divergence.sum(),
            "kl_count": log_ratio.new_tensor(len(divergence)),
            "loss": loss,
            "largest": log_ratio.abs().max(),
        }
        row = torch.stack([values[name].float() for name in ROWS])
    return loss, row


def reference_kl(lesson: UpdateBatch, i: int, rows: Tensor, out: Tensor) -> Tensor:
    """KL of one step (or distance of outputs) to the model without its LoRA, (len(rows),); with gradient if trained."""
    if len(rows) == 0:
        return out.new_zeros(0, dtype=torch.float32)
    path = lesson.path
    with torch.no_grad(), lesson.policy.reference():
        reference = lesson.predict(path.latents[i, rows], path.timesteps[i], rows).float()
    new = out[: len(rows)].float()
    d = (new if lesson.config.objective.kl_weight else new.detach()) - reference
    return output_distance(d) if isinstance(path, Renoised) else kl(d, path.transitions[i])


@torch.no_grad()
def take_gradients(parameters: list[nn.Parameter], total: list[Tensor], processes: Processes) -> Tensor:
    """Add p.grad, summed over processes, to `total`, clear it, and return its norm, ()."""
    found = [(p, kept) for p, kept in zip(parameters, total, strict=True) if p.grad is not None]
    gradients = [processes.sum(p.grad) for p, _ in found if p.grad is not None]
    torch._foreach_add_([kept for _, kept in found], gradients)
    for p, _ in found:
        p.grad = None
    return torch.stack(torch._foreach_norm(gradients)).norm()
