"""The embedded tiny models, and prompts to train on."""

from collections.abc import Iterator
from typing import Any

import comfy.model_management as mm
from comfy.utils import ProgressBar
from comfy_api.latest import io

from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..trainer.config.schema import PromptsConfig
from .host.tiny import load_embedded
from .inputs import ADVANCED, checked
from .types import EncodedPrompts, PromptsType


class LoadTinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadTinyModel",
            display_name="Load Tiny Model",
            category="PCPO",
            description="A complete text-to-image model that generates 128 x 128 emoji; ships with this pack.",
            search_aliases=["emoji", "demo model", "embedded model", "test model"],
            inputs=[
                io.Combo.Input(
                    "model", options=list(EMBEDDED), default="emoji-flow",
                    tooltip="emoji-flow is a small SD3 (flow matching), emoji-eps a small SD1.5 (epsilon prediction).",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model, for 128 x 128 images."),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder, for prompts such as: a fox on a blue background.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Its VAE."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(*load_embedded(model))


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOPrompts",
            display_name="Prompts",
            category="PCPO",
            description="A list of prompts, one per line, encoded for training and comparison.",
            search_aliases=["prompt list", "training prompts", "captions"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model to train."),
                io.String.Input(
                    "text", multiline=True, default="a fox\na panda\na frog\na rocket",
                    tooltip="One prompt per line; lines starting with # are ignored. A line may be a JSON object with "
                    'metadata for rewards: {"prompt": "two foxes", "tag": "counting"}.',
                ),
                io.String.Input(
                    "negative", multiline=True, default="", **ADVANCED,
                    tooltip="Negative prompt; has no effect when cfg is 1.",
                ),
            ],
            outputs=[PromptsType.Output(display_name="prompts", tooltip="The encoded prompts.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, clip, text: str, negative: str = "") -> io.NodeOutput:
        lines = PromptsConfig(lines=tuple(text.splitlines()), negative=negative).read()
        *positive, unconditional = encoded(clip, [*map(str, lines), negative])
        return io.NodeOutput(EncodedPrompts(tuple(lines), tuple(positive), negative, unconditional))


def encoded(clip: Any, texts: list[str]) -> Iterator[Any]:
    """The conditioning of each text, with a bar; Cancel takes effect between two of them."""
    bar = ProgressBar(len(texts))
    for text in texts:
        mm.throw_exception_if_processing_interrupted()
        yield clip.encode_from_tokens_scheduled(clip.tokenize(text))
        bar.update(1)
