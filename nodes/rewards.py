"""Rewards: load, combine, and score images with them."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.reward import REWARDS, Reward, RewardSettings, load_reward, offered
from comfyui_pcpo.reward.base import on_its_device
from comfyui_pcpo.reward.combine import CombinedScores, combine
from comfyui_pcpo.reward.user import user_reward_folder
from comfyui_pcpo.reward.weights.checkpoint import file_path

from ..trainer.config.schema import ConfigError
from .files import reward_folder
from .host.prompt_syntax import plain_prompt
from .images import to_comfy_image
from .inputs import ADVANCED, checked
from .types import RewardType, WeightedRewards

logger = logging.getLogger("pcpo")
TRAINER = Path(__file__).resolve().parents[1] / "trainer"  # its folder runs as a command from anywhere
REWARD_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def single_reward(name: str, dtype: str = "float32") -> WeightedRewards:
    """One reward on ComfyUI's device; its weights are read when it first scores images."""
    settings = RewardSettings(
        weights_folder(name), str(mm.get_torch_device()), REWARD_DTYPES[dtype],
        tick=mm.throw_exception_if_processing_interrupted, plain=plain_prompt, make_room=make_room,
        download=f'run: "{sys.executable}" "{TRAINER}" download',
    )  # fmt: skip
    return WeightedRewards((load_reward(name, settings),), (1.0,))


def weights_folder(name: str) -> Path | None:
    """The folder of models/rewards that has the reward's files, otherwise the first one."""
    return reward_folder([str(file_path(Path(), file)) for file in REWARDS[name].files] if name in REWARDS else [])


def make_room(size: int) -> None:
    """Let ComfyUI free this many bytes of GPU memory for a reward, and what scoring takes."""
    with torch.inference_mode():  # in which ComfyUI moves its models
        mm.free_memory(size + mm.minimum_inference_memory(), mm.get_torch_device())


def require_scorable(reward: WeightedRewards, prompts: Sequence[str]) -> None:
    """Raise ConfigError for a prompt that one of the rewards cannot score."""
    from ..trainer.runs.rewards import require_prompts  # imports all that learned rewards need

    require_prompts({one.name: one for one in reward.rewards}, prompts)


def scored(reward: WeightedRewards, images: Tensor, prompts: Sequence[str]) -> tuple[CombinedScores, list[str]]:
    """All scores of images (B, H, W, 3), and a sentence for each reward of which some failed.

    Each reward is on its device only while it scores.
    """
    require_scorable(reward, prompts)
    scores, failed = list[Tensor](), list[str]()
    bar = ProgressBar(len(reward.rewards))
    for one in reward.rewards:
        one.failure = ""  # of an earlier time
        with on_its_device(one):
            scores.append(one.score(images, list(prompts)))
        failed += failed_scores(one, scores[-1])
        bar.update(1)
    return combine(scores, reward.weights), failed


