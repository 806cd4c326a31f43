"""The examination: the same prompts and the same noise for every model, on the sampler without noise (the ODE)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.method.samplers import deterministic
from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, PATTERNS, Scene, parse
from comfyui_pcpo.tiny.pipelines import MODELS
from tools.tiny.card import features
from tools.tiny.draw import draw, glyphs
from trainer.policy.base import Policy

from .methods import PROMPTS, REWARDS, Form

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
    """Drawn pictures of the prompts with every background equally likely, -> (P * each, H, W, 3)."""
    rng, tiles, found = np.random.default_rng(seed), glyphs(), []
    for prompt in PROMPTS:
        scene = parse(prompt)
        assert scene is not None
        for _ in range(each):
            color, pattern = list(COLORS)[rng.integers(len(COLORS))], PATTERNS[rng.integers(len(PATTERNS))]
            full = Scene(scene.objects, 1, ("small", "big")[rng.integers(2)], color, pattern)
            found.append(np.asarray(draw(full, tiles, rng), np.float32) / 255)
    return torch.from_numpy(np.stack(found))


@dataclass
class Evaluator:
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
        found = features(self.encoder, images)
        row["fd_base"], row["fd_drawn"] = frechet(found, self.base), frechet(found, self.drawn)
        row["diversity"] = diversity(found, self.form.each)
        row["object"], row["count"] = follows(self.encoder.read(found), self.texts)
        return row


def follows(read: dict[str, Tensor], prompts: list[str]) -> tuple[float, float]:
    """Shares of pictures whose kind of object, and whose number of objects, emoji-align reads as the prompt says."""
    names, right = list(OBJECTS), torch.zeros(len(prompts), 2)
    for row, prompt in enumerate(prompts):
        scene = parse(prompt)
        assert scene is not None
        asked = {names.index(name) for name in scene.objects}
        right[row, 0] = set(read["objects"][row].topk(len(asked)).indices.tolist()) == asked
        right[row, 1] = int(read["total"][row].argmax()) + 1 == scene.total
    return float(right[:, 0].mean()), float(right[:, 1].mean())


def make_evaluator(policy: Any, form: Form, cache: Path) -> Evaluator:
    """The examiner of a policy's model; its reference pictures come from the model without its LoRA, made once."""
    name = policy.config.model.name
    file = cache / f"{name}-{form.steps}-{form.reference}.safetensors"
    if not file.is_file():
        each = form.reference // len(PROMPTS)
        with policy.reference():
            base = pictures(policy, each, REFERENCE, form.steps)
        encoder = load_image_encoder(MODELS / "emoji-align")
        state = {"base": features(encoder, base), "drawn": features(encoder, drawn(each, REFERENCE))}
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(state, temporary)
        temporary.replace(file)
    state = load_file(file)
    return Evaluator(form, state["base"], state["drawn"])
