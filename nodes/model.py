"""The embedded models, and prompts to train on."""

from comfy_api.latest import io

from ..trainer.config import PromptsConfig
from .tiny import NAMES, load_tiny
from .types import EncodedPrompts, PromptsType


class LoadTinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadTinyModel",
            display_name="Load Tiny Model",
            category="PCPO",
            description="A complete text-to-image model of 128 pixel emoji, in this pack, to try everything on.",
            search_aliases=["emoji", "demo model", "embedded model", "test model"],
            inputs=[
                io.Combo.Input(
                    "model", options=list(NAMES), default="emoji-flow",
                    tooltip="emoji-flow is a small SD3 (flow), emoji-eps a small SD1.5 (epsilon). No download.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The denoiser. It generates 128 x 128 pixels."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder; prompts are like: a red fox."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(*load_tiny(model))


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOPrompts",
            display_name="Prompts",
            category="PCPO",
            description="Several prompts at once, one per line, encoded for training and comparison.",
            search_aliases=["prompt list", "training prompts", "captions"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model that will be trained."),
                io.String.Input(
                    "text", multiline=True, default="a fox\na panda\na frog\na rocket",
                    tooltip="One prompt per line. Lines that start with # are left out.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", advanced=True, optional=True,
                    tooltip="Negative prompt; it counts only where cfg is not 1.",
                ),
            ],
            outputs=[PromptsType.Output(display_name="prompts", tooltip="The encoded prompts.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, text: str, negative: str = "") -> io.NodeOutput:
        lines = PromptsConfig(lines=tuple(text.splitlines()), negative=negative).read()
        encode = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in [*lines, negative]]
        return io.NodeOutput(EncodedPrompts(tuple(lines), tuple(encode[:-1]), negative, encode[-1]))
