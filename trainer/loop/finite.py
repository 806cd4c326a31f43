"""NaN and infinity, named where they arise: in the model, in its LoRA, in the loss. Rewards have theirs in scoring."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comfyui_pcpo.method.rollout import Predict, Trajectory

from ..policy.base import Policy
from .scoring import RunError

UNDONE = "This update was undone; finished updates are kept."


def check_rollout(path: Trajectory, predict: Predict, policy: Policy, number: int) -> None:
    """Raise RunError if a latent is not finite, and say whether the model without its LoRA is the cause."""
    broken = ~path.final.flatten(1).isfinite().all(1)  # (B,)
    if not broken.any():
        return
    image = int(broken.nonzero()[0])
    step = next(i for i, latent in enumerate(path.latents[1:, image]) if not latent.isfinite().all())
    rows = torch.tensor([image])
    with torch.no_grad(), policy.reference():
        base = predict(path.latents[step, rows], path.timesteps[step], rows)
    cause = (
        "The LoRA has diverged: resume from an earlier checkpoint with a lower optimizer.learning_rate."
        if base.isfinite().all()
        else "So it does without the LoRA: check the weights of model.name, or set model.precision = float32."
    )
    raise RunError(
        f"update {number}: the model predicts NaN or infinity for {int(broken.sum())} of {len(broken)} images, "
        f"first at denoising step {step + 1}. {cause} {UNDONE}"
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
