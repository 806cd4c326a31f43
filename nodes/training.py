"""Train LoRA (PCPO, GRPO): its widgets are options of the trainer's configuration."""

from typing import Any

from comfy_api.latest import io, ui

from comfyui_pcpo.method.credit import CREDITS
from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES
from comfyui_pcpo.plotting.run_curves import curves

from ..trainer.config.loading import build
from ..trainer.config.presets import AUTO
from ..trainer.config.schema import (
    ConfigError,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from ..trainer.policy.lora_pairs import read_lora
from .host.checks import check_conditioning, check_training_latent, check_vae
from .host.samplers import PUBLISHED_LEVEL
from .images import to_comfy_image
from .inputs import ADVANCED, RECIPE_LEVEL, ZERO_IS_AUTO, checked, method_input, noise_level_input
from .types import PromptsType, RewardType, RunReference, RunType

# widgets by the configuration section that they fill; `objective` is objective.name, `guard_every` is guard.every
SECTIONS = {
    "model": ("gradient_checkpointing",),
    "rollout": (
        *("prompts_per_update", "group_size", "steps", "cfg", "method", "noise_level", "images_at_once"),
        *("branch", "branch_first", "branch_points"),
    ),
    "objective": ("objective", "credit", "clip_range", "kl_weight", "train_steps"),
    "lora": ("rank",),
    "optimizer": ("learning_rate",),
    "run": ("name", "updates", "seed", "preview_every", "save_every"),
    "guard": ("guard_every",),
}
ODD_GROUP = " An odd number means one optimizer step per update instead of two."
HELD_OUT = " Rewards of weight 0 are held out."
AUTOMATIC = {"steps": 0, "cfg": 0, "noise_level": PUBLISHED_LEVEL, "branch": -1, "clip_range": 0, "rank": 0,
             "learning_rate": 0, "images_at_once": 0, "gradient_checkpointing": False}  # fmt: skip
"""The value of each widget that stands for `auto`, since a number widget cannot hold a word."""


def config_sections(widgets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The trainer's configuration from the widgets' values; options without a widget keep their default."""
    tree = {section: {key: widgets[key] for key in keys if key in widgets} for section, keys in SECTIONS.items()}
    for section in tree.values():
        section |= {key: AUTO for key, value in section.items() if AUTOMATIC.get(key) == value}
    if "objective" in widgets:
        tree["objective"]["name"] = tree["objective"].pop("objective")
    if "guard_every" in widgets:
        tree["guard"]["every"] = tree["guard"].pop("guard_every")
    if "group_size" in widgets:
        tree["optimizer"]["minibatches"] = minibatches_for(widgets["group_size"])
    return tree


def minibatches_for(group_size: int) -> int:
    """Optimizer steps per update: each takes an equal part of every group, so an odd group cannot be split in two."""
    default = OptimizerConfig().minibatches
    return 1 if group_size % default else default


def tooltip(section: type[Section], option: str) -> str:
    """The description of a configuration option."""
    return str(section.model_fields[option].description)


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOTrainLoRA",
            display_name="Train LoRA (PCPO, GRPO)",
            category="PCPO/training",
            description="Trains a LoRA that aligns a model to a reward, by policy gradient with proportionate credit.",
            search_aliases=["rl", "grpo", "ddpo", "flow-grpo", "dancegrpo", "fine-tune", "reward training"],
            is_output_node=True,
            inputs=[
                *connections(),
                *basic_inputs(),
                *advanced_inputs(),
                io.LoraModel.Input("lora", optional=True, tooltip="LoRA to continue from, instead of a new one."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model and Save LoRA."),
                io.LossMap.Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Number of updates, for Save LoRA."),
                RunType.Output(display_name="run", tooltip="For Plot Run."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None:  # None: linked, and checked when its value is known
                build(config_sections({"name": name}), "Train LoRA (PCPO, GRPO)")
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, model, vae, prompts, reward, latent_image, resume=False, lora=None, **widgets: str | float | bool
    ) -> io.NodeOutput:  # fmt: skip
        from .job import TrainingInputs, make_config, train_lora  # imports the trainer's loop when a run starts

        widgets = {one.id: one.default for one in advanced_inputs()} | widgets  # a prompt by API may leave them out
        latent = check_training_latent(model, latent_image)
        check_conditioning(model, [*prompts.positive, prompts.negative], "prompts")
        check_vae(model, vae)
        inputs = TrainingInputs(model, vae, prompts, reward, latent, lora, resume)
        folder = train_lora(inputs, make_config(inputs, config_sections(widgets)), str(widgets["name"]))
        records = folder.records()
        losses = {"loss": drawable([row["loss"] for row in records])}
        plot = to_comfy_image(curves(records, panels=("reward", "clip", "guard")))
        return io.NodeOutput(
            read_lora(folder.lora_file)[0], losses, len(records), RunReference(folder.path),
            ui=ui.PreviewImage(plot, cls=cls),
        )  # fmt: skip


def drawable(losses: list[float]) -> list[float]:
    """A series that Plot Loss Graph can draw: it divides by the series' range, which one update does not have."""
    if not losses or min(losses) < max(losses):
        return losses
    return [0.0, *losses] if losses[0] else [*losses, 1e-9]


def connections() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to align; it is not modified."),
        io.Vae.Input("vae", tooltip="The model's VAE; rewards score decoded images."),
        PromptsType.Input("prompts", tooltip="Training prompts, from Prompts."),
        RewardType.Input("reward", tooltip="The reward to maximize, from Load Reward or Combine Rewards."),
        io.Latent.Input("latent_image", tooltip="Empty latent; sets the image size. Its batch size has no effect."),
    ]


def basic_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "name", default="run", tooltip="Folder under output/pcpo; an existing name gets a number appended."
        ),
        io.Int.Input("updates", default=20, min=1, max=100000, tooltip=tooltip(RunConfig, "updates")),
        io.Int.Input(
            "prompts_per_update", default=4, min=1, max=1024, tooltip=tooltip(RolloutConfig, "prompts_per_update")
        ),
        io.Int.Input(
            "group_size", default=8, min=2, max=256, tooltip=tooltip(RolloutConfig, "group_size") + ODD_GROUP
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip=tooltip(RolloutConfig, "steps") + ZERO_IS_AUTO),
        io.Float.Input(
            "learning_rate", default=0.0, min=0.0, max=1.0, step=1e-7, round=1e-9,
            tooltip=tooltip(OptimizerConfig, "learning_rate") + ZERO_IS_AUTO,
        ),
        io.Int.Input("rank", default=0, min=0, max=1024, tooltip=tooltip(LoraConfig, "rank") + ZERO_IS_AUTO),
        io.Combo.Input(
            "credit", options=list(CREDITS), default="proportionate", advanced=True,
            tooltip=tooltip(ObjectiveConfig, "credit"),
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip=tooltip(RunConfig, "seed")
        ),
        io.Boolean.Input(
            "resume", default=False,
            tooltip="Continue the run started last under this name until it has this number of updates.",
        ),
    ]  # fmt: skip


