"""The Policy of a ComfyUI MODEL; it runs inside guider.sample(), where ComfyUI has loaded model and conditionings."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import comfy.conds
import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from comfyui_pcpo.method.schedule import Grid

from ...trainer.config.schema import Config, ConfigError
from ...trainer.policy.base import LoraPairs, Progress, no_progress
from ...trainer.policy.lora_pairs import started
from ..types import EncodedPrompts
from .adapter import fresh_layers, target_modules
from .checks import image_shape
from .decode import decode_images
from .differentiable import differentiable, own_parameters
from .lora_hooks import attached
from .spaces import space_of, training_grid

Result = TypeVar("Result")
SPECIAL = ("area", "mask", "control", "gligen", "hooks", "timestep_start", "timestep_end", "default", "strength")


@dataclass(frozen=True)
class Rows:
    """Prompts by number, one per image."""

    index: tuple[int, ...]

    def rows(self, index: Sequence[int]) -> "Rows":
        return Rows(tuple(self.index[i] for i in index))


class ComfyPolicy:
    """A MODEL with a LoRA in forward hooks; the base weights are never modified."""

    kind: Literal["ddim", "flow"]
    family: str
    latent_shape: tuple[int, int, int]

    def __init__(self, guider: Any, vae: Any, prompts: EncodedPrompts, config: Config, latent: Tensor, options: Any):
        self.guider, self.vae, self.config, self.options = guider, vae, config, options
        self.lines, self.model = prompts.lines, guider.inner_model
        self.space = space_of(guider.model_patcher)
        self.kind, self.device = self.space.kind, guider.model_patcher.load_device
        self.latent_shape, self.video = image_shape(latent), latent.ndim == 5
        self.family, modules = target_modules(self.model, config.lora.targets)
        self.layers = fresh_layers(modules, config.lora, config.run.seed, self.device)
        self.conds = [_own(guider.conds[cond_key(n)]) for n in range(len(self.lines))]
        guider.conds["negative"] = _own(guider.conds["negative"])
        self.controls = comfy.sampler_helpers.get_additional_models(guider.conds, torch.float32)[0]
        self.lora_on, self.evicted, self.batch = True, False, reserved_batch(config)
        self.sigma: dict[float, float] = {}

    def grid(self, steps: int) -> Grid:
        grid = training_grid(self.space, steps)
        self.sigma = dict(zip(grid.timesteps.tolist(), self.space.sigmas(grid).tolist(), strict=False))
        return grid

    def encode(self, prompts: Sequence[str], progress: Progress = no_progress) -> Rows:
        return Rows(tuple(self.lines.index(line) for line in prompts))

    def predict(self, x: Tensor, timestep: float, condition: Rows) -> Tensor:
        self._reload()
        sigma = self.sigma[timestep]
        scaled = x.float() * self.space.scale(sigma)
        prompts = sorted(set(condition.index))
        if len(prompts) == 1 or _can_share_batch([self.conds[p] for p in prompts]):
            return self._predict(scaled, sigma, _merged([self.conds[p] for p in condition.index], len(prompts) > 1))
        rows = {p: [i for i, q in enumerate(condition.index) if q == p] for p in prompts}
        outputs = [self._predict(scaled[index], sigma, self.conds[p]) for p, index in rows.items()]
        order = torch.tensor([i for index in rows.values() for i in index], device=scaled.device)
        return torch.cat(outputs)[order.argsort()]

    def _predict(self, scaled: Tensor, sigma: float, cond: list[dict[str, Any]]) -> Tensor:
        self.guider.conds["positive"] = cond
        sigmas = torch.full((len(scaled),), sigma, device=scaled.device)
        denoised = self.guider(self._framed(scaled), sigmas, model_options=self.options, seed=self.config.run.seed)
        return self.space.output(scaled, denoised.float().view(scaled.shape), sigma)

    def _framed(self, latents: Tensor) -> Tensor:
        """Latents as the model takes them: a video model's have one frame, (B, C, H, W) -> (B, C, 1, H, W)."""
        return latents[:, :, None] if self.video else latents

    def _reload(self) -> None:
        """Load the model again if decoding or rewards may have evicted it."""
        if self.evicted:
            models = [self.guider.model_patcher, *self.controls]
            with torch.inference_mode():
                mm.load_models_gpu(models, self.model.memory_required([self.batch, *self.latent_shape]))
            own_parameters(self.model.diffusion_model)
            self.evicted = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self.evicted = True
        return decode_images(self.vae, self.model.process_latent_out(self._framed(latents.float()))).float().cpu()

    def trainable(self) -> list[nn.Parameter]:
        return [factor for layer in self.layers.values() for factor in (layer.down, layer.up)]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.lora_on = False
        try:
            yield
        finally:
            self.lora_on = True

    def lora(self) -> LoraPairs:
        return {
            name: (layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone())
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def load_lora(self, pairs: LoraPairs) -> None:
        if pairs.keys() != self.layers.keys():
            mismatched = sorted(pairs.keys() ^ self.layers.keys())
            raise ConfigError(
                f"the LoRA does not fit this model: {len(mismatched)} modules differ (first: {mismatched[0]}). "
                "Use a LoRA that was trained on the same model."
            )
        for name, pair in pairs.items():
            for own, given in zip((self.layers[name].down, self.layers[name].up), pair, strict=True):
                if own.shape != given.shape:
                    raise ConfigError(
                        f"the LoRA's factor of {name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}. "
                        "Set rank to the LoRA's rank."
                    )
                own.copy_(given)

    def start_from(self, pairs: LoraPairs) -> None:
        """Continue from an existing LoRA, which may have fewer modules or a lower rank."""
        scale = next(iter(self.layers.values())).scale
        self.load_lora(started(pairs, self.lora(), scale))


class PolicySampler(comfy.samplers.Sampler):
    """A sampler that calls `job` with a ready ComfyPolicy instead of sampling an image."""

    def __init__(self, vae: Any, prompts: EncodedPrompts, config: Config, job: Callable[[ComfyPolicy], Any]):
        self.vae, self.prompts, self.config, self.job = vae, prompts, config, job
        self.result: Any = None

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *a: Any, **k: Any
    ) -> Tensor:
        options = extra_args["model_options"]
        options["transformer_options"]["optimized_attention_override"] = _same_attention
        guider.model_patcher.model.requires_grad_(False)
        policy = ComfyPolicy(guider, self.vae, self.prompts, self.config, noise, options)
        with (
            differentiable(policy.model.diffusion_model, self.config.model.gradient_checkpointing),
            attached(list(policy.layers.values()), lambda layer: policy.lora_on),
            _training_mode(),
        ):
            self.result = self.job(policy)
        return torch.zeros_like(noise)


