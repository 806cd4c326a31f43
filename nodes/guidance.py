"""Implicit reward guidance: compose aligned models while sampling."""

import comfy.samplers
from comfy_api.latest import io

from comfyui_pcpo.method.guidance import ImplicitReward

from .host.checks import check_conditioning, check_latent, check_same_kind
from .host.irg import IRGGuider
from .host.ksampler import ksampler_sigmas, sample_latent
from .inputs import cfg_input, checked, conditioning_inputs, denoise_input, seed_input, steps_input
from .types import AlignedModel, ImplicitRewardType


def guidance_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The base model, without the aligned LoRAs."),
        ImplicitRewardType.Input("implicit_reward", tooltip="One or more aligned models, from Implicit Reward."),
    ]


def make_guider(model, aligned, positive, negative, cfg: float) -> IRGGuider:
    """An IRGGuider, after a check that models and conditionings belong together."""
    for number, one in enumerate(aligned, 1):
        check_same_kind(model, one.model, number)
        check_conditioning(one.model, [positive, negative])
    guider = IRGGuider(model, aligned)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def irg_cfg_input() -> io.Float.Input:
    return cfg_input("Classifier-free guidance within each model; use 1 for LoRAs that were trained without it.")


class ImplicitRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOImplicitReward",
            display_name="Implicit Reward",
            category="PCPO/guidance",
            description="An aligned model as a guidance direction; chain several to compose them.",
            search_aliases=["rlg", "aligned model", "lora guidance", "reward guidance"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The aligned model: the base with a LoRA applied, or another checkpoint."
                ),
                io.Float.Input(
                    "weight", default=1.0, min=-5.0, max=10.0, step=0.05,
                    tooltip="0 is the base, 1 the aligned model; above 1 extrapolates, below 0 moves away from it.",
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Start of the guidance, as a fraction of the steps.",
                ),
                io.Float.Input(
                    "end", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="End of the guidance, as a fraction of the steps.",
                ),
                ImplicitRewardType.Input(
                    "previous", optional=True, tooltip="Implicit rewards to combine with this one."
                ),
            ],
            outputs=[
                ImplicitRewardType.Output(
                    display_name="implicit_reward", tooltip="For IRG Guider, IRG KSampler or another Implicit Reward."
                )
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, weight, start, end, previous=()) -> io.NodeOutput:
        return io.NodeOutput((*(previous or ()), AlignedModel(model, ImplicitReward(weight, start, end))))


class IRGGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOIRGGuider",
            display_name="IRG Guider",
            category="PCPO/guidance",
            description="Implicit reward guidance for SamplerCustomAdvanced.",
            search_aliases=["implicit reward guidance", "reward guidance", "compose loras", "rlg"],
            inputs=[*guidance_inputs(), *conditioning_inputs(), irg_cfg_input()],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked
    def execute(cls, model, implicit_reward, positive, negative, cfg) -> io.NodeOutput:
        return io.NodeOutput(make_guider(model, implicit_reward, positive, negative, cfg))


class IRGKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOIRGKSampler",
            display_name="IRG KSampler",
            category="PCPO/guidance",
            description="KSampler with implicit reward guidance.",
            search_aliases=["implicit reward guidance", "compose loras", "rlg"],
            inputs=[
                *guidance_inputs(),
                seed_input(),
                steps_input(),
                irg_cfg_input(),
                io.Combo.Input(
                    "sampler_name", options=list(comfy.samplers.SAMPLER_NAMES), default="euler",
                    tooltip="Sampling algorithm.",
                ),
                io.Combo.Input(
                    "scheduler", options=list(comfy.samplers.SCHEDULER_NAMES), default="normal",
                    tooltip="Noise schedule.",
                ),
                *conditioning_inputs(),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                denoise_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, model, implicit_reward, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        denoise,
    ) -> io.NodeOutput:  # fmt: skip
        check_latent(model, latent_image)
        guider = make_guider(model, implicit_reward, positive, negative, cfg)
        sigmas = ksampler_sigmas(model, sampler_name, scheduler, steps, denoise)
        sampler = comfy.samplers.sampler_object(sampler_name)
        return io.NodeOutput(sample_latent(guider, seed, sampler, sigmas, latent_image))
