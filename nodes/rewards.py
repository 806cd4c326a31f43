"""Rewards: load, combine, and score pictures with them."""

from pathlib import Path

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.reward import REWARDS, RewardSettings, load_reward, offered
from comfyui_pcpo.reward.weights.checkpoint import file_path

from .files import reward_folder
from .images import to_image
from .types import RewardSum, RewardType

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def make_reward(name: str, dtype: str = "float32") -> RewardSum:
    """A reward on the host's device; its weights are read when it scores for the first time."""
    import comfy.model_management as mm

    files = [str(file_path(Path(), file)) for file in REWARDS[name].files] if name in REWARDS else []
    settings = RewardSettings(folder=reward_folder(files), device=str(mm.get_torch_device()), dtype=DTYPES[dtype])
    return RewardSum((load_reward(name, settings),), (1.0,))


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadReward",
            display_name="Load Reward",
            category="PCPO/reward",
            description="A reward model: it gives a picture (and its prompt) a number. Weights lie in models/rewards.",
            search_aliases=["hpsv2", "pickscore", "imagereward", "aesthetic score", "clip score"],
            inputs=[
                io.Combo.Input(
                    "reward", options=offered(), default="colorfulness",
                    tooltip="colorfulness, redness, jpeg_*, alignment and polish (for tiny models) need no files.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="float32", advanced=True, optional=True,
                    tooltip="Precision of the reward's network; float16 halves its memory.",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Score Images, Train LoRA and Compare.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, reward: str, dtype: str = "float32") -> io.NodeOutput:
        return io.NodeOutput(make_reward(reward, dtype))


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05}
        return io.Schema(
            node_id="PCPOCombineRewards",
            display_name="Combine Rewards",
            category="PCPO/reward",
            description="Two rewards, each with its weight, as one; chain it for more.",
            search_aliases=["multi reward", "weighted reward", "sum rewards"],
            inputs=[
                RewardType.Input("reward_a", tooltip="First reward, or an earlier combination."),
                io.Float.Input("weight_a", **weight, tooltip="How much the first counts; below 0 it is avoided."),
                RewardType.Input("reward_b", tooltip="Second reward, or an earlier combination."),
                io.Float.Input("weight_b", **weight, tooltip="How much the second counts; below 0 it is avoided."),
                io.Boolean.Input(
                    "standardise", default=True, advanced=True, optional=True,
                    tooltip="In training, put each reward on one scale within its group before they are added.",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="The combination.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, reward_a, weight_a, reward_b, weight_b, standardise=True) -> io.NodeOutput:
        weights = (*(weight_a * w for w in reward_a.weights), *(weight_b * w for w in reward_b.weights))
        found = RewardSum((*reward_a.rewards, *reward_b.rewards), weights, standardise)
        found.combined()  # refuses a reward that is there twice
        return io.NodeOutput(found)


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOScoreImages",
            display_name="Score Images",
            category="PCPO/reward",
            description="Scores pictures and puts the best first.",
            search_aliases=["rate images", "best of n", "sort images", "filter images"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures to score."),
                RewardType.Input("reward", tooltip="Reward, or a combination of several."),
                io.String.Input("prompt", default="", multiline=True, tooltip="What the pictures should show."),
                io.Int.Input(
                    "keep_best", default=0, min=0, max=4096, tooltip="Pass on only so many of the best; 0 means all."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures, best first."),
                io.Float.Output(display_name="scores", tooltip="Their scores, best first.", is_output_list=True),
                io.String.Output(display_name="report", tooltip="Scores as text, for Preview as Text."),
                io.Image.Output(display_name="grid", tooltip="All pictures with their scores."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, reward: RewardSum, prompt: str, keep_best: int) -> io.NodeOutput:
        scores = reward.combined().score(images, [prompt] * len(images))
        order = scores.total.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        kept, best = order[: keep_best or None], scores.total[order]
        names = [r.name for r in reward.rewards]
        rows = [
            _row(n, float(scores.total[i]), names, scores.components[:, i]) for n, i in enumerate(order.tolist(), 1)
        ]
        head = f"{len(images)} pictures, mean {best.nanmean():.3f}, best {best[0]:.3f}" + (
            f": {prompt}" if prompt else ""
        )
        shown = to_image(grid(images[order][..., :3], [f"{s:.3f}" for s in best.tolist()]))
        preview = ui.PreviewImage(shown, cls=cls)
        return io.NodeOutput(images[kept], best[: len(kept)].tolist(), "\n".join([head, *rows]), shown, ui=preview)


def _row(place: int, total: float, names: list[str], parts: Tensor) -> str:
    """One line of the report; the parts only where there are several."""
    each = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, parts.tolist(), strict=True))
    return f"{place}. {total:.3f}" + (f" ({each})" if len(names) > 1 else "")