def cond_key(number: int) -> str:
    """The guider's key for a prompt's conditioning; ComfyUI requires one called positive."""
    return f"positive_{number}" if number else "positive"


def with_policy(
    model: Any, vae: Any, prompts: EncodedPrompts, config: Config, latent: Tensor, job: Callable[[ComfyPolicy], Result]
) -> Result:
    """Run `job` on a ComfyPolicy while ComfyUI keeps the model loaded; every change is undone afterwards."""
    patcher = model.clone()
    patcher.add_wrapper(WrappersMP.PREPARE_SAMPLING, _with_room_for(reserved_batch(config)))
    guider = comfy.samplers.CFGGuider(patcher)
    conds = {cond_key(n): cond for n, cond in enumerate(prompts.positive)}
    guider.inner_set_conds({**conds, "negative": prompts.negative})
    guider.set_cfg(config.rollout.cfg)
    sampler = PolicySampler(vae, prompts, config, job)
    start = space_of(model).sampling.sigma_max.reshape(1).cpu()
    with torch.inference_mode(False), torch.enable_grad():
        empty = torch.zeros(1, *latent.shape[1:])
        guider.sample(
            empty, empty, sampler, torch.cat([start, torch.zeros(1)]), disable_pbar=True, seed=config.run.seed
        )
    return sampler.result


def reserved_batch(config: Config) -> int:
    """The batch whose inference takes about the memory that training takes, for ComfyUI to keep free."""
    return config.rollout.images_at_once * (2 if config.model.gradient_checkpointing else 4)


def _with_room_for(batch: int) -> Callable[..., Any]:
    def prepare(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():  # weights of a loader, moved outside of it, can no longer be used
            return executor(model, [batch, *noise_shape[1:]], *args, **kwargs)

    return prepare


def _same_attention(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The same attention in rollout, update and recomputation; some of ComfyUI's depend on the free memory."""
    return attention_pytorch(*args, **kwargs)


@contextmanager
def _training_mode() -> Iterator[None]:
    before, mm.in_training = mm.in_training, True
    try:
        yield
    finally:
        mm.in_training = before


def _own(conds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conditionings whose tensors autograd can save, with ControlNets that get no gradient."""
    copies = []
    for cond in conds:
        parts = {name: c._copy_with(_cloned(c.cond)) for name, c in cond["model_conds"].items()}
        copies.append({**cond, "model_conds": parts})
        for patcher in cond["control"].get_models() if "control" in cond else ():
            patcher.model.requires_grad_(False)
    return copies


def _cloned(value: Any) -> Any:
    """`value` with a clone of every tensor in it; constants may be numbers, names, lists or dicts."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(_cloned, value))
    return {k: _cloned(v) for k, v in value.items()} if type(value) is dict else value


def _can_share_batch(prompts: list[list[dict[str, Any]]]) -> bool:
    """Whether the conditionings of these prompts fit one batch: one entry each, whose parts ComfyUI can concatenate."""
    if any(len(conds) != 1 or any(key in conds[0] for key in SPECIAL) for conds in prompts):
        return False
    first, *rest = (conds[0]["model_conds"] for conds in prompts)
    return all(_is_single(c) for c in first.values()) and all(
        parts.keys() == first.keys() and all(_same_kind(c, parts[name]) for name, c in first.items()) for parts in rest
    )


def _is_single(cond: Any) -> bool:
    """Whether a conditioning is a constant, or has one row, so that rows can be put together image by image."""
    if isinstance(cond, comfy.conds.CONDConstant):
        return True
    tensors = cond.cond if isinstance(cond, comfy.conds.CONDList) else [cond.cond]
    return all(isinstance(t, Tensor) and len(t) == 1 for t in tensors)


def _same_kind(a: Any, b: Any) -> bool:
    """Whether ComfyUI can put two conditionings into one batch without padding one of them."""
    same_size = isinstance(a, comfy.conds.CONDConstant) or a.size() == b.size()
    return type(a) is type(b) and same_size and a.can_concat(b)


def _merged(rows: list[list[dict[str, Any]]], different: bool) -> list[dict[str, Any]]:
    """One conditioning with a row per image."""
    if not different:
        return rows[0]
    first, *rest = (row[0] for row in rows)
    parts = {
        name: c._copy_with(c.concat([row["model_conds"][name] for row in rest]))
        for name, c in first["model_conds"].items()
    }
    return [{**first, "model_conds": parts}]
