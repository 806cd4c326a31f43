"""The examination: the same prompts and the same noise for every model, on the sampler without noise (the ODE)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_pcpo.distance import diversity, frechet
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.pipelines import MODELS
from comfyui_pcpo.transition import deterministic
from tools.tiny import measure as tiny
from trainer.policy import Policy

from .contenders import PROMPTS, REWARDS, Form

EXAM, REFERENCE = 9001, 9002  # seeds of the noise, far from those of any run


@torch.no_grad()
def pictures(policy: Policy, each: int, seed: int, steps: int, prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    """`each` pictures per prompt by the ODE, -> (P * each, H, W, 3); the noise depends on seed and prompt only."""
    grid = policy.grid(steps)
    condition = policy.encode(list(prompts)).rows([p for p in range(len(prompts)) for _ in range(each)])
    noise = GroupNoise([derive_seed(seed, p) for p in range(len(prompts))], each, policy.latent_shape)

    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        return policy.predict(x.to(policy.device), t, condition.rows(rows.tolist()))

    chunks = list(torch.arange(len(prompts) * each).split(32))
    final = rollout(predict, grid, deterministic(grid), noise, chunks).final
    return torch.cat([policy.decode(x) for x in final.split(32)])


def drawn(each: int, seed: int) -> Tensor:
    """Drawn images of the prompts with every background equally likely, -> (P * each, H, W, 3)."""
    return tiny.drawn([prompt for prompt in PROMPTS for _ in range(each)], seed)


@dataclass
class Examiner:
    """Measures a policy; `base` and `drawn` are features of the reference pictures, (N, 128) each."""

    form: Form
    base: Tensor
    drawn: Tensor
    before: dict[str, float] | None = None  # the model without its LoRA

    def __post_init__(self) -> None:
        self.encoder = load_image_encoder(MODELS / "emoji-align")
        self.rewards = {name: load_reward(name) for name in REWARDS}
        self.texts = [prompt for prompt in PROMPTS for _ in range(self.form.each)]

    def measure(self, policy: Policy) -> dict[str, float]:
        """Every reward's mean and standard deviation, tiny FD, diversity, share of pictures with the right object."""
        return self.judge(pictures(policy, self.form.each, EXAM, self.form.steps))

    def judge(self, images: Tensor) -> dict[str, float]:
        row: dict[str, float] = {}
        for name, reward in self.rewards.items():
            scores = reward.score(images, self.texts)
            row[name], row[f"{name}_std"] = float(scores.mean()), float(scores.std(correction=0))
        found = tiny.features(self.encoder, images)
        row["fd_base"], row["fd_drawn"] = frechet(found, self.base), frechet(found, self.drawn)
        row["diversity"] = diversity(found, self.form.each)
        right = tiny.shares(tiny.verdicts(self.encoder, images, self.texts))
        return {**row, "object": right["object"], "count": right["count"]}


def make_examiner(policy: Any, form: Form, cache: Path) -> Examiner:
    """The examiner of a policy's model; its reference pictures come from the model without its LoRA, made once."""
    name = policy.config.model.name
    file = cache / f"{name}-{form.steps}-{form.reference}.safetensors"
    if not file.is_file():
        each = form.reference // len(PROMPTS)
        with policy.reference():
            base = pictures(policy, each, REFERENCE, form.steps)
        encoder = load_image_encoder(MODELS / "emoji-align")
        drawings = drawn(each, REFERENCE)
        state = {"base": tiny.features(encoder, base), "drawn": tiny.features(encoder, drawings)}
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(state, temporary)
        temporary.replace(file)
    state = load_file(file)
    return Examiner(form, state["base"], state["drawn"])
