"""The stochastic samplers of training as a SAMPLER and as a KSampler, and a plot of their credit."""

from comfy_api.latest import io, ui

from comfyui_pcpo.method.credit import CREDITS, target_weights
from comfyui_pcpo.method.ddim_variance import Sigma
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Transition
from comfyui_pcpo.plotting.credit import credit_weights

from ..trainer.config.schema import ConfigError
from .host.checks import check_conditioning, check_latent
from .host.ksampler import TRAINING_SCHEDULER, cfg_guider, noise_levels, sample_latent
from .host.presets import recipe
from .host.samplers import PUBLISHED_LEVEL, Recorder, StepChoice, StochasticSampler
from .host.spaces import space_of, training_grid
from .images import to_comfy_image
from .inputs import (
    ADVANCED,
    RECIPE_LEVEL,
    ZERO_IS_AUTO,
    cfg_input,
    checked,
    conditioning_inputs,
    denoise_input,
    method_input,
    noise_level_input,
    scheduler_input,
    seed_input,
    sigma_input,
    steps_input,
    target_weight_input,
)
from .types import TrajectoryType


class PCPOSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOSampler",
            display_name="PCPO Sampler",
            category="PCPO/sampling",
            description="The stochastic samplers used in training, for SamplerCustomAdvanced and SamplerCustom.",
            search_aliases=["stochastic sampler", "ddim eta", "flow sde", "dance sde", "cps"],
            inputs=[
                method_input(),
                noise_level_input(),
                sigma_input(),
                io.Float.Input(
                    "s_noise", default=1.0, min=0.0, max=10.0, step=0.01, **ADVANCED,
                    tooltip="Multiplier of the noise that each step adds; training uses 1.",
                ),
                target_weight_input(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, method, noise_level, sigma: Sigma = "native", s_noise=1.0, target_weight=0.0) -> io.NodeOutput:
        return io.NodeOutput(StochasticSampler(StepChoice(method, noise_level, sigma, target_weight, s_noise)))


class PCPOKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOKSampler",
            display_name="PCPO KSampler",
            category="PCPO/sampling",
            description="KSampler with the stochastic samplers used in training; also returns the whole trajectory.",
            search_aliases=["stochastic ksampler", "trajectory", "rollout"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample from."),
                seed_input(),
                steps_input(),
                cfg_input("Classifier-free guidance scale; 1 turns it off." + ZERO_IS_AUTO, default=0.0),
                scheduler_input(),
                *conditioning_inputs(),
                io.Latent.Input("latent_image", tooltip="The latent to denoise; a noise mask is respected."),
                denoise_input(),
                method_input(),
                noise_level_input(),
                sigma_input(),
                target_weight_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                TrajectoryType.Output(
                    display_name="trajectory", tooltip="Latents, noises, predictions, weights and log-probabilities."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, model, seed, steps, cfg, scheduler, positive, negative, latent_image, denoise, method, noise_level,
        sigma: Sigma = "native", target_weight=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        as_trained = scheduler == TRAINING_SCHEDULER
        choice = StepChoice(
            method, noise_level, sigma, target_weight, trainer_start=as_trained and denoise >= 1, trainer_end=as_trained
        )
        sigmas, recorder = noise_levels(model, scheduler, steps, denoise), Recorder()
        if len(sigmas) < 2:
            return io.NodeOutput(latent_image, None)
        check_latent(model, latent_image)
        check_conditioning(model, [positive, negative])
        guider = cfg_guider(model, positive, negative, cfg or recipe(model).cfg)
        latent = sample_latent(guider, seed, StochasticSampler(choice, recorder), sigmas, latent_image)
        return io.NodeOutput(latent, recorder.trajectory())


class PlotCredit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOPlotCredit",
            display_name="Plot Credit",
            category="PCPO/sampling",
            description="Plots the weight of each denoising step in training, native and under the chosen credit.",
            search_aliases=["credit assignment", "step weights", "proportionate credit"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model whose noise schedule is used."),
                steps_input(0, 0, "Number of denoising steps." + ZERO_IS_AUTO),
                method_input(),
                noise_level_input(RECIPE_LEVEL),
                io.Combo.Input(
                    "credit", options=list(CREDITS), default="proportionate",
                    tooltip="How credit is distributed over the steps; proportionate is PCPO's.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Weights, their ratio and the noise of each step."),
                io.String.Output(display_name="report", tooltip="The plotted numbers as text."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, steps, method, noise_level, credit) -> io.NodeOutput:
        preset = recipe(model)
        if noise_level == PUBLISHED_LEVEL and preset.noise_level is not None:
            noise_level = preset.noise_level
        steps = steps or preset.steps
        choice, grid = StepChoice(method, noise_level), training_grid(space_of(model), steps)
        transitions, (name, level) = choice.transitions(grid), choice.resolve(grid.kind)
        trained = [i for i, step in enumerate(transitions[:-1]) if step.std > 0]
        if not trained:
            raise ConfigError(
                f"none of the {steps} steps but the last adds noise, so there is no credit to plot. Use a noise_level "
                "above 0, and 2 steps or more."
            )
        targets = target_weights(transitions, grid, credit, trained).tolist()
        native, stds = [s.weight for s in transitions], [s.std for s in transitions]
        image = to_comfy_image(credit_weights(native, targets, stds, trained))
        title = f"{name}, noise level {level:g}, {steps} steps, {credit} credit; the last step is not trained"
        report = f"{title}\n{credit_table(grid, transitions, targets)}"
        return io.NodeOutput(image, report, ui=ui.PreviewImage(image, cls=cls))


def credit_table(grid: Grid, transitions: list[Transition], targets: list[float]) -> str:
    """One line per step: noise level, standard deviation, native and target weight."""
    rows = [
        f"{i:4d}  {grid.levels[i]:6.4f}  {step.std:6.4f}  {step.weight:7.4f}  {targets[i]:7.4f}"
        for i, step in enumerate(transitions)
    ]
    return "\n".join(["step   level     std   native   target", *rows])
