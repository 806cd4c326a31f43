"""Implicit reward guidance inside ComfyUI: one guider that asks the base and every aligned model at each step."""

import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from torch import Tensor

from comfyui_pcpo.guidance import irg

from ..trainer.config import ConfigError
from .lowrank import LowRank, attached
from .patches import extra_layers
from .types import Aligned

KEY = "pcpo_irg"


class IRGGuider(comfy.samplers.CFGGuider):
    """CFG on a base steered by aligned models.

    LoRAs on the base share its weights, so they are read as factors and switched on by hooks; models with weights of
    their own are loaded beside the base.
    """

    def __init__(self, model: Any, aligned: Sequence[Aligned]):
        super().__init__(model.clone())
        self.aligned = list(aligned)
        self.layers: list[list[LowRank]] = [
            extra_layers(model, a.model, n) if a.model.is_clone(model) else [] for n, a in enumerate(self.aligned, 1)
        ]
        self.others = [a.model for a in self.aligned if not a.model.is_clone(model)]
        _check_others(self.others)
        self.model_patcher.set_additional_models(KEY, self.others)
        self.current: int | None = None

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        place = {id(layer): k for k, layers in enumerate(self.layers) for layer in layers}
        every = [layer for layers in self.layers for layer in layers]
        with attached(every, lambda layer: place[id(layer)] == self.current):
            return super().sample(*args, **kwargs)

    def inner_sample(self, *args: Any, **kwargs: Any) -> Tensor:
        for model in self.others:
            model.pre_run()
        try:
            return super().inner_sample(*args, **kwargs)
        finally:
            for model in self.others:
                model.cleanup()

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        options = model_options or {}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        if math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False):
            negative = None
        conds = [positive, negative]
        base = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        weights = self.weights(timestep, options)
        outs = [self._ask(k, conds, x, timestep, options) if w else base for k, w in enumerate(weights)]
        out = [irg(own, [o[part] for o in outs], weights) for part, own in enumerate(base)]
        for function in options.get("sampler_pre_cfg_function", []):
            out = function({
                "conds": conds, "conds_out": out, "cond_scale": self.cfg, "timestep": timestep, "input": x,
                "sigma": timestep, "model": self.inner_model, "model_options": options,
            })  # fmt: skip
        return comfy.samplers.cfg_function(
            self.inner_model, out[0], out[1], self.cfg, x, timestep, options, cond=positive, uncond=negative
        )

    def weights(self, timestep: Tensor, options: Any) -> list[float]:
        """lambda of every aligned model at this noise level."""
        sigmas = options["transformer_options"]["sample_sigmas"]
        done = int((sigmas[:-1].cpu() > float(timestep.max()) * (1 + 1e-6)).sum())
        return [a.reward.weight_at(done / max(1, len(sigmas) - 1)) for a in self.aligned]

    def _ask(self, k: int, conds: list[Any], x: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
        """Prediction of aligned model k, conditional and unconditional."""
        if not self.layers[k]:
            return comfy.samplers.calc_cond_batch(self.aligned[k].model.model, conds, x, timestep, options)
        self.current = k
        try:
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        finally:
            self.current = None


def _check_others(others: Sequence[Any]) -> None:
    for n, model in enumerate(others):
        if any(model.is_clone(other) for other in others[:n]):
            raise ConfigError(
                "2 aligned models are LoRAs on one checkpoint that is not the base's, so they share weights and one "
                "would be asked twice. Use that checkpoint as the base model, or load it twice."
            )
