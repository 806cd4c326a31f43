"""Training nodes: Train LoRA (PCPO), and Compare Before / After."""

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_api.latest import io, ui

from comfyui_pcpo import plot
from comfyui_pcpo.credit import CREDITS

from ..trainer import config as settings
from ..trainer.options import build
from ..trainer.run import read_lora
from .pictures import to_image
from .sampling import TRAINING, method_input, noise_level_input, noise_levels, sample_latent
from .steps import USUAL, StepChoice, StochasticSampler
from .types import PromptsType, RewardType, Run, RunType

# the widgets of Train LoRA by the configuration section that they fill; `objective` is the section's own name
SECTIONS = {
    "model": ("gradient_checkpointing",),
    "rollout": ("prompts_per_update", "group_size", "steps", "cfg", "method", "noise_level", "images_at_once"),
    "objective": ("objective", "credit", "clip_range", "kl_weight", "train_steps"),
    "lora": ("rank",),
    "optimizer": ("learning_rate",),
    "run": ("name", "updates", "seed", "preview_every", "save_every"),
}


def sections(widgets: dict) -> dict[str, dict]:
    """The trainer's configuration tree from the widgets' values; what is missing keeps its default."""
    tree = {name: {key: widgets[key] for key in keys if key in widgets} for name, keys in SECTIONS.items()}
    if "objective" in tree["objective"]:
        tree["objective"]["name"] = tree["objective"].pop("objective")
    if tree["rollout"].get("noise_level", USUAL) < 0:
        tree["rollout"]["noise_level"] = None
    if tree["rollout"].get("group_size", 8) % 2:
        tree["optimizer"]["minibatches"] = 1  # an odd group does not split in two
    return tree


def field(section: type, name: str, key: str = "") -> str:
    """A configuration field's own sentence, as tooltip."""
    return str(section.model_fields[key or name].description)


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        r, o, run = settings.RolloutConfig, settings.ObjectiveConfig, settings.RunConfig
        return io.Schema(
            node_id="PCPOTrainLoRA",
            display_name="Train LoRA (PCPO)",
            category="PCPO/training",
            description="Aligns a model to a reward by reinforcement learning with proportionate credit, as a LoRA.",
            search_aliases=["rl", "grpo", "ddpo", "flow-grpo", "dancegrpo", "fine-tune", "reward training"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to align. It stays as it is."),
                io.Vae.Input("vae", tooltip="Its autoencoder; rewards look at pictures."),
                PromptsType.Input("prompts", tooltip="What to train on, from Prompts."),
                RewardType.Input("reward", tooltip="What to aim at, from Load Reward or Combine Rewards."),
                io.Latent.Input("latent_image", tooltip="An empty latent: it says how large the pictures are."),
                io.String.Input("name", default="run", tooltip="Folder under output/pcpo. A taken name gets a number."),
                io.Int.Input("updates", default=20, min=1, max=100000, tooltip=field(run, "updates")),
                io.Int.Input("prompts_per_update", default=4, min=1, max=1024, tooltip=field(r, "prompts_per_update")),
                io.Int.Input("group_size", default=8, min=1, max=256, tooltip=field(r, "group_size")),
                io.Int.Input("steps", default=10, min=2, max=1000, tooltip=field(r, "steps")),
                io.Float.Input(
                    "learning_rate", default=3e-4, min=1e-7, max=1.0, step=1e-7, round=1e-9,
                    tooltip=field(settings.OptimizerConfig, "learning_rate") + " The tiny models like 0.003.",
                ),
                io.Int.Input("rank", default=8, min=1, max=1024, tooltip=field(settings.LoraConfig, "rank")),
                io.Combo.Input("credit", options=list(CREDITS), default="proportionate", tooltip=field(o, "credit")),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip=field(run, "seed")
                ),
                io.Boolean.Input(
                    "resume", default=False, tooltip="Continue the run of this name up to that many updates in all."
                ),
                *advanced_inputs(),
                io.LoraModel.Input("lora", optional=True, tooltip="A LoRA to go on from, instead of a fresh one."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model and Save LoRA."),
                io.LossMap.Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Updates done, for Save LoRA."),
                RunType.Output(display_name="run", tooltip="For Plot Run."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str = "run", group_size: int = 8) -> bool | str:
        try:
            build(sections({"name": name, "group_size": group_size}), "Train LoRA (PCPO)")
        except settings.ConfigError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, vae, prompts, reward, latent_image, resume=False, lora=None, **widgets: str | float | bool
    ) -> io.NodeOutput:  # fmt: skip
        from .job import Task, make_config, train  # the trainer is imported when a run starts

        samples = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"],
            latent_image.get("downscale_ratio_spacial"), latent_image.get("downscale_ratio_temporal"),
        )  # fmt: skip
        task = Task(model, vae, prompts, reward, samples, lora, resume)
        folder = train(task, make_config(task, sections(widgets)))
        records = folder.records()
        losses = {"loss": [row["loss"] for row in records]}
        picture = ui.PreviewImage(to_image(plot.curves(records, panels=("reward", "clip"))), cls=cls)
        return io.NodeOutput(read_lora(folder.lora_file)[0], losses, len(records), Run(folder.path), ui=picture)