def failed_scores(reward: Reward, scores: Tensor) -> list[str]:
    """A sentence with the reason of a reward's failed scores (B,); none if all are there."""
    count = int((~scores.isfinite()).sum())
    return [f"{count} of {len(scores)} {reward.name} scores failed ({reward.failure_reason})."] if count else []


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadReward",
            display_name="Load Reward",
            category="PCPO/reward",
            description="A reward: it scores an image, most rewards together with its prompt.",
            search_aliases=["hpsv2", "pickscore", "imagereward", "aesthetic score", "clip score"],
            inputs=[
                io.Combo.Input(
                    "reward", options=offered(), default="colorfulness",
                    tooltip="hps*, pickscore, imagereward, aesthetic, clip*, bertscore and diversity need weights in "
                    "models/rewards; the others need no files there. alignment, polish and tiny* score images of the "
                    "tiny models.",
                ),
                io.Combo.Input(
                    "dtype", options=list(REWARD_DTYPES), default="float32", **ADVANCED,
                    tooltip="Precision of the reward model; float16 halves its memory.",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Score Images, Train LoRA and Compare.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, reward: str | None = None, dtype: str | None = None) -> str | float:
        """Where its weights are, and when the files of one's own rewards changed."""
        if reward is None:
            return float("nan")  # linked, and not known yet; NaN equals nothing, so the node runs
        folder = None if reward in REWARDS else user_reward_folder()
        own = sorted(folder.glob("*.py")) if folder else []
        return f"{weights_folder(reward)} {[(str(file), file.stat().st_mtime_ns) for file in own]}"

    @classmethod
    @checked
    def execute(cls, reward: str, dtype: str = "float32") -> io.NodeOutput:
        return io.NodeOutput(single_reward(reward, dtype))


def weight_input(name: str, which: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=1.0, min=-100.0, max=100.0, step=0.05,
        tooltip=f"Weight of the {which} reward; a negative weight minimizes it.",
    )  # fmt: skip


def warn_of_another_standardise(name: str, given: WeightedRewards, standardise: bool) -> None:
    """Log that a combination's own `standardise` has no effect in a later one that differs."""
    if len(given.rewards) > 1 and given.standardise != standardise:
        own, here = ("on" if value else "off" for value in (given.standardise, standardise))
        logger.warning(
            "PCPO: %s combines %d rewards with standardise %s, but here it is %s, which decides for all rewards. Set "
            "both alike.", name, len(given.rewards), own, here,
        )  # fmt: skip


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOCombineRewards",
            display_name="Combine Rewards",
            category="PCPO/reward",
            description="Weighted sum of two rewards; chain it to combine more.",
            search_aliases=["multi reward", "weighted reward", "sum rewards"],
            inputs=[
                RewardType.Input("reward_a", tooltip="First reward, or an earlier combination."),
                weight_input("weight_a", "first"),
                RewardType.Input("reward_b", tooltip="Second reward, or an earlier combination."),
                weight_input("weight_b", "second"),
                io.Boolean.Input(
                    "standardise", default=True, **ADVANCED,
                    tooltip="In training, z-score each reward within its group before the sum. In a chain, the last "
                    "node decides for all rewards.",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="The combined reward.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, reward_a, weight_a, reward_b, weight_b, standardise=True) -> io.NodeOutput:
        for name, given in (("reward_a", reward_a), ("reward_b", reward_b)):
            warn_of_another_standardise(name, given, standardise)
        weights = (*(weight_a * w for w in reward_a.weights), *(weight_b * w for w in reward_b.weights))
        return io.NodeOutput(WeightedRewards((*reward_a.rewards, *reward_b.rewards), weights, standardise))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOScoreImages",
            display_name="Score Images",
            category="PCPO/reward",
            description="Scores images with a reward and sorts them, best first.",
            search_aliases=["rate images", "best of n", "sort images", "filter images"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to score."),
                RewardType.Input("reward", tooltip="The reward, or a combination of several."),
                io.String.Input("prompt", default="", multiline=True, tooltip="The prompt of the images."),
                io.Int.Input(
                    "keep_best", default=0, min=0, max=4096, tooltip="Number of best images to output; 0 outputs all."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images, best first."),
                io.Float.Output(display_name="scores", tooltip="Their scores, best first.", is_output_list=True),
                io.String.Output(display_name="report", tooltip="All scores as text, for Preview as Text."),
                io.Image.Output(display_name="grid", tooltip="All images with their scores."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images: Tensor, reward: WeightedRewards, prompt: str, keep_best: int) -> io.NodeOutput:
        scores, failed = scored(reward, images, [prompt] * len(images))
        if failed and not scores.total.isfinite().any():
            raise ConfigError(f"{' '.join(failed)} Fix the reward, the prompt or the images.")
        order = scores.total.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        kept, totals, parts = order[: keep_best or None], scores.total[order], scores.components[:, order]
        report = "\n".join([score_report(totals, parts, reward.names, prompt), *failed])
        shown = to_comfy_image(grid(images[order][..., :3], [f"{s:.3f}" for s in totals.tolist()]))
        preview = ui.PreviewImage(shown, cls=cls)
        return io.NodeOutput(images[kept], totals[: len(kept)].tolist(), report, shown, ui=preview)


def score_report(totals: Tensor, parts: Tensor, names: list[str], prompt: str) -> str:
    """Mean and best score, then a line per image with each reward's part where there are several."""
    lines = [f"{len(totals)} images, mean {totals.nanmean():.3f}, best {totals[0]:.3f}" + (prompt and f": {prompt}")]
    for rank, (total, part) in enumerate(zip(totals.tolist(), parts.T.tolist(), strict=True), 1):
        each = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, part, strict=True))
        lines.append(f"{rank}. {total:.3f}" + (f" ({each})" if len(names) > 1 else ""))
    return "\n".join(lines)
