"""Implicit reward guidance as nodes: compose aligned models while sampling."""

import comfy.samplers
from comfy_api.latest import io

from comfyui_pcpo.method.guidance import ImplicitReward

from .host.irg import IRGGuider
from .sampling import sample_latent
from .types import Aligned, ImplicitRewardType


def guidance_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The base model, without the aligned LoRAs."),
        ImplicitRewardType.Input("implicit_reward", tooltip="One or more aligned models, from Implicit Reward."),
    ]


def condition_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="What to show."),
        io.Conditioning.Input("negative", tooltip="What to avoid."),
    ]


def cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
        tooltip="Classifier-free guidance, inside each model; a LoRA trained without it wants 1.",
    )  # fmt: skip


class ImplicitRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOImplicitReward",
            display_name="Implicit Reward",
            category="PCPO/guidance",
            description="An aligned model as a direction to steer by; chain several.",
            search_aliases=["rlg", "aligned model", "lora guidance", "reward guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The aligned model: the base behind Load LoRA, or another checkpoint."),
                io.Float.Input(
                    "weight", default=1.0, min=-5.0, max=10.0, step=0.05,
                    tooltip="0 is the base, 1 the aligned model, more goes beyond it, below 0 away from it.",
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the steps before it sets in."
                ),
                io.Float.Input(
                    "end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the steps after which it stops."
                ),
                ImplicitRewardType.Input("previous", optional=True, tooltip="Aligned models to add this one to."),
            ],
            outputs=[ImplicitRewardType.Output(display_name="implicit_reward", tooltip="For the IRG nodes.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, weight, start, end, previous=()) -> io.NodeOutput:
        return io.NodeOutput((*(previous or ()), Aligned(model, ImplicitReward(weight, start, end))))


class IRGGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOIRGGuider",
            display_name="IRG Guider",
            category="PCPO/guidance",
            description="Implicit reward guidance for SamplerCustomAdvanced.",
            search_aliases=["implicit reward guidance", "reward guidance", "compose loras", "rlg"],
            inputs=[*guidance_inputs(), *condition_inputs(), cfg_input()],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
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
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The same seed is the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Denoising steps."),
                cfg_input(),
                io.Combo.Input(
                    "sampler_name", options=list(comfy.samplers.SAMPLER_NAMES), default="euler", tooltip="Sampler."
                ),
                io.Combo.Input(
                    "scheduler", options=list(comfy.samplers.SCHEDULER_NAMES), default="normal", tooltip="Noise levels."
                ),
                *condition_inputs(),
                io.Latent.Input("latent_image", tooltip="Latent to start from."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1 keeps part of the latent."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The result.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        implicit_reward,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        denoise,
    ) -> io.NodeOutput:
        guider = make_guider(model, implicit_reward, positive, negative, cfg)
        levels = comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise).sigmas
        sampler = comfy.samplers.sampler_object(sampler_name)
        return io.NodeOutput(sample_latent(guider, seed, sampler, levels, latent_image))


def make_guider(model, implicit_reward, positive, negative, cfg) -> IRGGuider:
    guider = IRGGuider(model, implicit_reward)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider
