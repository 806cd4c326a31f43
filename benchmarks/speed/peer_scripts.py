"""Public training scripts on the embedded models, executed unchanged from clones that the user supplies.

Replaced are only their parts around the loop: the model's loader, the experiment tracker, and classes that current
versions of diffusers no longer have.
"""

import importlib.util
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.pipelines import load_tiny
from trainer.config.schema import ConfigError

from ..study.recipes import STUDY_PROMPTS

NO_EPOCH_LIMIT = 10**9


@dataclass(frozen=True)
class PeerSettings:
    """What both sides run: batches of one prompt each, an optimizer step per batch."""

    batches: int = 2
    images: int = 8  # of a batch
    steps: int = 8
    updates: int = 10  # measured, after one that warms up
    device: str = "cpu"


class Finished(BaseException):
    """Ends a script whose loop would go on; no `except Exception` of the script stops it."""


@dataclass
class SpeedMeter:
    """Notes the time at the beginning of each sampled batch, and counts latents that the model predicts."""

    settings: PeerSettings
    rows: int = 0
    marks: list[tuple[float, float, int]] = field(default_factory=list)  # wall-clock seconds, CPU seconds, latents

    def watch(self, denoiser: nn.Module) -> None:
        def count(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            self.rows += len((*args, *inputs.values())[0])

        denoiser.register_forward_pre_hook(count, with_kwargs=True)

    def mark(self) -> None:
        """Call before each batch of a rollout. Raises Finished after the last measured update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time(), self.rows))
        if len(self.marks) > self.settings.batches * (1 + self.settings.updates):
            raise Finished

    def result(self) -> dict[str, float]:
        """Images and model evaluations per second of the measured updates."""
        s = self.settings
        first, last = self.marks[s.batches], self.marks[s.batches * (1 + s.updates)]
        wall, cpu, rows = (after - before for before, after in zip(first, last, strict=True))
        images = s.updates * s.batches * s.images
        rates = {"images_per_second": images / wall, "evaluations_per_second": rows / wall}
        return {**rates, "images_per_cpu_second": images / cpu, "evaluations_per_image": rows / images}


class LowRankAttention(nn.Module):
    """Attention with low-rank additions to its four projections, the processor that ddpo-pytorch trains."""

    def __init__(self, hidden_size: int, cross_attention_dim: int | None = None, rank: int = 4):
        super().__init__()
        context = cross_attention_dim or hidden_size
        sizes = {"q": hidden_size, "k": context, "v": context, "out": hidden_size}
        self.down = nn.ModuleDict({name: nn.Linear(size, rank, bias=False) for name, size in sizes.items()})
        self.up = nn.ModuleDict({name: nn.Linear(rank, hidden_size, bias=False) for name in sizes})
        for layer in self.up.values():
            nn.init.zeros_(layer.get_parameter("weight"))

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def project(name: str, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x) + self.up[name](self.down[name](x))

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = project("q", attn.to_q, hidden_states)
        k, v = project("k", attn.to_k, context), project("v", attn.to_v, context)
        mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return attn.to_out[1](project("out", attn.to_out[0], mixed)) / attn.rescale_output_factor


class NoEncoder(nn.Module):
    """Takes the place of the T5 that emoji-flow lacks; the script moves it, and diffusers asks for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(0))

    @property
    def device(self) -> torch.device:
        return self.get_buffer("place").device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("place").dtype


def run_ddpo(clone: Path, settings: PeerSettings, work: Path) -> SpeedMeter:
    """scripts/train.py of ddpo-pytorch on emoji-eps."""
    import diffusers.utils
    from diffusers.utils.torch_utils import randn_tensor

    diffusers.utils.randn_tensor = randn_tensor  # pyright: ignore[reportAttributeAccessIssue]  where it was
    script, config = load_script(clone, "scripts/train.py", settings)
    pipeline, meter = load_tiny("emoji-eps"), SpeedMeter(settings)
    pipeline._encode_prompt = lambda *_, prompt_embeds, **__: prompt_embeds  # newer ones double it without guidance
    meter.watch(pipeline.unet)
    peer_settings(config, settings, work)
    config.num_epochs, config.prompt_fn = NO_EPOCH_LIMIT, "simple_animals"
    config.sample.batch_size = settings.images
    config.reward_fn = "jpeg_compressibility"
    script.StableDiffusionPipeline = loader_of(pipeline)
    script.LoRAAttnProcessor = LowRankAttention
    accelerator = script.Accelerator
    script.Accelerator = lambda log_with=None, **options: accelerator(**options)
    return execute(script, meter)


