"""The demo: align the embedded model in a minute or two, and compare it with the model before."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.plotting.grids import before_after

from ..config.loading import build, with_options
from ..config.schema import Config
from ..runs.folder import RunFolder
from ..runs.rewards import load_rewards
from .sampling import Draw, Guide, sample, sampling_policy

DEMO_PROMPTS = (
    "a fox",
    "a panda",
    "a frog",
    "a rocket",
    "a house",
    "a pig",
    "a tree",
    "a mushroom",
)
COMPARED_WITH = {"steps": 20, "cfg": 2.5}  # as one would use the model: more steps than in training, and guidance


def demo_config(name: str, folder: Path, updates: int, seed: int) -> Config:
    """More colourful images with full PCPO on emoji-flow; alignment, held out, measures the side effects.

    The default of thirty updates stops before colourfulness dissolves the objects, which happens at about forty.
    """
    tree = {
        "prompts": {"lines": list(DEMO_PROMPTS)},
        "rollout": {"prompts_per_update": 4, "group_size": 8, "steps": 10, "images_at_once": 16},
        "reward": {"weights": {"colorfulness": 1.0}, "held_out": ["alignment"]},
        "objective": {"clip_range": 1e-3},
        "optimizer": {"learning_rate": 4e-3},
        "lora": {"rank": 8},
        "guard": {"every": 5},
        "run": {"name": name, "folder": str(folder), "updates": updates, "seed": seed, "save_every": 10},
    }
    return build(tree, "demo")


@dataclass(frozen=True)
class Comparison:
    """The same prompts and noise without and with the LoRA."""

    before: Tensor  # (B, H, W, 3)
    after: Tensor
    scores: dict[str, tuple[Tensor, Tensor]]  # reward -> before (B,), after (B,)
    prompts: list[str]  # (B,)
    update: int  # the one whose LoRA it is

    def gain(self, reward: str) -> tuple[float, float, float]:
        """Mean before, mean after, and the difference in standard deviations of before."""
        before, after = self.scores[reward]
        spread = float(before.std(correction=0))
        difference = float(after.mean() - before.mean())
        return float(before.mean()), float(after.mean()), difference / spread if spread else float("nan")


def compare_with_base(config: Config, folder: RunFolder, seed: int, images: int) -> Comparison:
    """Sample `images` per prompt of the run from the base and with the LoRA that it ended with, and score them."""
    config = with_options(config, {"rollout": COMPARED_WITH})
    prompts = config.prompts.read()
    settings = Draw(seed, config.rollout.steps, each=images)
    guide = Guide(folder.lora("final"), ImplicitReward(1.0))
    policy = sampling_policy(config, [guide.pairs])
    before = sample(policy, prompts, [], settings)
    after = sample(policy, prompts, [guide], settings)
    texts = [prompt for prompt in prompts for _ in range(images)]
    rewards = load_rewards(config)
    scores = {name: (r.score(before, texts, images), r.score(after, texts, images)) for name, r in rewards.items()}
    return Comparison(before, after, scores, texts, int(folder.checkpoint("final").name))


def save_comparison(comparison: Comparison, reward: str, path: Path, most: int = 8) -> None:
    """Save before and after of one image per prompt, at most `most` of them."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(comparison.prompts):
        first.setdefault(prompt, row)
    rows = torch.tensor(list(first.values())[:most])
    before, after = comparison.scores[reward]
    before_after(
        comparison.before[rows],
        comparison.after[rows],
        [comparison.prompts[i] for i in rows.tolist()],
        (before[rows].tolist(), after[rows].tolist()),
    ).save(path)
