"""Policy on a diffusers pipeline: which family it is decides how prompts are encoded and the denoiser is called."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comfyui_pcpo.lora import Family
from comfyui_pcpo.rollout import derive_seed
from comfyui_pcpo.schedule import Grid, ddim_grid, flow_grid_from_sigmas

from .config import Config, ConfigError
from .policy import LoraPairs

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
CONVOLUTIONS = ("conv1", "conv2")
TARGETS = {"attention": ATTENTION, "linear": (*ATTENTION, *FEED_FORWARD)}
TARGETS["all"] = (*TARGETS["linear"], *CONVOLUTIONS)
FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Encoded:
    """Tensors of the denoiser's text inputs, one row per prompt, for the prompt and for the negative prompt."""

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] | None

    def rows(self, index: Sequence[int]) -> "Encoded":
        pick = list(index)
        negative = None if self.negative is None else {k: v[pick] for k, v in self.negative.items()}
        return Encoded({k: v[pick] for k, v in self.positive.items()}, negative)


class DiffusersPolicy:
    """A pipeline's denoiser with a fresh LoRA; base, text encoders and VAE are frozen."""

    def __init__(self, pipeline: Any, config: Config):
        self.pipeline, self.config = pipeline, config
        self.denoiser: Any = denoiser_of(pipeline)
        name = type(self.denoiser).__name__
        if name not in FAMILIES:
            raise ConfigError(f"{name} is not a denoiser this trainer knows. Known are {', '.join(FAMILIES)}.")
        self.family: Family = FAMILIES[name]
        self.kind: Literal["ddim", "flow"] = "ddim" if self.family == "unet" else "flow"
        self.device = pick_device(config.model.device)
        self.dtype = DTYPES[config.model.precision]
        self.latent_shape = self._latent_shape()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(self.device)
        self._add_lora()
        if config.model.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    def _latent_shape(self) -> tuple[int, int, int]:
        r, scale = self.config.rollout, self.pipeline.vae_scale_factor
        sample = self.denoiser.config.sample_size
        size = []
        for name, pixels in (("height", r.height), ("width", r.width)):
            pixels = pixels or sample * scale
            multiple = scale * (1 if self.family == "unet" else 2)
            if pixels % multiple:
                raise ConfigError(f"rollout.{name} {pixels} is not a multiple of {multiple}. Use one, such as "
                                  f"{max(multiple, pixels // multiple * multiple)}.")  # fmt: skip
            size.append(pixels // scale)
        return self.denoiser.config.in_channels, size[0], size[1]

    def _add_lora(self) -> None:
        from peft import LoraConfig

        lora, wanted = self.config.lora, TARGETS[self.config.lora.targets]
        modules = [n for n, _ in self.denoiser.named_modules() if n.endswith(tuple("." + w for w in wanted))]
        alpha: Any = lora.effective_alpha  # peft declares int and takes any number
        adapter = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=modules)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.run.seed, 0))
            self.denoiser.add_adapter(adapter, adapter_name="pcpo")
        for p in self.trainable():
            p.data = p.data.float()

    def grid(self, steps: int) -> Grid:
        scheduler = self.pipeline.scheduler
        if self.kind == "ddim":
            c = scheduler.config
            try:
                return ddim_grid(steps, scheduler.alphas_cumprod, c.num_train_timesteps, steps_offset=c.steps_offset,
                                 set_alpha_to_one=c.set_alpha_to_one)  # fmt: skip
            except ValueError as error:
                raise ConfigError(f"denoising steps: {error}") from None
        scheduler.set_timesteps(steps)
        return flow_grid_from_sigmas(scheduler.sigmas)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        guided = self.config.rollout.cfg != 1
        negative = [self.config.prompts.negative]
        pipe = self.pipeline
        if self.family == "unet":
            hidden, no = pipe.encode_prompt(list(prompts), self.device, 1, guided, negative * len(prompts))
            return Encoded({"encoder_hidden_states": hidden}, {"encoder_hidden_states": no} if guided else None)
        if self.family == "sd3":
            length = 0 if pipe.text_encoder_3 is None else 256
            hidden, no, pooled, no_pooled = pipe.encode_prompt(
                list(prompts), None, None, device=self.device, do_classifier_free_guidance=guided,
                negative_prompt=negative * len(prompts), max_sequence_length=length,
            )  # fmt: skip
            names = ("encoder_hidden_states", "pooled_projections")
            positive: dict[str, Tensor] = dict(zip(names, (hidden, pooled), strict=True))
            return Encoded(positive, dict(zip(names, (no, no_pooled), strict=True)) if guided else None)
        raise ConfigError(f"{self.family} models cannot be trained yet. Use an SD1.5- or SD3-type model.")

    def predict(self, x: Tensor, timestep: float, condition: Encoded) -> Tensor:
        cfg = self.config.rollout.cfg
        if condition.negative is None:
            return self._call(x, timestep, condition.positive)
        if self.config.rollout.detach_unconditional:
            cond = self._call(x, timestep, condition.positive)
            with torch.no_grad():
                uncond = self._call(x, timestep, condition.negative)
        else:
            both = {k: torch.cat([v, condition.positive[k]]) for k, v in condition.negative.items()}
            uncond, cond = self._call(torch.cat([x, x]), timestep, both).chunk(2)
        return uncond + cfg * (cond - uncond)

    def _call(self, x: Tensor, timestep: float, text: dict[str, Tensor]) -> Tensor:
        t = torch.full((len(x),), timestep, device=x.device)
        key = "sample" if self.family == "unet" else "hidden_states"
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.denoiser(**{key: x, "timestep": t}, **text).sample.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        z = latents.to(self.device) / vae.config.scaling_factor
        z = z + (getattr(vae.config, "shift_factor", None) or 0.0)
        images = vae.decode(z).sample
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()

    def trainable(self) -> list[nn.Parameter]:
        return [p for n, p in sorted(self.denoiser.named_parameters()) if ".pcpo." in n]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {n: m for n, m in sorted(self.denoiser.named_modules()) if isinstance(m, LoraLayer)}

    def module_names(self) -> list[str]:
        """Every module that could carry a LoRA."""
        return module_names(self.denoiser)

    def lora(self) -> LoraPairs:
        return {
            name: (m.lora_A["pcpo"].weight.detach().cpu().clone(), m.lora_B["pcpo"].weight.detach().cpu().clone())
            for name, m in self._layers().items()
        }

    @torch.no_grad()
    def load_lora(self, pairs: LoraPairs) -> None:
        layers = self._layers()
        if pairs.keys() != layers.keys():
            odd = sorted(pairs.keys() ^ layers.keys())
            raise ConfigError(
                f"the LoRA and lora.targets differ in {len(odd)} modules, first {odd[0]}. "
                "Use the LoRA of a run with the same model and targets."
            )
        for name, (down, up) in pairs.items():
            for own, given in ((layers[name].lora_A["pcpo"], down), (layers[name].lora_B["pcpo"], up)):
                if own.weight.shape != given.shape:
                    raise ConfigError(
                        f"{name} has shape {tuple(given.shape)} in the LoRA and {tuple(own.weight.shape)} here. "
                        "Set lora.rank to the LoRA's rank."
                    )
                own.weight.copy_(given)


def module_names(denoiser: nn.Module) -> list[str]:
    """Every module that could carry a LoRA, whether or not it does."""
    modules = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [n.removesuffix(".base_layer") for n in modules if ".lora_" not in n]


def denoiser_of(pipeline: Any) -> Any:
    """The UNet or the transformer of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def pick_device(name: str, key: str = "model.device") -> torch.device:
    """`auto` is the first GPU if there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"{key} is {name}, but PyTorch sees 0 GPUs. Use cpu or auto.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} {name} is not a device. Use auto, cpu or cuda.") from None
