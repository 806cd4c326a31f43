"""Evaluation of a model: the same prompts and the same noise every time, sampled without noise (ODE)."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from comfyui_pcpo.tiny.tinyeval import HARD, PROMPTS_PER_TASK, shares, suite
from trainer.evaluation.metrics import judged
from trainer.loop.finite import Diverged
from trainer.policy.base import Policy

from .recipes import STUDY_REWARDS
from .studies import Study

EVALUATION_SEED, REFERENCE_SEED, TINYEVAL_SEED = 9001, 9002, 9003  # of the noise, unlike those of any run
EVALUATED_AT_ONCE = 32


@torch.no_grad()
def ode_images(policy: Policy, per_prompt: int, seed: int, steps: int, prompts: Sequence[str]) -> Tensor:
    """`per_prompt` images of each prompt by the ODE, -> (B, H, W, 3); the noise depends on seed and prompt only.

    Raises Diverged for latents that are not finite.
    """
    grid = policy.grid(steps)
    condition = policy.encode(list(prompts)).rows([p for p in range(len(prompts)) for _ in range(per_prompt)])
    noise = GroupNoise([derive_seed(seed, p) for p in range(len(prompts))], per_prompt, policy.latent_shape)

    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        return policy.predict(x.to(policy.device), t, condition.rows(rows.tolist()))

    chunks = list(torch.arange(len(prompts) * per_prompt).split(EVALUATED_AT_ONCE))
    final = rollout(predict, grid, deterministic(grid), noise, chunks).final
    require_finite(final, "the latents")
    return torch.cat([policy.decode(x) for x in final.split(EVALUATED_AT_ONCE)])


def require_finite(values: Tensor, what: str) -> None:
    """Raise Diverged if an image's values are not all finite, (B, ...)."""
    if broken := int((~values.flatten(1).isfinite().all(1)).sum()):
        raise Diverged(f"{what} of {broken} of {len(values)} evaluated images are NaN or infinite.")


def tinyeval_prompts(count: int) -> tuple[str, ...]:
    """`count` prompts of each hard task, evenly spaced over its prompts."""
    return tuple(suite()[task][k * PROMPTS_PER_TASK // count] for task in HARD for k in range(count))


@dataclass(frozen=True)
class Evaluation:
    """What is generated in an evaluation."""

    images: int  # at most, equally many of each prompt and at least two
    reference_images: int
    steps: int
    prompts: tuple[str, ...]
    tinyeval_prompts: int = PROMPTS_PER_TASK  # of each hard task

    @property
    def per_prompt(self) -> int:
        return max(2, self.images // len(self.prompts))

    @property
    def texts(self) -> list[str]:
        """The prompt of each image."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]


def study_evaluation(study: Study, prompts: tuple[str, ...]) -> Evaluation:
    return Evaluation(study.images, study.reference_images, study.steps, prompts, study.tinyeval_prompts)


@dataclass
class Evaluator:
    """Evaluates policies and images; `base` has the features of the base model's reference images, (N, 128)."""

    evaluation: Evaluation
    base: Tensor
    before: dict[bool, dict[str, Any]] = field(default_factory=dict)  # of the model without LoRA, by `tinyeval`

    def __post_init__(self) -> None:
        self.network = load_tiny_features()
        self.rewards = {name: load_reward(name) for name in STUDY_REWARDS}

    def evaluate_base(self, policy: Policy, tinyeval: bool = False) -> dict[str, Any]:
        """Evaluation of the model without LoRA, computed once."""
        if tinyeval not in self.before:
            with policy.reference():
                self.before[tinyeval] = self.evaluate_policy(policy, tinyeval)
        return self.before[tinyeval]

    def evaluate_policy(self, policy: Policy, tinyeval: bool = False) -> dict[str, Any]:
        """The measures of images of the training prompts; with `tinyeval`, right images of prompts never trained."""
        e = self.evaluation
        row = self.evaluate_images(ode_images(policy, e.per_prompt, EVALUATION_SEED, e.steps, e.prompts))
        return {**row, "tinyeval_shares": self.tinyeval_shares(policy)} if tinyeval else row

    def evaluate_images(self, images: Tensor) -> dict[str, Any]:
        """Mean and standard deviation of every reward, tiny FD, diversity, share of right images, (B, H, W, 3).

        Raises Diverged for images and rewards that are not finite.
        """
        require_finite(images, "the pixels")
        row: dict[str, Any] = {}
        for name, reward in self.rewards.items():
            scores = reward.score(images, self.evaluation.texts)
            require_finite(scores[:, None], f"the scores in {name}")
            row[name], row[f"{name}_std"] = float(scores.mean()), float(scores.std(correction=0))
        (embedded,) = extract(self.network, images)
        row["fd_base"] = frechet(embedded, self.base)
        row["diversity"] = diversity(embedded, self.evaluation.per_prompt)
        right = judged(self.network.encoder, images, self.evaluation.texts)
        return {**row, "right": sum(right) / len(right)}

    def tinyeval_shares(self, policy: Policy) -> dict[str, float]:
        """TinyEval's hard tasks and their mean, one image per prompt."""
        prompts = tinyeval_prompts(self.evaluation.tinyeval_prompts)
        images = ode_images(policy, 1, TINYEVAL_SEED, self.evaluation.steps, prompts)
        require_finite(images, "the pixels")
        return shares(judged(self.network.encoder, images, prompts), prompts)


def checksum(name: str, evaluation: Evaluation) -> str:
    """Checksum of what a model's reference features depend on: weights, its own and shared ones, and prompts."""
    folders = [MODELS / part for part in (name, SHARED.name, "emoji-align")]
    crc = zlib.crc32("\n".join(evaluation.prompts).encode())
    for file in (file for folder in folders for file in sorted(folder.rglob("*.safetensors"))):
        crc = zlib.crc32(file.read_bytes(), crc)
    return f"{crc:08x}"


def make_evaluator(policy: Any, evaluation: Evaluation, cache: Path) -> Evaluator:
    """The evaluator for a policy's model; features of the reference images are computed once for the weights in use."""
    name, count = policy.config.model.name, evaluation.reference_images
    file = cache / f"{name}-{checksum(name, evaluation)}-{evaluation.steps}-{count}.safetensors"
    if not file.is_file():
        per_prompt = count // len(evaluation.prompts)
        with policy.reference():
            base = ode_images(policy, per_prompt, REFERENCE_SEED, evaluation.steps, evaluation.prompts)
        state = {"base": extract(load_tiny_features(), base)[0]}
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(state, temporary)
        temporary.replace(file)
    return Evaluator(evaluation, load_file(file)["base"])


_evaluators: dict[tuple[str, Evaluation], Evaluator] = {}


def shared_evaluator(policy: Any, evaluation: Evaluation, cache: Path) -> Evaluator:
    """The same evaluator for all runs of a process with the same model and evaluation."""
    key = (policy.config.model.name, evaluation)
    if key not in _evaluators:
        _evaluators[key] = make_evaluator(policy, evaluation, cache)
    return _evaluators[key]