def advanced_inputs() -> list[io.WidgetInput]:
    """Options that are rarely changed; the new node renderer collapses them."""
    return [
        io.Float.Input(
            "cfg", default=0.0, min=0.0, max=30.0, step=0.1, tooltip=tooltip(RolloutConfig, "cfg") + ZERO_IS_AUTO,
            **ADVANCED,
        ),
        method_input(**ADVANCED),
        noise_level_input(f"{RECIPE_LEVEL}, or 0 for the objectives awm and nft", **ADVANCED),
        io.Combo.Input(
            "objective", options=list(ALL_OBJECTIVES), default="log_hinge",
            tooltip="Training objective; log_hinge is PCPO's. awm and nft train on re-noised final images instead of "
            "the sampled trajectory; credit does not apply to them.", **ADVANCED,
        ),
        io.Float.Input(
            "clip_range", default=0.0, min=0.0, max=0.99, step=1e-5, round=1e-8,
            tooltip=tooltip(ObjectiveConfig, "clip_range") + ZERO_IS_AUTO, **ADVANCED,
        ),
        io.Float.Input(
            "kl_weight", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=tooltip(ObjectiveConfig, "kl_weight"),
            **ADVANCED,
        ),
        io.Float.Input(
            "train_steps", default=1.0, min=0.01, max=1.0, step=0.05, tooltip=tooltip(ObjectiveConfig, "train_steps"),
            **ADVANCED,
        ),
        io.Int.Input(
            "images_at_once", default=0, min=0, max=256,
            tooltip=tooltip(RolloutConfig, "images_at_once") + " 0 chooses by the device's memory.", **ADVANCED,
        ),
        io.Boolean.Input(
            "gradient_checkpointing", default=False,
            tooltip=tooltip(ModelConfig, "gradient_checkpointing") + " Off uses it only where memory requires it.",
            **ADVANCED,
        ),
        io.Int.Input(
            "preview_every", default=5, min=0, max=10000, tooltip=tooltip(RunConfig, "preview_every"), **ADVANCED
        ),
        io.Int.Input("save_every", default=10, min=1, max=10000, tooltip=tooltip(RunConfig, "save_every"), **ADVANCED),
        io.Int.Input(
            "guard_every", default=10, min=0, max=10000, tooltip=tooltip(GuardConfig, "every") + HELD_OUT, **ADVANCED
        ),
        io.Int.Input(
            "branch", default=-1, min=-1, max=1000,
            tooltip=tooltip(RolloutConfig, "branch") + " -1: 1 for the embedded models, else 0; "
            "0 with awm, nft or train_steps.",
            **ADVANCED,
        ),
        io.Int.Input(
            "branch_first", default=0, min=0, max=1000, tooltip=tooltip(RolloutConfig, "branch_first"), **ADVANCED
        ),
        io.Int.Input(
            "branch_points", default=1, min=1, max=1000, tooltip=tooltip(RolloutConfig, "branch_points"), **ADVANCED
        ),
    ]  # fmt: skip
