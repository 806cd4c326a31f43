"""Implicit reward guidance in ComfyUI: a guider that evaluates the base and the aligned models at each step."""

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management as mm
import comfy.samplers
from comfy.hooks import EnumHookType, HookGroup
from comfy.model_patcher import MemoryCounter
from torch import Tensor

from comfyui_pcpo.method.guidance import irg

from ...trainer.config.schema import ConfigError
from ..types import AlignedModel
from .patches import PatchedWeight, extra_patches, patched_weights, switched_on
from .settings import require_same_settings

KEY = "pcpo_irg"


class IRGGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance on a base model that is guided by aligned models.

    LoRAs on the base share its weights, so their patched weights are switched on in turn; models with weights of
    their own are loaded next to the base. Options, wrappers and replaced objects are those of the base.
    """

    def __init__(self, model: Any, aligned: Sequence[AlignedModel]):
        super().__init__(model.clone())
        self.aligned = list(aligned)
        for number, one in enumerate(self.aligned, 1):
            require_same_settings(model, one.model, number)
        self.patches = {
            k: extra_patches(model, a.model, k + 1) for k, a in enumerate(self.aligned) if a.model.is_clone(model)
        }
        self.others = [a.model for a in self.aligned if not a.model.is_clone(model)]
        _check_others(self.others)
        self.model_patcher.set_additional_models(KEY, self.others)
        self.patched: dict[int, list[PatchedWeight]] = {}

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        super().inner_set_conds(conds)
        if self.others and any(has_weight_hooks(part) for part in self.original_conds.values()):
            raise ConfigError(
                "a conditioning has a LoRA hook, which acts on the base model but not on an aligned model that is "
                "another checkpoint. Remove the hook, or use LoRAs on the base as the aligned models."
            )

    def inner_sample(self, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        room = self.room(noise)
        self.patched = {k: patched_weights(self.inner_model, p, k + 1, room) for k, p in self.patches.items()}
        for model in self.others:
            model.pre_run()
        try:
            return super().inner_sample(noise, *args, **kwargs)
        finally:
            self.patched = {}
            for model in self.others:
                model.cleanup()

    def room(self, noise: Tensor) -> MemoryCounter:
        """Memory for patched weights: what is free beyond ComfyUI's reserve and this batch."""
        batch = [2 * len(noise), *noise.shape[1:]]
        reserved = 2 * mm.minimum_inference_memory() + self.model_patcher.memory_required(batch)
        return MemoryCounter(mm.get_free_memory(self.model_patcher.load_device), minimum=reserved)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        options = model_options or {}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        if math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False):
            negative = None
        conds = [positive, negative]
        active = {k: w for k, w in enumerate(self.weights(timestep, options)) if w}
        outs = [self._evaluate(k, conds, x, timestep, options) for k in active]
        if list(active.values()) == [1]:  # exactly that model; the base has weight 0
            out = outs[0]
        else:
            base = calculated(self.inner_model, conds, x, timestep, options)
            out = [irg(own, [o[part] for o in outs], list(active.values())) for part, own in enumerate(base)]
        for function in options.get("sampler_pre_cfg_function", []):
            out = function({
                "conds": conds, "conds_out": out, "cond_scale": self.cfg, "timestep": timestep, "input": x,
                "sigma": timestep, "model": self.inner_model, "model_options": options,
            })  # fmt: skip
        return comfy.samplers.cfg_function(
            self.inner_model, out[0], out[1], self.cfg, x, timestep, options, cond=positive, uncond=negative
        )

    def weights(self, timestep: Tensor, options: Any) -> list[float]:
        """The weight lambda of each aligned model at this noise level."""
        sigmas = options["transformer_options"]["sample_sigmas"]
        done = int((sigmas[:-1].cpu() > float(timestep.max()) * (1 + 1e-6)).sum())
        return [a.reward.weight_at(done / max(1, len(sigmas) - 1)) for a in self.aligned]

    def _evaluate(self, k: int, conds: list[Any], x: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
        """Conditional and unconditional prediction of aligned model k."""
        if k not in self.patched:
            return calculated(self.aligned[k].model.model, conds, x, timestep, options)
        with switched_on(self.patched[k]):
            return calculated(self.inner_model, conds, x, timestep, options)


def calculated(model: Any, conds: list[Any], x: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
    """Conditional and unconditional prediction, by the function that a node has set in place of ComfyUI's, if any."""
    function = options.get("sampler_calc_cond_batch_function")
    if function is None:
        return comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
    return function({"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": options})


def has_weight_hooks(conds: Sequence[dict[str, Any]]) -> bool:
    """Whether any of a guider's conditionings has hooks that change a model's weights."""
    groups: list[HookGroup] = [cond["hooks"] for cond in conds if cond.get("hooks") is not None]
    return any(group.get_type(EnumHookType.Weight) for group in groups)


def _check_others(others: Sequence[Any]) -> None:
    for n, model in enumerate(others):
        if any(model.is_clone(other) for other in others[:n]):
            raise ConfigError(
                "two aligned models are LoRAs on the same checkpoint, which is not the base model. They share weights, "
                "so one of them would be evaluated twice. Use that checkpoint as the base model, or load it twice."
            )
