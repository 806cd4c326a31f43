"""Stages `flow` and `eps`: the two generators learn from the latents of the drawings."""

import contextlib
import copy
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from comfyui_pcpo.tiny.captions import Scene, caption
from tools.tiny.fast import plain_attention, with_linear_patches
from tools.tiny.fit import StageSettings, batch_indices, fit, numpy_generator
from tools.tiny.folders import Folders
from tools.tiny.generators import SD15, eps_loss, flow_loss, make_eps, make_flow
from tools.tiny.latents import encode_drawings, latents, load_autoencoder
from tools.tiny.text import load_text, tokens
from tools.tiny.wording import misread, sample_caption

EMPTY = 0.1  # share of captions left out, for classifier-free guidance


def words(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """Fresh captions, some of them empty."""
    return [caption(misread(sample_caption(scene, rng), rng)) if rng.random() > EMPTY else "" for scene in scenes]


def train_flow(settings: StageSettings, folders: Folders) -> None:
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folders.models / "emoji-flow" / "scheduler")
    train_generator("flow", with_linear_patches(make_flow()), settings, folders)


def train_eps(settings: StageSettings, folders: Folders) -> None:
    scheduler = DDIMScheduler(**SD15, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler.save_pretrained(folders.models / "emoji-eps" / "scheduler")
    unet: Any = make_eps()
    train_generator("eps", unet.to(memory_format=torch.channels_last), settings, folders)


def train_generator(name: str, model: Any, settings: StageSettings, folders: Folders) -> None:
    known = latents(settings, folders)
    tokenizer, text = load_text(folders.shared)
    objective: Any = flow_loss(text) if name == "flow" else eps_loss(text)
    order = batch_indices(len(known.scenes), settings.batch)
    test = encode_drawings(load_autoencoder(folders), settings.at_most(128), seed=1000)
    test_tokens = tokens(tokenizer, words(test.scenes, np.random.default_rng(0)))

    def loss() -> Tensor:
        index = next(order)
        said = words([known.scenes[i] for i in index.tolist()], numpy_generator())
        return objective(model, known.values[index].float(), tokens(tokenizer, said))

    @torch.no_grad()
    def report(average: nn.Module) -> str:
        part = "transformer" if name == "flow" else "unet"
        copy.deepcopy(average).half().save_pretrained(folders.models / f"emoji-{name}" / part)  # type: ignore[operator]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            error = objective(average, test.values.float(), test_tokens)
        return f"{float(error):.4f} on new drawings"

    with contextlib.nullcontext() if settings.compiled else plain_attention():
        fit(name, model, loss, settings, report)
