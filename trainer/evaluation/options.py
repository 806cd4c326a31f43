"""The options of `sample` and `evaluate`, without importing a heavy library."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.errors import ConfigError

DemoReward = Literal["tinyeval", "colorfulness"]

RANGES: dict[str, tuple[float, float]] = {
    "seeds": (1, 10_000),
    "images": (1, 100_000),
    "steps": (1, 1000),
    "seed": (0, 2**53),
    "first_seed": (0, 2**53),
    "cfg": (0, 30),
    "noise_level": (-1, 2),
}


@dataclass(frozen=True)
class SamplingOptions:
    """What to sample.

    Parameters
    ----------
    prompt
        Prompt; may be given several times.
    compare
        Also sample the base model from the same noise.
    guide
        LORA=WEIGHT, may be given several times: implicit reward guidance on the base model. Weight 1 is the LoRA
        itself, 2 extrapolates beyond it, -1 moves away from it.
    negative
        Negative prompt; default: the run's.
    seed
        Noise seed.
    steps
        Denoising steps.
    cfg
        Classifier-free guidance scale; default: the run's.
    noise_level
        Noise level of the sampler; 0 is deterministic, -1 samples as in training.
    images
        Images per prompt.
    """

    prompt: list[str]
    compare: bool = False
    guide: list[str] | None = None
    negative: str | None = None
    seed: int = 0
    steps: int = 20
    cfg: float | None = None
    noise_level: float = 0.0
    images: int = 4

    def __post_init__(self) -> None:
        check_ranges(vars(self))


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Parameters
    ----------
    prompts
        Text file with one prompt per line; default: the run's prompts.
    suite
        tinyeval: 120 prompts in six tasks, none of whose combinations the embedded models were trained on; adds the
        share of correct images per task.
    rewards
        Rewards to measure; default: the run's training and held-out rewards.
    reference
        Folder of real images, the reference of the Frechet distances.
    seeds
        Number of repetitions with different noise; the statistics are over seeds.
    images
        Images per prompt and seed.
    steps
        Denoising steps; sampling is deterministic.
    cfg
        Classifier-free guidance scale; default: the run's.
    first_seed
        Seed of the first repetition.
    checkpoint
        final (kept by the guard, or the latest), latest, best, kept, or the number of an update.
    inception
        Inception weights in torch-fidelity's format, for FID and Inception Score.
    dino
        Folder with DINOv2 (facebook/dinov2-large), for FD-DINOv2.
    lpips
        torchvision's AlexNet weights, with the heads alex.pth in the same folder, for LPIPS diversity.
    folder
        Folder with reward model weights; default: the run's, or models/rewards.
    """

    prompts: Path | None = None
    suite: Literal["tinyeval"] | None = None
    rewards: tuple[str, ...] | None = None
    reference: Path | None = None
    seeds: int = 4
    images: int = 4
    steps: int = 20
    cfg: float | None = None
    first_seed: int = 0
    checkpoint: str = "final"
    inception: Path | None = None
    dino: Path | None = None
    lpips: Path | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        if self.suite is not None and self.prompts is not None:
            raise ConfigError(
                f"--suite {self.suite} has its own prompts, but --prompts {self.prompts} is given too. Use one of them."
            )
        if self.images == self.seeds == 1:
            raise ConfigError(
                "--images 1 and --seeds 1 give a single image per prompt, too few for statistics. Use 2 or more of one."
            )


def check_ranges(values: dict[str, object]) -> None:
    """Raise ConfigError for a number outside its range; None means that the option was not given."""
    for name, (low, high) in RANGES.items():
        value = values.get(name)
        if isinstance(value, int | float) and not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be between {low:,} and {high:,}.")
