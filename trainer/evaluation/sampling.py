"""Sample images from a model without LoRA, with one, or with several composed by implicit reward guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward, irg
from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.method.samplers import resolve_method, transitions
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Transition

from ..config.schema import Config
from ..loop.objectives import make_objective
from ..loop.plan import training_transitions
from ..memory.transfer import upload
from ..policy.base import LoraPairs
from ..policy.diffusers_policy import DiffusersPolicy
from ..policy.encoded import Encoded
from ..policy.loading import load_configured
from ..policy.lora_pairs import padded


@dataclass(frozen=True)
class Guide:
    """One aligned model: its LoRA and the weight of its implicit reward."""

    pairs: LoraPairs
    reward: ImplicitReward


def sampling_policy(config: Config, loras: Sequence[LoraPairs], pipeline: Any = None) -> DiffusersPolicy:
    """The configured model (or `pipeline`) with an empty LoRA that can hold any of `loras`."""
    ranks = [len(down) for pairs in loras for down, _ in pairs.values()]
    lora = config.lora.model_copy(update={"rank": max(ranks, default=1), "alpha": None, "targets": "attention"})
    trained = {name for pairs in loras for name in pairs}
    return DiffusersPolicy(pipeline or load_configured(config.model), config.model_copy(update={"lora": lora}), trained)


def noisy(policy: DiffusersPolicy, grid: Grid, noise_level: float) -> list[Transition]:
    """The default sampler of the model's kind at this noise level."""
    return transitions(grid, resolve_method("auto", policy.kind), noise_level)


@dataclass(frozen=True)
class Draw:
    """How images are sampled; the noise depends only on the seed and the prompt's position in the list."""

    seed: int
    steps: int
    noise_level: float = 0.0  # negative: the method, noise level and sigma of training
    each: int = 1  # images per prompt


def untrained_seed(seed: int) -> int:
    """The seed of noise that no update of a run was trained on, even one of the same seed."""
    return derive_seed(seed, 0, 0, 2)


def sample(policy: DiffusersPolicy, prompts: Sequence[str], guides: Sequence[Guide], draw: Draw) -> Tensor:
    """Images of all prompts, those of a prompt consecutive, -> (P * each, H, W, 3) in [0, 1]."""
    condition = policy.encode(list(prompts)).rows(range(len(prompts)))
    return decoded(policy, sample_latents(policy, condition, guides, draw))


def decoded(policy: DiffusersPolicy, latents: Tensor) -> Tensor:
    """Clean latents (B, C, H, W) -> images (B, H, W, 3) in [0, 1]."""
    return torch.cat([policy.decode(x) for x in latents.split(policy.config.rollout.images_at_once)])


def sample_latents(policy: DiffusersPolicy, condition: Encoded, guides: Sequence[Guide], draw: Draw) -> Tensor:
    """Clean latents for every row of `condition`, those of a row consecutive, -> (P * each, C, H, W).

    RLG (arXiv 2508.21016):  out = out_base + sum_k lambda_k (out_k - out_base)
    """
    config, each, level = policy.config, draw.each, draw.noise_level
    grid = policy.grid(draw.steps)
    if level < 0:
        path = training_transitions(policy, config, make_objective(config), grid)
    else:
        path = noisy(policy, grid, level)
    room, count = policy.lora(), condition.count
    loras = [
        {name: (down.to(policy.device), up.to(policy.device)) for name, (down, up) in padded(guide.pairs, room).items()}
        for guide in guides
    ]
    noise = GroupNoise([derive_seed(draw.seed, n) for n in range(count)], each, policy.latent_shape)
    times = grid.timesteps.tolist()
    if len(loras) == 1:
        policy.load_lora(loras[0])

    def with_lora(k: int, x: Tensor, t: float, batch: Encoded) -> Tensor:
        if len(loras) > 1:
            policy.load_lora(loras[k])
        return policy.predict(x, t, batch)

    def predict(x: Tensor, t: float, rows: Tensor) -> Tensor:
        x, batch = upload(x, policy.device), condition.rows([row // each for row in rows.tolist()])
        progress = times.index(t) / len(times)
        weights = [guide.reward.weight_at(progress) for guide in guides]
        active = [k for k, weight in enumerate(weights) if weight != 0]
        if [weights[k] for k in active] == [1]:  # that model alone: the base prediction cancels
            return with_lora(active[0], x, t, batch)
        with policy.reference():
            base = policy.predict(x, t, batch)
        return irg(base, [with_lora(k, x, t, batch) for k in active], [weights[k] for k in active])

    chunks = torch.arange(count * each).split(config.rollout.images_at_once)
    return rollout(predict, grid, path, noise, list(chunks)).final
