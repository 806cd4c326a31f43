"""A person's taste as the reward: votes in the page, a reward learned from them, and blind comparisons."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.durable import write_durably
from comfyui_pcpo.plotting.grids import before_after
from comfyui_pcpo.reward import RewardSettings
from comfyui_pcpo.reward.base import eight_bit
from comfyui_pcpo.taste.votes import CHOICES, Choose, VoteFolder, group_key

from ..trainer.config.loading import build
from ..trainer.config.schema import ConfigError
from .files import tastes_folder, vote_names
from .images import to_comfy_image
from .inputs import ADVANCED, MAX_SEED, checked
from .types import RewardType, RunType, WeightedRewards

if TYPE_CHECKING:
    from comfyui_pcpo.taste.encoders import Encoder
    from comfyui_pcpo.taste.human import Question, Reply

CLIP_TOOLTIP = (
    "Image features to learn on, from Load CLIP Vision. Needed for real images; without it, the features of the "
    "embedded models."
)
NAME_TOOLTIP = "Folder of the votes under output/pcpo_votes; the same name continues them."


def name_input(tooltip: str = NAME_TOOLTIP) -> io.String.Input:
    return io.String.Input("name", default="my-taste", tooltip=tooltip)


def check_name(name: str) -> bool | str:
    """Whether a folder can have that name, or what is wrong with it."""
    try:
        votes_folder(name)
    except ConfigError as error:
        return str(error)
    return True


def votes_folder(name: str) -> Path:
    """Where votes of that name are stored. Raises ConfigError for a name that no folder can have."""
    build({"run": {"name": name}}, "name")
    return tastes_folder() / name


def taste_file(name: str) -> Path:
    """The file of a trained taste. Raises ConfigError for a missing one."""
    file = votes_folder(name) / "taste.safetensors"
    if not file.is_file():
        raise ConfigError(f"{tastes_folder()} has no taste named {name!r}. Train it with Train Taste.")
    return file


def clip_vision_encoder(model: Any) -> "Encoder":
    """ComfyUI's CLIP Vision model as an encoder."""
    from comfyui_pcpo.taste.encoders import Encoder

    def encode(images: Tensor) -> Tensor:
        with torch.inference_mode():  # in which ComfyUI moves its models
            features = model.encode_image(images.float() / 255)["image_embeds"]
        return features.float().flatten(1).clone()  # an ordinary tensor outside of it

    return Encoder("ComfyUI's CLIP Vision", encode)


def make_encoder(clip_vision: Any) -> "Encoder":
    from comfyui_pcpo.taste.encoders import tiny_encoder

    return tiny_encoder(RewardSettings()) if clip_vision is None else clip_vision_encoder(clip_vision)


class HumanVoteNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOHumanVote",
            display_name="Human Vote",
            category="PCPO/taste",
            description="Asks you which images of a group are best while it trains, then learns to answer itself.",
            search_aliases=["human feedback", "rlhf", "preference", "rate images", "my taste"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                name_input(),
                io.String.Input(
                    "question", default="Which image do you like best?", tooltip="The question that you are asked."
                ),
                io.Combo.Input(
                    "choose", options=list(CHOICES), default="best and worst",
                    tooltip="What you click in each group: the best image, the best and the worst, or all in order.",
                ),
                io.Int.Input(
                    "votes", default=40, min=0, max=100000,
                    tooltip="Votes before the learned reward takes over; 0 always asks.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=CLIP_TOOLTIP),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Train LoRA and Score Images.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return name is None or check_name(name)  # None: linked, and checked when its value is known

    @classmethod
    @checked
    def execute(cls, name: str, question: str, choose: Choose, votes: int, clip_vision=None) -> io.NodeOutput:
        from comfyui_pcpo.taste.human import HumanVote, VoteSettings

        from .host.booth import BOOTH  # imports the server

        node = str(cls.hidden.unique_id)

        def ask(asked: "Question", /) -> "Reply":
            return BOOTH.ask(node, asked)

        settings = VoteSettings(VoteFolder(votes_folder(name)), question, choose, votes)
        reward = HumanVote(ask, settings, lambda: make_encoder(clip_vision))
        return io.NodeOutput(WeightedRewards((reward,), (1.0,)))


class TrainTaste(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOTrainTaste",
            display_name="Train Taste",
            category="PCPO/taste",
            description="Learns a reward from votes, from liked and disliked images, or from a file of pairs.",
            search_aliases=["preference model", "bradley terry", "reward model", "learn my taste"],
            is_output_node=True,
            inputs=[
                name_input("Folder of the votes under output/pcpo_votes; the taste is saved in it."),
                io.String.Input("liked", default="", tooltip="Folder of images that you like.", **ADVANCED),
                io.String.Input("disliked", default="", tooltip="Folder of images that you do not like.", **ADVANCED),
                io.String.Input(
                    "pairs", default="", **ADVANCED,
                    tooltip="CSV or jsonl file with the columns better and worse: paths of images.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=CLIP_TOOLTIP),
                RunType.Input("after", optional=True, tooltip="Connect a run to wait for the votes of its training."),
            ],
            outputs=[
                RewardType.Output(display_name="reward", tooltip="The learned taste, for Train LoRA and Score Images."),
                io.String.Output(display_name="report", tooltip="Agreement with held-out votes, for Preview as Text."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return name is None or check_name(name)  # None: linked, and checked when its value is known

    @classmethod
    def fingerprint_inputs(
        cls, name=None, liked="", disliked="", pairs="", clip_vision=None, after=None
    ) -> str | float:  # fmt: skip
        if name is None:
            return float("nan")  # not known yet; NaN equals nothing, so the node runs
        from ..trainer.evaluation.image_files import images_in
        from ..trainer.evaluation.taste import read_pairs_file

        files = [VoteFolder(tastes_folder() / name).file]
        for folder in (Path(path) for path in (liked, disliked) if path):
            files += images_in(folder)
        if pairs:
            with suppress(ConfigError, OSError):  # told when the node runs
                files += [Path(pairs), *(file for pair in read_pairs_file(Path(pairs)) for file in pair)]
        times = [path.stat().st_mtime_ns for path in files if path.exists()]
        return hashlib.sha256(f"{files}{times}".encode()).hexdigest()

    @classmethod
    @checked
    def execute(cls, name, liked="", disliked="", pairs="", clip_vision=None, after=None) -> io.NodeOutput:
        from comfyui_pcpo.taste.learned import TasteReward

        from ..trainer.evaluation.taste import TasteSources, train_taste

        folder, encoder = votes_folder(name), make_encoder(clip_vision)
        liked, disliked, pairs = (Path(path) if path.strip() else None for path in (liked, disliked, pairs))
        taste = train_taste(TasteSources((folder,), liked, disliked, pairs), encoder)
        taste.save(folder / "taste.safetensors")
        reward = TasteReward(taste, RewardSettings(), encoder, name)
        report = taste.report.sentence()
        return io.NodeOutput(WeightedRewards((reward,), (1.0,)), report, ui=ui.PreviewText(report))


class LoadTaste(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadTaste",
            display_name="Load Taste",
            category="PCPO/taste",
            description="Loads a taste that Train Taste has saved.",
            search_aliases=["preference model", "load reward model"],
            inputs=[
                io.Combo.Input("taste", options=vote_names(), tooltip="Folder under output/pcpo_votes."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The CLIP Vision model that the taste was trained with."
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="The taste, for Train LoRA and Score Images.")],
        )

    @classmethod
    def validate_inputs(cls, taste: str | None = None) -> bool | str:
        try:
            if taste is not None:  # None: linked, and checked when its value is known
                taste_file(taste)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, taste: str | None = None, clip_vision=None) -> float:
        """When Train Taste last saved the taste; NaN, which equals nothing, for a linked name."""
        return float("nan") if taste is None else taste_file(taste).stat().st_mtime_ns

    @classmethod
    @checked
    def execute(cls, taste: str, clip_vision=None) -> io.NodeOutput:
        from comfyui_pcpo.taste.learned import TasteReward, check_encoder, load_taste

        loaded, encoder = load_taste(taste_file(taste)), make_encoder(clip_vision)
        check_encoder(loaded, encoder)
        reward = TasteReward(loaded, RewardSettings(), encoder, taste)
        return io.NodeOutput(WeightedRewards((reward,), (1.0,)))


def blind_votes_file(images_a: Tensor, images_b: Tensor, about: str) -> Path:
    """Where the votes on these pairs are kept, in a folder that is made for them."""
    key = group_key(torch.cat([eight_bit(images).cpu() for images in (images_a, images_b)]), about)
    folder = tastes_folder() / "compare_blind"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.json"


def kept_wins(file: Path, most: int) -> list[float]:
    """The votes of an earlier run of the node, in the order of the pairs; an unreadable file has none."""
    try:
        wins = json.loads(file.read_text(encoding="utf-8"))["wins"]
        return [float(win) for win in wins][:most]
    except (OSError, ValueError, KeyError, TypeError):
        return []


class CompareBlind(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOCompareBlind",
            display_name="Compare Blind",
            category="PCPO/taste",
            description="Shows pairs of images in random order, sides swapped at random, and asks which is better.",
            search_aliases=["ab test", "blind test", "human study", "win rate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images_a", tooltip="Images of side A, for example Compare's before."),
                io.Image.Input("images_b", tooltip="Images of side B, as many, for example Compare's after."),
                io.String.Input(
                    "question", default="Which image is better?", tooltip="The question that you are asked."
                ),
                io.Int.Input("votes", default=0, min=0, max=4096, tooltip="Number of pairs to ask about; 0 is all."),
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the order and the sides. Votes are saved: the same images, question and seed "
                    "resume them. Change the seed to vote again.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="win_rate", tooltip="Share of votes for side B; ties count half."),
                io.String.Output(display_name="report", tooltip="Win rate with its 95 % interval."),
                io.Image.Output(display_name="grid", tooltip="The pairs, A left and B right."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, images_a: Tensor, images_b: Tensor, question: str, votes: int, seed: int) -> io.NodeOutput:
        from comfyui_pcpo.taste.blind import blind_pairs, sentence, vote_on, win_rate

        from .host.booth import BOOTH  # imports the server

        pairs = blind_pairs(images_a, images_b, votes, seed)
        file = blind_votes_file(images_a, images_b, f"{question} {seed}")

        def ask(shown: "Question") -> "Reply":
            return BOOTH.ask(str(cls.hidden.unique_id), shown)

        def keep(wins: list[float]) -> None:
            write_durably(file, json.dumps({"question": question, "seed": seed, "wins": wins}).encode())

        wins = vote_on(pairs, question, ask, keep, kept_wins(file, len(pairs)))
        rate = win_rate(wins)
        shown = [pair.row for pair in pairs]
        captions = [{1.0: "B won", 0.0: "A won"}.get(win, "tie") for win in wins]
        left, right = (images[shown][..., :3] for images in (images_a, images_b))
        grid = to_comfy_image(before_after(left, right, captions, titles=("A", "B")))
        return io.NodeOutput(rate.rate, sentence(rate), grid, ui=ui.PreviewImage(grid, cls=cls))