def run_flow_grpo(clone: Path, settings: PeerSettings, work: Path) -> SpeedMeter:
    """scripts/train_sd3.py of flow_grpo on emoji-flow."""
    multiprocessing.set_start_method("fork", force=True)  # for its data loader, as in a process of its own
    script, config = load_script(clone, "scripts/train_sd3.py", settings)
    pipeline, meter = load_tiny("emoji-flow"), SpeedMeter(settings)
    meter.watch(pipeline.transformer)
    peer_settings(config, settings, work)
    for part in ("train", "test"):
        (work / f"{part}.txt").write_text("\n".join(STUDY_PROMPTS), encoding="utf-8")
    config.dataset, config.prompt_fn, config.save_dir = str(work), "general_ocr", str(work)
    config.resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
    config.sample.train_batch_size = config.sample.num_image_per_prompt = settings.images
    config.train.timestep_fraction = 0.99  # all steps but the last
    config.reward_fn = {"jpeg_compressibility": 1.0}
    pipeline.text_encoder_3, pipeline.tokenizer_3 = NoEncoder(), pipeline.tokenizer
    text = load_tiny("emoji-flow").to(settings.device)  # as above, but without a T5
    script.compute_text_embeddings = lambda prompt, *_, **__: embed(text, list(prompt))
    script.eval = lambda *_, **__: None
    script.StableDiffusion3Pipeline = loader_of(pipeline)
    return execute(script, meter)


PEERS: dict[str, Callable[[Path, PeerSettings, Path], SpeedMeter]] = {
    "ddpo-pytorch": run_ddpo,
    "flow_grpo": run_flow_grpo,
}


def load_script(clone: Path, path: str, settings: PeerSettings) -> tuple[Any, Any]:
    """A script of a clone as a module, and the clone's basic configuration, which the script will read."""
    if not (clone / path).is_file():
        raise ConfigError(f"{clone} has no {path}. Give the folder of a clone of this repository.")
    sys.path.insert(0, str(clone))
    os.environ["ACCELERATE_USE_CPU"] = str(settings.device == "cpu").lower()
    add_stand_ins()
    config = load_module("peer_config", clone / "config" / "base.py").get_config()
    script = load_module("peer_script", clone / path)
    script.FLAGS = types.SimpleNamespace(config=config)
    return script, config


def load_module(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"{file} needs a package: {error}. Install it and repeat.") from error
    return module


class Settings(dict[str, Any]):
    """A configuration whose entries are attributes."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def add_stand_ins() -> None:
    """A tracker that tracks nothing, and stand-ins for small packages that are not installed."""
    ignore: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    sys.modules["wandb"] = module_of("wandb", init=ignore, log=ignore, Image=ignore)
    if importlib.util.find_spec("inflect") is None:
        sys.modules["inflect"] = module_of("inflect", engine=ignore)
    if importlib.util.find_spec("ml_collections") is None:
        flags = types.SimpleNamespace(DEFINE_config_file=ignore)
        sys.modules["ml_collections"] = module_of("ml_collections", ConfigDict=Settings, config_flags=flags)


def module_of(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # asked for by importlib.util.find_spec
    vars(module).update(content)
    return module


def peer_settings(config: Any, settings: PeerSettings, work: Path) -> None:
    """Equal sizes; no guidance, mixed precision, evaluations or checkpoints."""
    config.logdir, config.mixed_precision, config.save_freq = str(work), "no", NO_EPOCH_LIMIT
    config.sample.num_steps, config.sample.guidance_scale = settings.steps, 1.0
    config.sample.num_batches_per_epoch = settings.batches
    config.train.batch_size, config.train.cfg = settings.images, False


def loader_of(pipeline: Any) -> Any:
    """Stands for a pipeline class whose from_pretrained gives this pipeline."""
    return types.SimpleNamespace(from_pretrained=lambda *_, **__: pipeline)


@torch.no_grad()
def embed(pipeline: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings and pooled embeddings of prompts."""
    prompt, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return prompt, pooled


def execute(script: Any, meter: SpeedMeter) -> SpeedMeter:
    """Run the script's main until the meter ends it."""
    sample = script.pipeline_with_logprob

    def marked(*args: Any, **options: Any) -> Any:
        meter.mark()
        return sample(*args, **options)

    script.pipeline_with_logprob = marked
    try:
        script.main(None)
    except Finished:
        return meter
    raise ConfigError("the script ended before all updates were measured. Use a clone of its main branch.")
