"""NaN and infinity, named where they arise: in the model, in its LoRA, in the loss. Rewards have theirs in scoring."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comfyui_pcpo.method.rollout import Predict, Trajectory

from ..policy.base import Policy
from .distributed import Processes
from .scoring import RunError

UNDONE = "This update was undone."


class Diverged(RunError):
    """The LoRA predicts NaN or infinity."""


def check_rollout(path: Trajectory, predict: Predict, policy: Policy, processes: Processes, number: int) -> None:
    """Raise if a latent of any process is not finite: Diverged, or RunError if the model without its LoRA is the cause.

    All processes predict together, because those of a sharded model gather its weights for it.
    """
    broken = ~path.final.flatten(1).isfinite().all(1)  # (B,)
    count, images = processes.sum(torch.tensor([int(broken.sum()), len(broken)])).tolist()
    if not count:
        return
    image = int(broken.int().argmax())  # the first broken one, or 0 where another process has them
    finite = path.latents[1:, image].flatten(1).isfinite().all(1)  # (T,)
    step = int(finite.int().argmin())
    rows = torch.tensor([image])
    with torch.no_grad(), policy.reference():
        base = predict(path.latents[step, rows], path.timesteps[step], rows)
    sound = not int(processes.sum(torch.tensor(int(not base.isfinite().all()))))
    cause = (
        "The LoRA has diverged: lower optimizer.learning_rate, and resume from an earlier checkpoint if there is one."
        if sound
        else "So it does without the LoRA: check the weights of model.name, or set model.precision = float32."
    )
    first = int(processes.min(torch.tensor(step + 1 if broken.any() else len(finite))))
    raise (Diverged if sound else RunError)(
        f"update {number}: the model predicts NaN or infinity for {count} of {images} images, first at denoising step "
        f"{first}. {cause} {UNDONE}"
    )


def check_gradient(norm: Tensor, minibatch: int) -> None:
    """Raise FloatingPointError for a gradient that is not finite."""
    if not norm.isfinite():
        raise FloatingPointError(
            f"the gradient norm is {norm.item()} in minibatch {minibatch}, although all latents and scores are finite: "
            f"the loss overflows. {UNDONE} Lower optimizer.learning_rate or objective.kl_weight, or train in float32."
        )


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Raise FloatingPointError for a LoRA that is not finite after an update."""
    with torch.no_grad():
        norms = torch.stack(torch._foreach_norm(list(parameters), float("inf")))
    if not norms.isfinite().all():
        raise FloatingPointError(
            f"the optimizer made {int((~norms.isfinite()).sum())} of the LoRA's {len(norms)} factors NaN or infinite. "
            f"{UNDONE} Lower optimizer.learning_rate."
        )
