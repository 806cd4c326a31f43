"""Evaluation of a model: the same prompts and the same noise every time, sampled without noise (ODE)."""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.method.samplers import deterministic
from comfyui_pcpo.metrics.features import extract, load_tiny_features
from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.pipelines import MODELS, SHARED
from tools.tiny import measure as tiny
from trainer.policy.base import Policy

from .recipes import STUDY_PROMPTS, STUDY_REWARDS
from .studies import Study

EVALUATION_SEED, REFERENCE_SEED = 9001, 9002  # of the noise, unlike those of any run


@torch.no_grad()
def ode_images(
    policy: Policy, per_prompt: int, seed: int, steps: int, prompts: tuple[str, ...] = STUDY_PROMPTS
) -> Tensor:
    """`per_prompt` images of each prompt by the ODE, -> (B, H, W, 3); the noise depends on seed and prompt only."""
    grid = policy.grid(steps)
    condition = policy.encode(list(prompts)).rows([p for p in range(len(prompts)) for _ in range(per_prompt)])
    noise = GroupNoise([derive_seed(seed, p) for p in range(len(prompts))], per_prompt, policy.latent_shape)

    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        return policy.predict(x.to(policy.device), t, condition.rows(rows.tolist()))

    chunks = list(torch.arange(len(prompts) * per_prompt).split(32))
    final = rollout(predict, grid, deterministic(grid), noise, chunks).final
    return torch.cat([policy.decode(x) for x in final.split(32)])


def drawn_images(per_prompt: int, seed: int) -> Tensor:
    """Drawings of the prompts, every background equally likely, -> (B, H, W, 3)."""
    return tiny.drawn([prompt for prompt in STUDY_PROMPTS for _ in range(per_prompt)], seed)


@dataclass
class Evaluator:
    """Evaluates policies and images; `base` and `drawn` are features of the reference images, (N, 128) each."""

    study: Study
    base: Tensor
    drawn: Tensor
    before: dict[str, float] | None = None  # evaluation of the model without LoRA, cached

    def __post_init__(self) -> None:
        self.network = load_tiny_features()
        self.rewards = {name: load_reward(name) for name in STUDY_REWARDS}
        self.texts = [prompt for prompt in STUDY_PROMPTS for _ in range(self.study.images_per_prompt)]

    def evaluate_policy(self, policy: Policy) -> dict[str, float]:
        """Mean and standard deviation of every reward, tiny FD, diversity, share of images with the correct object."""
        return self.evaluate_images(ode_images(policy, self.study.images_per_prompt, EVALUATION_SEED, self.study.steps))

    def evaluate_images(self, images: Tensor) -> dict[str, float]:
        """The same of given images, ordered by prompt, (B, H, W, 3)."""
        row: dict[str, float] = {}
        for name, reward in self.rewards.items():
            scores = reward.score(images, self.texts)
            row[name], row[f"{name}_std"] = float(scores.mean()), float(scores.std(correction=0))
        (embedded,) = extract(self.network, images)
        row["fd_base"], row["fd_drawn"] = frechet(embedded, self.base), frechet(embedded, self.drawn)
        row["diversity"] = diversity(embedded, self.study.images_per_prompt)
        right = tiny.attribute_shares(tiny.verdicts(self.network.encoder, images, self.texts))
        return {**row, "object": right["object"], "count": right["count"]}


def weights_checksum(name: str) -> str:
    """Checksum of the weights that a model's reference features depend on: its own, the shared ones, emoji-align's."""
    folders = [MODELS / part for part in (name, SHARED.name, "emoji-align")]
    crc = 0
    for file in (file for folder in folders for file in sorted(folder.rglob("*.safetensors"))):
        crc = zlib.crc32(file.read_bytes(), crc)
    return f"{crc:08x}"


def make_evaluator(policy: Any, study: Study, cache: Path) -> Evaluator:
    """The evaluator for a policy's model; features of the reference images are computed once for the weights in use."""
    name = policy.config.model.name
    file = cache / f"{name}-{weights_checksum(name)}-{study.steps}-{study.reference_images}.safetensors"
    if not file.is_file():
        per_prompt = study.reference_images // len(STUDY_PROMPTS)
        with policy.reference():
            base = ode_images(policy, per_prompt, REFERENCE_SEED, study.steps)
        network = load_tiny_features()
        state = {
            "base": extract(network, base)[0],
            "drawn": extract(network, drawn_images(per_prompt, REFERENCE_SEED))[0],
        }
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(state, temporary)
        temporary.replace(file)
    state = load_file(file)
    return Evaluator(study, state["base"], state["drawn"])
