"""Sampling nodes: the stochastic steps of training as SAMPLER and as KSampler, and the picture of their credit."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.method.credit import CREDITS, target_weights
from comfyui_pcpo.plotting.credit import credit_weights

from ..trainer.config.schema import ConfigError
from .host.samplers import METHOD_NAMES, SIGMA_NAMES, USUAL, Recorder, StepChoice, StochasticSampler
from .host.spaces import space_of, training_grid
from .images import to_image
from .types import TrajectoryType

TRAINING = "training"


def method_input() -> io.Combo.Input:
    return io.Combo.Input(
        "method", options=METHOD_NAMES, default="auto",
        tooltip="How a step adds noise; auto is ddim for epsilon models (SD1.5, SDXL) and flow_sde for SD3.5 and FLUX.",
    )  # fmt: skip


def noise_level_input(usual: str = "the method's published value") -> io.Float.Input:
    return io.Float.Input(
        "noise_level", default=USUAL, min=-1.0, max=2.0, step=0.05,
        tooltip=f"Randomness of the steps: 0 is the deterministic sampler, -1 {usual}.",
    )  # fmt: skip


def sigma_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "sigma", options=SIGMA_NAMES, default="native", advanced=True, optional=True,
            tooltip="Standard deviations of ddim steps: native, or solved for a target weight (paper, uniform).",
        ),
        io.Float.Input(
            "target_weight", default=0.0, min=0.0, max=1000.0, step=0.1, advanced=True, optional=True,
            tooltip="Weight that sigma = paper or uniform solves for; 0 is the smallest that works.",
        ),
    ]  # fmt: skip


class PCPOSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOSampler",
            display_name="PCPO Sampler",
            category="PCPO/sampling",
            description="The stochastic samplers of training, for SamplerCustomAdvanced and SamplerCustom.",
            search_aliases=["stochastic sampler", "ddim eta", "flow sde", "dance sde", "cps"],
            inputs=[
                method_input(),
                noise_level_input(),
                sigma_inputs()[0],
                io.Float.Input(
                    "s_noise", default=1.0, min=0.0, max=10.0, step=0.01, advanced=True, optional=True,
                    tooltip="Multiplies the drawn noise; 1 is what training uses.",
                ),
                sigma_inputs()[1],
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, method, noise_level, sigma="native", s_noise=1.0, target_weight=0.0) -> io.NodeOutput:
        return io.NodeOutput(StochasticSampler(StepChoice(method, noise_level, sigma, target_weight, s_noise)))


class PCPOKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOKSampler",
            display_name="PCPO KSampler",
            category="PCPO/sampling",
            description="KSampler with the stochastic steps of training; it also hands out the whole trajectory.",
            search_aliases=["stochastic ksampler", "trajectory", "rollout"],
            inputs=[
                io.Model.Input("model", tooltip="Model to sample from."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The same seed is the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 turns it off."
                ),
                scheduler_input(),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to avoid."),
                io.Latent.Input("latent_image", tooltip="Latent to start from; a mask on it is respected."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1 keeps part of the latent."
                ),
                method_input(),
                noise_level_input(),
                *sigma_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The result."),
                TrajectoryType.Output(
                    display_name="trajectory", tooltip="Latents, noises, predictions, weights and log-probabilities."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, scheduler, positive, negative, latent_image, denoise, method, noise_level,
        sigma="native", target_weight=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        own = scheduler == TRAINING
        choice = StepChoice(
            method, noise_level, sigma, target_weight, trainer_start=own and denoise >= 1, trainer_end=own
        )
        sigmas, recorder = noise_levels(model, scheduler, steps, denoise), Recorder()
        if len(sigmas) < 2:
            return io.NodeOutput(latent_image, None)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        latent = sample_latent(guider, seed, StochasticSampler(choice, recorder), sigmas, latent_image)
        return io.NodeOutput(latent, recorder.trajectory())


def _interruptible(*args: object) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def scheduler_input() -> io.Combo.Input:
    return io.Combo.Input(
        "scheduler", options=[TRAINING, *comfy.samplers.SCHEDULER_NAMES], default=TRAINING,
        tooltip="Noise levels; training is the grid that Train LoRA (PCPO) and the command line use.",
    )  # fmt: skip


def noise_levels(model, scheduler: str, steps: int, denoise: float = 1.0) -> Tensor:
    """The sigmas of a run, (T + 1,); with denoise below 1 the last T of a longer one."""
    if denoise <= 0:
        return torch.zeros(0)
    space, total = space_of(model), steps if denoise >= 1 else int(steps / denoise)
    if scheduler == TRAINING:
        sigmas = space.sigmas(training_grid(space, total))
    else:
        sigmas = comfy.samplers.calculate_sigmas(space.sampling, scheduler, total)
    return sigmas.cpu()[-(steps + 1) :]


def sample_latent(guider, seed: int, sampler, sigmas: Tensor, latent: dict, show: bool = True) -> dict:
    """What the host's KSampler does with a latent: channels, noise, mask, preview if `show`, sampling."""
    samples = comfy.sample.fix_empty_latent_channels(
        guider.model_patcher, latent["samples"],
        latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"),
    )  # fmt: skip
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1) if show else _interruptible
    quiet = not comfy.utils.PROGRESS_BAR_ENABLED
    found = guider.sample(noise, samples, sampler, sigmas, latent.get("noise_mask"), callback, quiet, seed)
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": found.to(comfy.model_management.intermediate_device())}


class PlotCredit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOPlotCredit",
            display_name="Plot Credit",
            category="PCPO/sampling",
            description="How much each denoising step counts in training: native against target weight.",
            search_aliases=["credit assignment", "step weights", "proportionate credit"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model whose noise levels are used."),
                io.Int.Input("steps", default=10, min=2, max=1000, tooltip="Denoising steps."),
                method_input(),
                noise_level_input(),
                io.Combo.Input(
                    "credit",
                    options=list(CREDITS),
                    default="proportionate",
                    tooltip="Target weights; proportionate is PCPO's.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Weights, their factor and the noise of each step."),
                io.String.Output(display_name="report", tooltip="The numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, model, steps, method, noise_level, credit) -> io.NodeOutput:
        choice, grid = StepChoice(method, noise_level), training_grid(space_of(model), steps)
        taken, (name, level) = choice.transitions(grid), choice.resolve(grid.kind)
        trained = [i for i, step in enumerate(taken[:-1]) if step.std > 0]
        if not trained:
            raise ConfigError(
                f"0 of {steps} steps have noise, so there is no credit to show. Use a noise_level above 0."
            )
        targets, native = target_weights(taken, grid, credit, trained).tolist(), [s.weight for s in taken]
        image = to_image(credit_weights(native, targets, [s.std for s in taken], trained))
        head = f"{name}, noise level {level:g}, {steps} steps, {credit} credit; the last step is not trained"
        columns = "step   level     std   native   target"
        rows = [
            f"{i:4d}  {grid.levels[i]:6.4f}  {s.std:6.4f}  {s.weight:7.4f}  {targets[i]:7.4f}"
            for i, s in enumerate(taken)
        ]
        return io.NodeOutput(image, "\n".join([head, columns, *rows]), ui=ui.PreviewImage(image, cls=cls))
