"""The demo: align the embedded model in a minute, and compare it with the model before on held-out prompts."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.metrics.features import Tiny, extract
from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.plotting.grids import before_after
from comfyui_pcpo.reward import Reward
from comfyui_pcpo.tiny.align import AlignImageEncoder, load_image_encoder
from comfyui_pcpo.tiny.tinyeval import HARD, drawing_features, shares, suite_prompts

from ..config.loading import build, merge
from ..config.schema import Config
from ..runs.folder import RunFolder
from ..runs.rewards import make_rewards
from .metrics import judged
from .options import DemoReward
from .sampling import Draw, Guide, sample, sampling_policy

# combinations that the model was trained on, of the kinds that it often gets wrong
DEMO_PROMPTS = (
    "a fox and a panda",
    "a star and a rocket",
    "a donut and a pizza",
    "a cactus and a house",
    "a pig and a tree",
    "a car and a balloon",
    "an octopus and a heart",
    "a banana and a frog",
    "a mushroom and a star",
    "a sunflower and a pig",
    "a frog above an apple",
    "a pig above a star",
    "a balloon above a car",
    "a tree above a rocket",
    "a heart above a pizza",
    "an octopus above a house",
    "a heart left of a banana",
    "a pig left of a cactus",
    "a pizza left of a panda",
    "a house left of a fox",
    "a star left of a mushroom",
    "a car left of a butterfly",
    "a red circle and a blue square on a white background",
    "a yellow triangle and a green circle on a pink background",
    "an orange square and a purple circle on a white background",
    "a pink circle and a green square on a white background",
    "a green triangle and a white circle on a purple background",
    "a red triangle and a white circle on a green background",
    "a yellow square and a pink circle on a white background",
    "a purple circle and an orange triangle on a green background",
    "a blue square and an orange circle on a white background",
    "four foxes on a blue background",
)
DEMO_STEPS = 8
IMAGES_PER_PROMPT = 2  # in the comparison
PAIRS_SHOWN = 8  # in the image


@dataclass(frozen=True)
class DemoRecipe:
    """How the demo trains on a reward, by what docs/results.md found."""

    method: str
    updates: int
    sections: dict[str, Any]  # of the configuration


DEMO_RECIPES: dict[DemoReward, DemoRecipe] = {
    "tinyeval": DemoRecipe(
        "DiffusionNFT",
        20,
        {
            "rollout": {"prompts_per_update": 2, "group_size": 8},
            "reward": {  # correct images of a prompt tend to look alike
                "weights": {"tinyeval": 1.0, "tiny_diversity": 0.2},
                "held_out": ["polish"],
            },
            "objective": {"name": "nft", "kl_weight": 0.3},
            "optimizer": {"learning_rate": 4e-3, "minibatches": 2},
            "guard": {"every": 10},
            "run": {"save_every": 10},
        },
    ),
    "colorfulness": DemoRecipe(
        "PCPO",
        30,
        {
            "rollout": {"prompts_per_update": 4, "group_size": 16, "branch": 1, "branch_first": 3},
            "reward": {"weights": {"colorfulness": 1.0}, "held_out": ["tinyeval", "polish"]},
            "objective": {"clip_range": 1e-3},
            "optimizer": {"learning_rate": 2e-3, "minibatches": 1},
            "guard": {"every": 5, "tolerance": 0.4, "diversity_tolerance": 0.4},
            "run": {"save_every": 5},
        },
    ),
}


def demo_config(reward: DemoReward, name: str, folder: Path, updates: int | None, seed: int) -> Config:
    """A run on emoji-flow: `tinyeval` rewards following the prompt, `colorfulness` is easily hacked."""
    recipe = DEMO_RECIPES[reward]
    run = {"name": name, "folder": str(folder), "updates": recipe.updates if updates is None else updates, "seed": seed}
    common = {
        "prompts": {"lines": list(DEMO_PROMPTS)},
        "rollout": {"steps": DEMO_STEPS, "images_at_once": 16},
        "lora": {"rank": 4},
        "guard": {"prompts": 8},
        "run": run,
    }
    return build(merge(common, recipe.sections), "demo")


@dataclass(frozen=True)
class Side:
    """Images of the hard tasks' prompts, (B, H, W, 3), and what is measured on them."""

    images: Tensor
    right: list[bool]  # whether an image shows all that its prompt asks for
    shares: dict[str, float]  # of correct images, by task
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


@dataclass(frozen=True)
class Measures:
    """The networks that measure both sides."""

    reader: AlignImageEncoder
    rewards: dict[str, Reward]


def compare_with_base(config: Config, folder: RunFolder, seed: int) -> Comparison:
    """Sample the hard tasks from the base model and with the LoRA that a run ended with, and measure both."""
    prompts = list(suite_prompts(HARD))
    texts = [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]
    settings = Draw(seed, config.rollout.steps, each=IMAGES_PER_PROMPT)
    guide = Guide(folder.lora("final"), ImplicitReward(1.0))
    policy, measures = sampling_policy(config, [guide.pairs]), Measures(load_image_encoder(), make_rewards(config))
    before, after = (
        measure_side(measures, sample(policy, prompts, guides, settings), texts) for guides in ([], [guide])
    )
    return Comparison(before, after, texts, int(folder.checkpoint("final").name))


def measure_side(measures: Measures, images: Tensor, texts: list[str]) -> Side:
    """Everything that is reported of one side's images, (B, H, W, 3)."""
    features = extract(Tiny(measures.reader), images)[0]
    right = judged(measures.reader, images, texts)
    rewards = {name: float(r.score(images, texts, IMAGES_PER_PROMPT).mean()) for name, r in measures.rewards.items()}
    distance = frechet(features, drawing_features(HARD))
    return Side(images, right, shares(right, texts), rewards, diversity(features, IMAGES_PER_PROMPT), distance)


def save_comparison(comparison: Comparison, path: Path) -> None:
    """Save PAIRS_SHOWN pairs of images, first those that were wrong before training."""
    before, after = comparison.before, comparison.after
    rows = chosen(before.right, len(HARD))
    verdicts = [before.right[i] for i in rows], [after.right[i] for i in rows]
    prompts = [comparison.prompts[i] for i in rows]
    before_after(before.images[rows], after.images[rows], prompts, verdicts).save(path)


def chosen(right: list[bool], tasks: int) -> list[int]:
    """Rows to show, each the first image of its prompt: first those wrong before training, of every task in turn.

    What they show after training plays no part.
    """
    parts = torch.arange(0, len(right), IMAGES_PER_PROMPT).chunk(tasks)
    turns = [sorted(part.tolist(), key=lambda i: right[i]) for part in parts]
    rows = sorted(chain.from_iterable(zip(*turns, strict=True)), key=lambda i: right[i])
    return sorted(rows[:PAIRS_SHOWN])
