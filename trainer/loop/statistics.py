"""What is recorded of the gradient steps: sums per denoising step, kept on the model's device until the update ends."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from comfyui_pcpo.method.rollout import Trajectory
from comfyui_pcpo.method.surrogate import taylor_error

from .distributed import Processes
from .objectives import StepRows, Terms

SUMS = ("count", "log_ratio", "log_ratio_abs", "clipped", "taylor", "kl", "kl_count")


@dataclass
class StepStatistics:
    """Statistics over images of each trained step; `settle` must come before they are read."""

    trained: list[int]  # the S steps
    sums: dict[str, Tensor] = field(init=False)  # SUMS -> (S,) float64
    largest: Tensor = field(init=False)  # (S,) largest |log ratio|
    first_largest: Tensor = field(init=False)  # (S,) the same before any optimizer step of this update
    step_norms: list[Tensor] = field(default_factory=list)  # gradient norms, step after step of each minibatch
    norms: list[Tensor] = field(default_factory=list)  # of the whole gradient of each minibatch, before clipping
    loss: float = 0.0
    # latents predicted by the model: rollout; update, with gradient; reference, without the LoRA
    evaluations: dict[str, int] = field(default_factory=lambda: {"rollout": 0, "update": 0, "reference": 0})
    _waiting: list[tuple[int, bool, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.trained)
        self.sums = {name: torch.zeros(count, dtype=torch.float64) for name in SUMS}
        self.largest, self.first_largest = torch.zeros(count), torch.zeros(count)

    @torch.no_grad()
    def add(self, column: int, first: bool, terms: Terms, divergence: Tensor, loss: Tensor) -> None:
        """Note one chunk of step `trained[column]`; `loss` is its share of the update's loss."""
        ratio = terms.log_ratio
        values = (
            *(ratio.new_full((), len(ratio)), ratio.sum(), ratio.abs().sum(), terms.clipped.sum()),
            *(taylor_error(ratio).sum(), divergence.sum(), ratio.new_full((), len(divergence))),
            *(loss, ratio.abs().max()),
        )
        self._waiting.append((column, first, torch.stack([value.float() for value in values])))

    def count(self, path: Trajectory, step: StepRows) -> None:
        """Count the latents that were predicted for a chunk."""
        self.evaluations["update"] += len(path.unique_rows(step.i, step.rows)[0])
        self.evaluations["reference"] += len(path.unique_rows(step.i, step.rows[step.measured])[0])

    def settle(self, processes: Processes) -> None:
        """Fetch everything from the model's device at once, since each wait idles a GPU, and sum over processes.

        Gradient norms are those of all processes already.
        """
        rows = torch.stack([row for _, _, row in self._waiting]).double().cpu()
        for (column, first, _), row in zip(self._waiting, rows, strict=True):
            for name, value in zip(SUMS, row, strict=False):
                self.sums[name][column] += value
            self.loss += float(row[-2])
            largest = row[-1].float()
            self.largest[column] = torch.maximum(self.largest[column], largest)
            if first:
                self.first_largest[column] = torch.maximum(self.first_largest[column], largest)
        for total in self.sums.values():
            processes.sum(total)
        processes.max(self.largest)
        processes.max(self.first_largest)
        self.loss = float(processes.sum(torch.tensor(self.loss, dtype=torch.float64)))
        counts = processes.sum(torch.tensor(list(self.evaluations.values())))
        self.evaluations = dict(zip(self.evaluations, counts.tolist(), strict=True))

    def per_step(self) -> dict[str, list[float]]:
        """One number for each trained step."""
        count = self.sums["count"]
        grad_norms = torch.stack(self.step_norms).cpu().view(-1, len(self.trained)).mean(0)
        return {
            "log_ratio": (self.sums["log_ratio"] / count).tolist(),
            "log_ratio_abs": (self.sums["log_ratio_abs"] / count).tolist(),
            "clip_fraction": (self.sums["clipped"] / count).tolist(),
            "taylor_error": (self.sums["taylor"] / count).tolist(),
            "kl": (self.sums["kl"] / self.sums["kl_count"]).tolist(),
            "grad_norm": grad_norms.tolist(),
        }

    def overall(self) -> dict[str, float]:
        """The same over all trained steps."""
        whole = {name: total.sum() for name, total in self.sums.items()}
        return {
            "loss": self.loss,
            "log_ratio_mean": float(whole["log_ratio"] / whole["count"]),
            "log_ratio_abs_max": float(self.largest.max()),
            "first_log_ratio_abs_max": float(self.first_largest.max()),
            "clip_fraction": float(whole["clipped"] / whole["count"]),
            "kl": float(whole["kl"] / whole["kl_count"]),
            "grad_norm": float(torch.stack(self.norms).mean()),
        }
