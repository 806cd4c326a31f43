"""The demo: align the embedded model in two minutes, and compare it with the model before on prompts never trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.metrics.features import extract, load_tiny_features
from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.plotting.grids import before_after
from comfyui_pcpo.tiny.tinyeval import HARD, drawing_features, shares, suite_prompts

from ..config.loading import build
from ..config.schema import Config
from ..runs.folder import RunFolder
from ..runs.rewards import load_rewards
from .metrics import judged, load_reader
from .sampling import Draw, Guide, sample, sampling_policy

DemoReward = Literal["tinyeval", "colorfulness"]
# combinations that the model was trained on, of the kinds that it often gets wrong
DEMO_PROMPTS = (
    "a fox and a panda",
    "a star and a rocket",
    "a donut and a pizza",
    "a cactus and a house",
    "a frog above an apple",
    "a pig left of a cactus",
    "a balloon above a car",
    "a heart left of a banana",
    "three mushrooms on a white background",
    "four foxes on a blue background",
    "three stars on a purple background",
    "four apples on a green background",
    "a red circle and a blue square on a white background",
    "a yellow triangle and a green circle on a pink background",
    "an orange square and a purple circle on a white background",
    "a pink circle and a green square on a white background",
)
IMAGES = 2  # of each prompt, in the comparison
SHOWN = 8  # pairs in the image


def demo_config(reward: DemoReward, name: str, folder: Path, updates: int, seed: int) -> Config:
    """PCPO on emoji-flow: `tinyeval` rewards what was asked for, `colorfulness` can be hacked."""
    held_out = ["polish"] if reward == "tinyeval" else ["tinyeval", "polish"]
    tree = {
        "prompts": {"lines": list(DEMO_PROMPTS)},
        "rollout": {"prompts_per_update": 4, "group_size": 8, "steps": 10, "images_at_once": 16},
        "reward": {"weights": {reward: 1.0}, "held_out": held_out},
        "objective": {"clip_range": 1e-3},
        "optimizer": {"learning_rate": 4e-3},
        "lora": {"rank": 8},
        "guard": {"every": 5, "prompts": 8},
        "run": {"name": name, "folder": str(folder), "updates": updates, "seed": seed, "save_every": 10},
    }
    return build(tree, "demo")


@dataclass(frozen=True)
class Side:
    """Images of the hard tasks' prompts, (B, H, W, 3), and what is measured on them."""

    images: Tensor
    right: list[bool]  # whether all that was asked for is there
    shares: dict[str, float]  # of right images, by task
    rewards: dict[str, float]  # means
    diversity: float
    distance: float  # tiny FD to drawings


@dataclass(frozen=True)
class Comparison:
    """The same prompts and noise without and with the LoRA of update `update`."""

    before: Side
    after: Side
    prompts: list[str]  # (B,)
    update: int


def compare_with_base(config: Config, folder: RunFolder, seed: int) -> Comparison:
    """Sample the hard tasks from the base model and with the LoRA that a run ended with, and measure both."""
    prompts = list(suite_prompts(HARD))
    texts = [prompt for prompt in prompts for _ in range(IMAGES)]
    settings = Draw(seed, config.rollout.steps, each=IMAGES)
    guide = Guide(folder.lora("final"), ImplicitReward(1.0))
    policy = sampling_policy(config, [guide.pairs])
    before, after = (measure(config, sample(policy, prompts, guides, settings), texts) for guides in ([], [guide]))
    return Comparison(before, after, texts, int(folder.checkpoint("final").name))


def measure(config: Config, images: Tensor, texts: list[str]) -> Side:
    features = extract(load_tiny_features(), images)[0]
    right = judged(load_reader(), images, texts)
    rewards = {name: float(r.score(images, texts, IMAGES).mean()) for name, r in load_rewards(config).items()}
    distance = frechet(features, drawing_features(HARD))
    return Side(images, right, shares(right, texts), rewards, diversity(features, IMAGES), distance)


def save_comparison(comparison: Comparison, path: Path) -> None:
    """Save SHOWN pairs, evenly spaced over the images of prompts that the model often gets wrong before."""
    before, after = comparison.before, comparison.after
    rows = chosen(before.right, len(HARD))
    verdicts = [before.right[i] for i in rows], [after.right[i] for i in rows]
    prompts = [comparison.prompts[i] for i in rows]
    before_after(before.images[rows], after.images[rows], prompts, verdicts).save(path)


def chosen(right: list[bool], tasks: int) -> list[int]:
    """Rows to show: of each task equally many, the first that are wrong before training, however they end."""
    rows = torch.arange(len(right)).chunk(tasks)
    found = [sorted(part.tolist(), key=lambda i: right[i])[: SHOWN // tasks] for part in rows]
    return [i for part in found for i in part]
