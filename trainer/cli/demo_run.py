"""The demo: align the embedded model in about a minute, and show before and after."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.plotting.grids import before_after

from ..config.loading import build
from ..config.schema import Config
from ..evaluation.sampling import Draw, Guide, sample, sampling_policy
from ..runs.folder import RunFolder
from ..runs.rewards import load_rewards

PROMPTS = (
    "a fox",
    "a panda",
    "a frog",
    "a rocket",
    "a house",
    "a pig",
    "a tree",
    "a mushroom",
)


def demo_config(name: str, folder: Path, updates: int, seed: int) -> Config:
    """More colourful pictures, with full PCPO on emoji-flow; alignment, held out, tells what that costs.

    Thirty updates stop before colourfulness dissolves the objects, which forty do.
    """
    tree = {
        "prompts": {"lines": list(PROMPTS)},
        "rollout": {"prompts_per_update": 4, "group_size": 8, "steps": 10, "images_at_once": 16},
        "reward": {"weights": {"colorfulness": 1.0}, "held_out": ["alignment"]},
        "objective": {"clip_range": 1e-3},
        "optimizer": {"learning_rate": 4e-3},
        "lora": {"rank": 8},
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

    def gain(self, reward: str) -> tuple[float, float, float]:
        """Mean before, mean after, and the difference in standard deviations of before."""
        before, after = self.scores[reward]
        spread = float(before.std(correction=0))
        rise = float(after.mean() - before.mean())
        return float(before.mean()), float(after.mean()), rise / spread if spread else float("nan")


SHOWN = {"steps": 20, "cfg": 2.5}


def compare(config: Config, folder: RunFolder, prompts: list[str], seed: int, each: int) -> Comparison:
    """Sample `each` pictures per prompt from the base and from the run's latest checkpoint, and score them.

    They are sampled as one would use the model, with more steps than in training and with guidance.
    """
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=SHOWN)})
    how = Draw(seed, config.rollout.steps, each=each)
    guide = Guide(folder.lora(), ImplicitReward(1.0))
    policy = sampling_policy(config, [guide.pairs])
    before = sample(policy, prompts, [], how)
    after = sample(policy, prompts, [guide], how)
    texts = [p for p in prompts for _ in range(each)]
    rewards = load_rewards(config)
    scores = {name: (r.score(before, texts), r.score(after, texts)) for name, r in rewards.items()}
    return Comparison(before, after, scores, texts)


def draw(comparison: Comparison, reward: str, path: Path, most: int = 8) -> None:
    """Before and after, one picture per prompt."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(comparison.prompts):
        first.setdefault(prompt, row)
    rows = torch.tensor(list(first.values())[:most])
    scores = comparison.scores[reward]
    image = before_after(
        comparison.before[rows],
        comparison.after[rows],
        [comparison.prompts[i] for i in rows.tolist()],
        (scores[0][rows].tolist(), scores[1][rows].tolist()),
    )
    image.save(path)
