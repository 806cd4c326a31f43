"""The arithmetic of a configuration: how many pictures, transitions and model calls, and how much memory."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from comfyui_pcpo.forward_process import FORWARD

from .config import Config
from .diffusers_policy import DiffusersPolicy
from .plan import plan_steps


@dataclass(frozen=True)
class Budget:
    """Counts per update and for the whole run; memory in bytes on the model's device."""

    prompts: int
    images: int
    steps: int
    trained_steps: int
    transitions: int  # images x trained steps, per update
    optimizer_steps: int  # whole run
    rollout_calls: int  # model calls per update
    update_calls: int  # forward and backward passes per update
    weights_bytes: int
    lora_bytes: int  # LoRA, its gradients and AdamW's two moments
    activation_bytes: int  # kept for the backward pass of one micro-batch
    trajectory_bytes: int  # in the computer's memory

    def lines(self, config: Config) -> list[str]:
        r, gib = config.rollout, 2**30
        device = self.weights_bytes + self.lora_bytes + self.activation_bytes
        return [
            f"{self.prompts} prompts x {r.group_size} images = {self.images} images per update",
            f"{self.images} images x {self.trained_steps} trained of {self.steps} steps = "
            f"{self.transitions} transitions per update",
            f"{config.run.updates} updates x {config.optimizer.minibatches * config.optimizer.epochs} "
            f"optimizer steps = {self.optimizer_steps} optimizer steps",
            f"{self.rollout_calls} model calls for the rollout and {self.update_calls} forward and backward passes "
            f"per update, {r.images_at_once} images at once at most",
            f"memory on the model's device: {device / gib:.2f} GiB "
            f"({self.weights_bytes / gib:.2f} weights, {self.lora_bytes / gib:.2f} LoRA and optimizer, "
            f"{self.activation_bytes / gib:.2f} activations), without the rewards' own",
            f"trajectories in the computer's memory: {self.trajectory_bytes / gib:.2f} GiB",
        ]


def saved_bytes(policy: DiffusersPolicy) -> int:
    """Bytes that autograd keeps for one image, measured by running one."""
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.denoiser.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    condition = policy.encode(["measure"]).rows([0])
    x = torch.zeros(1, *policy.latent_shape, device=policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = policy.predict(x, policy.grid(2).timesteps[0].item(), condition)
    total = sum(seen.values())
    del out
    return total


def budget(policy: DiffusersPolicy, config: Config) -> Budget:
    r, o = config.rollout, config.optimizer
    _, trained = plan_steps(policy, config, policy.grid(r.steps), 1)
    images = config.images_per_update
    chunks = o.minibatches * math.ceil(images / o.minibatches / r.images_at_once)
    again = len(trained) if config.objective.name in FORWARD else 0  # renoised pictures are predicted once more
    modules = [m for m in policy.pipeline.components.values() if isinstance(m, nn.Module)]
    tensors = {p.data_ptr(): p for m in modules for p in m.parameters()}
    lora = sum(p.numel() for p in policy.trainable())
    latent = math.prod(policy.latent_shape) * 4
    return Budget(
        prompts=r.prompts_per_update,
        images=images,
        steps=r.steps,
        trained_steps=len(trained),
        transitions=images * len(trained),
        optimizer_steps=config.run.updates * o.minibatches * o.epochs,
        rollout_calls=(r.steps + again) * chunks,
        update_calls=len(trained) * chunks * o.epochs,
        weights_bytes=sum(p.numel() * p.element_size() for p in tensors.values()) - 4 * lora,
        lora_bytes=4 * 4 * lora,
        activation_bytes=saved_bytes(policy) * min(r.images_at_once, images // o.minibatches),
        trajectory_bytes=images * latent * (3 * r.steps + 1),
    )
