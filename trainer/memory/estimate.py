"""The arithmetic of a configuration: how many images, transitions and model calls, and how much memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.schema import Config, ModelConfig
from ..loop.calls import ModelCalls, count_model_calls
from ..loop.objectives import make_objective
from ..loop.plan import make_plan
from ..policy.diffusers_policy import DiffusersPolicy
from .tracker import peak_bytes, pretended_mode, shapes_only

PACKED = 4096
"""adamw8bit keeps the moments of smaller tensors in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the model's device; the rewards' own are left out."""

    denoiser: int
    text: int  # text encoders
    vae: int
    lora: int  # LoRA, its gradients, the optimizer's moments, the EMA
    update: int  # activations of one forward and backward pass, at their peak
    decode: int  # the same of one call of the VAE
    offload: bool

    def phases(self) -> dict[str, int]:
        """What each part of the work takes; with offload, other weights are on the CPU."""
        resting = 0 if self.offload else self.text + self.vae
        core = self.denoiser + self.lora
        return {
            "update": core + self.update + resting,
            "decoding": core + self.decode + (self.vae if self.offload else resting),
            "prompts": self.text if self.offload else core + resting,
        }

    def lines(self) -> list[str]:
        phases = self.phases()
        most = max(phases, key=lambda name: phases[name])
        parts = {
            "model": self.denoiser,
            "text encoders": self.text,
            "VAE": self.vae,
            "LoRA and optimizer": self.lora,
            "activations of the update": self.update,
            "of the VAE": self.decode,
        }
        return [
            f"memory on the model's device: {_gib(phases[most])} GiB at most ({most}), rewards not counted ("
            + ", ".join(f"{_gib(size)} {name}" for name, size in phases.items()) + ")",
            "of which " + ", ".join(f"{_gib(size)} {name}" for name, size in parts.items())
            + ("; text encoders and VAE offloaded to the CPU" if self.offload else ""),
        ]  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Counts per update and for the whole run, and memory."""

    prompts: int
    images: int
    steps: int
    trained_steps: int
    transitions: int  # images x trained steps, per update
    optimizer_steps: int  # whole run
    model_calls: ModelCalls
    trajectory_bytes: int  # in CPU memory
    memory: Memory

    def lines(self, config: Config) -> list[str]:
        r, calls = config.rollout, self.model_calls
        often = "" if config.trains_kl else f" every {config.objective.kl_every} updates"
        kl = f", {calls.reference.text()} without the LoRA for the KL{often}" if calls.reference.calls else ""
        guard = [f"{calls.guard.text()} for the guard, every {config.guard.every} updates and before the first one"]
        return [
            f"{self.images} images x {r.branch or self.trained_steps} trained of {self.steps} steps = "
            f"{self.transitions} transitions per update",
            f"per update {calls.rollout.text()} for the rollout, {calls.update.text()} forward and backward{kl}",
            *(guard if config.guard.every else []),
            *self.memory.lines(),
            f"trajectories in CPU memory: {_gib(self.trajectory_bytes)} GiB",
        ]


def arithmetic(config: Config) -> list[str]:
    """What follows from the configuration without its model."""
    r, o = config.rollout, config.optimizer
    each = o.minibatches * o.epochs
    return [
        f"{r.prompts_per_update} prompts x {r.group_size} images = {config.images_per_update} images per update",
        f"{config.run.updates} updates x {each} optimizer steps = {config.run.updates * each} optimizer steps",
    ]


def budget(policy: DiffusersPolicy, config: Config) -> Budget:
    r, o = config.rollout, config.optimizer
    trained = make_plan(policy, config, make_objective(config), [""], 1).trained
    images = config.images_per_update
    return Budget(
        prompts=r.prompts_per_update,
        images=images,
        steps=r.steps,
        trained_steps=len(trained),
        transitions=images * (r.branch or len(trained)),  # a group trains its own steps
        optimizer_steps=config.run.updates * o.minibatches * o.epochs,
        model_calls=count_model_calls(policy, config, len(config.prompts.collect()) or config.guard.prompts),
        trajectory_bytes=images * math.prod(policy.latent_shape) * 4 * (3 * r.steps + 1),
        memory=memory(policy, config, min(r.images_at_once, images // o.minibatches)),
    )


def memory(policy: DiffusersPolicy, config: Config, at_once: int) -> Memory:
    """The device's memory with `at_once` images in a model call. Nothing is computed but sizes."""
    pipeline, lora, offload = policy.pipeline, policy.trainable(), offloads(config.model)
    text = parts_for_text(policy)
    own = {id(p) for p in lora}
    return Memory(
        denoiser=_bytes(t for t in _tensors([policy.denoiser]) if id(t) not in own),
        text=_bytes(_tensors(text)),
        vae=_bytes(_tensors([pipeline.vae])),
        lora=_training_bytes(lora, config),
        update=_update_bytes(policy, at_once),
        decode=_decode_bytes(policy, 1 if offload else at_once),
        offload=offload,
    )


def offloads(model: ModelConfig) -> bool:
    """Whether a run moves parts between the CPU and its GPU, which `check` may run without."""
    on_cpu = model.device.startswith("cpu") or (model.device == "auto" and not torch.cuda.is_available())
    return model.offload and not on_cpu


def parts_for_text(policy: DiffusersPolicy) -> list[nn.Module]:
    """Text encoders, and whatever else is neither denoiser nor VAE."""
    modules = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    return [part for part in modules if part is not policy.denoiser and part is not policy.pipeline.vae]


def _training_bytes(lora: list[nn.Parameter], config: Config) -> int:
    """float32 factors, the gradient of a step and of a minibatch, two moments, and the EMA."""
    copies = 3 + bool(config.optimizer.ema_decay)
    packed = config.optimizer.name == "adamw8bit"
    moments = sum(2 * p.numel() * (1 if packed and p.numel() >= PACKED else 4) for p in lora)
    return copies * _bytes(lora) + moments


def _update_bytes(policy: DiffusersPolicy, at_once: int) -> int:
    text = parts_for_text(policy)
    with shapes_only(pretended_mode(text)):
        condition = policy.encode(["measure"]).rows([0] * at_once)
    time = policy.grid(2).timesteps[0].item()

    def compute() -> None:
        x = torch.zeros(at_once, *policy.latent_shape, device=policy.device)
        loss = policy.predict(x, time, condition).square().mean()
        with torch.no_grad():  # the KL reference runs between the two passes
            policy.predict(x, time, condition)
        torch.autograd.grad(loss, policy.trainable(), allow_unused=True)

    gradients = _bytes(policy.trainable())  # counted with the LoRA
    return max(0, peak_bytes([policy.denoiser], compute, pretends(policy)) - gradients)


def pretends(policy: DiffusersPolicy) -> bool:
    """Whether the model's sizes can be found without computing; bitsandbytes' layers have no contentless copy."""
    shapes = pretended_mode([policy.denoiser]) is not None
    return shapes or (policy.adapter.pretends and policy.config.model.quantize != "4bit")


def _decode_bytes(policy: DiffusersPolicy, at_once: int) -> int:
    def compute() -> None:
        with torch.no_grad():
            policy.adapter.decode(torch.zeros(at_once, *policy.latent_shape, device=policy.device))

    return peak_bytes([policy.pipeline.vae], compute)


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