def advanced_inputs() -> list[io.Input]:
    """What few people change, folded away."""
    r, o, run = settings.RolloutConfig, settings.ObjectiveConfig, settings.RunConfig
    more = {"advanced": True, "optional": True}
    return [
        io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1, tooltip=field(r, "cfg"), **more),
        _advanced(method_input()),
        _advanced(noise_level_input("the method's published value, and 0 for the objectives awm and nft")),
        io.Combo.Input(
            "objective", options=["log_hinge", "ppo", "matching", "awm", "nft"], default="log_hinge",
            tooltip=field(o, "name"), **more,
        ),
        io.Float.Input(
            "clip_range", default=1e-3, min=1e-7, max=0.99, step=1e-5, round=1e-8,
            tooltip=field(o, "clip_range"), **more,
        ),
        io.Float.Input(
            "kl_weight", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=field(o, "kl_weight"), **more
        ),
        io.Float.Input(
            "train_steps", default=1.0, min=0.01, max=1.0, step=0.05, tooltip=field(o, "train_steps"), **more
        ),
        io.Int.Input("images_at_once", default=16, min=1, max=256, tooltip=field(r, "images_at_once"), **more),
        io.Boolean.Input(
            "gradient_checkpointing", default=False,
            tooltip=field(settings.ModelConfig, "gradient_checkpointing"), **more,
        ),
        io.Int.Input("preview_every", default=5, min=0, max=10000, tooltip=field(run, "preview_every"), **more),
        io.Int.Input("save_every", default=10, min=1, max=10000, tooltip=field(run, "save_every"), **more),
    ]  # fmt: skip


def _advanced(found: io.Input) -> io.Input:
    found.advanced, found.optional = True, True
    return found


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOCompare",
            display_name="Compare Before / After",
            category="PCPO/training",
            description="The same prompts and the same noise without and with a LoRA.",
            search_aliases=["before after", "ab test", "compare lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.LoraModel.Input("lora", tooltip="The LoRA, from Train LoRA (PCPO) or Load Run."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                PromptsType.Input("prompts", tooltip="One pair of pictures per prompt."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the noise, the same on both sides.",
                ),
                io.Int.Input("steps", default=20, min=2, max=1000, tooltip="Denoising steps, without noise."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 turns it off."
                ),
                RewardType.Input("reward", optional=True, tooltip="Scores both sides."),
                io.Latent.Input(
                    "latent_image", optional=True, tooltip="Size; 128 px (tiny models) or 512 if left out."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="before", tooltip="Without the LoRA, for Compare Images."),
                io.Image.Output(display_name="after", tooltip="With the LoRA, for Compare Images."),
                io.Image.Output(display_name="grid", tooltip="Pairs with prompt and scores."),
                io.String.Output(display_name="report", tooltip="Mean scores, for Preview as Text."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, lora, vae, prompts, seed, steps, cfg, reward=None, latent_image=None) -> io.NodeOutput:
        latent = latent_image or empty_latent(model)
        aligned = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
        sides = [paint(m, vae, prompts, latent, (seed, steps, cfg)) for m in (model, aligned)]
        scores, report = [None, None], f"{len(prompts.lines)} prompts, no reward connected"
        if reward is not None:
            scores = [reward.combined().score(side, list(prompts.lines)).total for side in sides]
            before, after = (s.nanmean() for s in scores)
            names = " + ".join(r.name for r in reward.rewards)
            report = f"{names}: {before:.3f} before, {after:.3f} after, over {len(prompts.lines)} prompts"
        lists = [None if s is None else s.tolist() for s in scores]
        grid = to_image(plot.before_after(*sides, prompts.lines, *lists))
        return io.NodeOutput(*sides, grid, report, ui=ui.PreviewImage(grid, cls=cls))


def empty_latent(model) -> dict:
    """A square latent: 128 pixels for the embedded models, else 512."""
    size = 16 if "pcpo_model" in model.attachments else 64
    return {"samples": torch.zeros(1, model.model.latent_format.latent_channels, size, size)}


def paint(model, vae, prompts, latent: dict, plan: tuple[int, int, float]) -> torch.Tensor:
    """One deterministic picture per prompt, (P, H, W, 3); its noise depends on the seed and the place in the list."""
    seed, steps, cfg = plan
    one = {**latent, "samples": latent["samples"][:1]}
    sampler = StochasticSampler(StepChoice(noise_level=0.0, trainer_start=True, trainer_end=True))
    levels, pictures = noise_levels(model, TRAINING, steps), []
    for place, positive in enumerate(prompts.positive):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, prompts.negative)
        guider.set_cfg(cfg)
        pictures.append(
            vae.decode(sample_latent(guider, seed + place, sampler, levels, one, False)["samples"])[..., :3]
        )
    return torch.cat(pictures)
