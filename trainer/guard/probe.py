"""What the guard measures: images of fixed prompts from fixed noise, their scores and their features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.method.samplers import deterministic
from comfyui_pcpo.metrics.features import extract, load_tiny_features
from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..config.schema import Config
from ..fingerprints import fingerprint, reward_fingerprints
from ..loop.distributed import Processes
from ..loop.scoring import ImageGroups, score, unattended
from ..memory.transfer import upload
from ..policy.base import Condition, Policy

SEED = 0x6A4D  # apart from the seeds of updates, whose second part counts from 1
FEATURE_SIDE = 16  # side of the downsampled images that serve as features where no encoder is at hand


@dataclass(frozen=True)
class ImageMeasures:
    """Scores and features of the guard's images, prompt after prompt."""

    scores: dict[str, Tensor]  # reward -> (P * G,)
    features: Tensor  # (P * G, D)


@dataclass(frozen=True)
class Probe:
    """Samples and measures the guard's images; the same noise every time, and no random numbers of the run."""

    policy: Policy
    config: Config
    prompts: list[str]  # of the run
    rewards: dict[str, Reward]
    processes: Processes
    tick: Callable[[], None]
    content: str | None = None  # of a model that a host has loaded

    @cached_property
    def texts(self) -> list[str]:
        """The prompt of each image, (P * G,): prompts evenly spaced over the run's."""
        count = min(self.config.guard.prompts, len(self.prompts))
        spaced = [self.prompts[k * len(self.prompts) // count] for k in range(count)]
        return [prompt for prompt in spaced for _ in range(self.config.guard.images)]

    @property
    def evaluations(self) -> int:
        """Latents that the model predicts for a measurement, in each process."""
        return len(self.texts) * self.config.rollout.steps

    @cached_property
    def condition(self) -> Condition:
        return self.policy.encode([str(text) for text in self.texts])

    @cached_property
    def identity(self) -> str:
        """What measurements depend on besides the LoRA; equal only if they can be compared."""
        m, r, reward = self.config.model, self.config.rollout, self.config.reward
        levels = [round(level, 3) for level in self.policy.grid(r.steps).levels.tolist()]
        model = (m.name, m.config, m.precision, m.quantize, fingerprint(Path(m.name)), self.content, levels)
        sampling = (self.config.run.seed, r.steps, r.cfg, r.guidance, self.policy.latent_shape)
        trained = (sorted(reward.last_weights.items()), reward.standardises, reward.precision)
        scores = (sorted(self.rewards), sorted(reward_fingerprints(self.rewards).items()), trained)
        return repr((model, self.config.prompts.negative, sampling, self.texts, scores))

    @property
    def digest(self) -> str:
        """The identity in short."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:12]

    def measure(self) -> ImageMeasures:
        """The policy as it is. Every process measures all images; the results are those of the main one."""
        images = self.images()
        groups = ImageGroups(images, self.texts, self.config.guard.images)
        scores = score(unattended(self.rewards), groups, offload=self.config.reward.offload)
        return ImageMeasures(
            {name: self._shared(values) for name, values in scores.items()}, self._shared(self.features(images))
        )

    def images(self) -> Tensor:
        """(P * G, H, W, 3) by the deterministic sampler."""
        grid = self.policy.grid(self.config.rollout.steps)
        each, at_once = self.config.guard.images, self.config.rollout.images_at_once
        seeds = [derive_seed(self.config.run.seed, 0, group, SEED) for group in range(len(self.texts) // each)]
        noise = GroupNoise(seeds, each, self.policy.latent_shape)

        def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
            self.tick()
            return self.policy.predict(upload(x, self.policy.device), t, self.condition.rows(rows.tolist()))

        chunks = torch.arange(len(self.texts)).split(at_once)
        final = rollout(predict, grid, deterministic(grid), noise, chunks).final
        return torch.cat([self.policy.decode(x) for x in final.split(at_once)])

    @cached_property
    def encoder(self) -> Any:
        """The embedded encoder, for images of the embedded models only."""
        return load_tiny_features() if self.config.model.name in EMBEDDED else None

    def features(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) -> (N, D): the embedded encoder's, or downsampled pixels."""
        if self.encoder is not None:
            return extract(self.encoder, images)[0]
        return F.interpolate(images.permute(0, 3, 1, 2), (FEATURE_SIDE, FEATURE_SIDE), mode="area").flatten(1)

    def _shared(self, values: Tensor) -> Tensor:
        return self.processes.gather(values)[: len(values)]
