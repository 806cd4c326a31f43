"""Inputs that several nodes share, and the check of all widgets, linked ones included."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..trainer.config.schema import ConfigError
from .host.ksampler import TRAINING_SCHEDULER
from .host.samplers import METHOD_NAMES, PUBLISHED_LEVEL, SIGMA_NAMES

ADVANCED = {"advanced": True, "optional": True}
ZERO_IS_AUTO = " 0 takes the value of the published recipe for this kind of model."
RECIPE_LEVEL = "the recipe's value"  # for noise_level
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """A node's `execute` that first checks its inputs: ComfyUI checks neither the range of linked widgets nor whether a
    connected node has put out anything, as loaders of files without a text encoder do not.
    """
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def checking(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = dict(zip(names, args, strict=False)) | kwargs
        for item in cls.define_schema().inputs:  # GET_SCHEMA would set an attribute of a class that ComfyUI has locked
            if given.get(item.id) is not None:
                check_widget(item, given[item.id])
            elif item.id in given and not item.optional:
                raise ConfigError(
                    f"{item.id} is empty: the loaded file probably contains none. Load it separately, for example with "
                    "Load CLIP or Load VAE."
                )
        return execute(cls, *args, **kwargs)

    return checking


def check_widget(item: io.Input, value: Any) -> None:
    """Raise ConfigError if a value is not one that the widget could have."""
    if isinstance(item, io.Combo.Input):
        options = list(item.options or ())
        if value not in options:
            raise ConfigError(f"{item.id} is {value!r}, but must be one of {', '.join(map(str, options[:30]))}.")
    elif isinstance(item, io.Int.Input | io.Float.Input):
        whole = isinstance(item, io.Int.Input)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        low, high = (-math.inf if item.min is None else item.min), (math.inf if item.max is None else item.max)
        if not number or (whole and value != int(value)) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"{item.id} is {value!r}, but must be {kind} from {low:g} to {high:g}. Change its input.")
    elif isinstance(item, io.String.Input | io.Boolean.Input):
        kind = str if isinstance(item, io.String.Input) else bool
        if not isinstance(value, kind):
            raise ConfigError(f"{item.id} is {value!r}, but must be a {kind.__name__}. Change its input.")


def seed_input(
    tooltip: str = "The same seed gives the same image.", control: bool | io.ControlAfterGenerate = True
) -> io.Int.Input:
    """`control`: what happens to the seed after each run; True: it is random, as KSampler's."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=control, tooltip=tooltip)


def steps_input(default: int = 20, least: int = 1, tooltip: str = "Number of denoising steps.") -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=least, max=1000, tooltip=tooltip)


def cfg_input(tooltip: str = "Classifier-free guidance scale; 1 turns it off.", default: float = 1.0) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
        tooltip="Amount of denoising; below 1 the result keeps part of the input latent.",
    )  # fmt: skip


def conditioning_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="What the image should show."),
        io.Conditioning.Input("negative", tooltip="What the image should not show."),
    ]


def scheduler_input() -> io.Combo.Input:
    return io.Combo.Input(
        "scheduler", options=[TRAINING_SCHEDULER, *comfy.samplers.SCHEDULER_NAMES], default=TRAINING_SCHEDULER,
        tooltip="Noise schedule; training is the one used by Train LoRA (PCPO, GRPO) and the command line.",
    )  # fmt: skip


def method_input(**options: bool) -> io.Combo.Input:
    return io.Combo.Input(
        "method", options=METHOD_NAMES, default="auto",
        tooltip="Stochastic sampler; auto picks ddim for SD1.5, SD2 and SDXL, and flow_sde for SD3.5 and FLUX.",
        **options,
    )  # fmt: skip


def noise_level_input(published: str = "the method's published value", **options: bool) -> io.Float.Input:
    return io.Float.Input(
        "noise_level", default=PUBLISHED_LEVEL, min=-1.0, max=2.0, step=0.05,
        tooltip=f"Amount of noise that each step adds: 0 is deterministic, -1 uses {published}.", **options,
    )  # fmt: skip


def sigma_input() -> io.Combo.Input:
    return io.Combo.Input(
        "sigma", options=SIGMA_NAMES, default="native", **ADVANCED,
        tooltip="Noise of the ddim steps: the sampler's own (native), or solved for target_weight (paper, uniform).",
    )  # fmt: skip


def target_weight_input() -> io.Float.Input:
    return io.Float.Input(
        "target_weight", default=0.0, min=0.0, max=1000.0, step=0.1, **ADVANCED,
        tooltip="Step weight that sigma = paper or uniform solves for; 0 uses the smallest feasible one.",
    )  # fmt: skip
