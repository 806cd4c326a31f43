"""Compare Before / After: the same prompts and the same noise without and with a LoRA."""

from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.plotting.grids import before_after

from .host.checks import check_conditioning, check_training_latent, check_vae
from .host.ksampler import ImageRequest, empty_latent, with_lora
from .host.presets import recipe
from .images import to_comfy_image
from .inputs import ZERO_IS_AUTO, cfg_input, checked, seed_input, steps_input
from .rewards import require_scorable, scored
from .types import EncodedPrompts, PromptsType, RewardType, WeightedRewards


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOCompare",
            display_name="Compare Before / After",
            category="PCPO/training",
            description="Generates each prompt from the same noise without and with a LoRA.",
            search_aliases=["before after", "ab test", "compare lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.LoraModel.Input("lora", tooltip="The LoRA, from Train LoRA (PCPO, GRPO) or Load Run."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                PromptsType.Input("prompts", tooltip="Prompts to compare, one pair of images each."),
                seed_input("Seed of the noise; both sides use the same noise.", io.ControlAfterGenerate.fixed),
                steps_input(0, 0, "Number of denoising steps; the sampler is deterministic." + ZERO_IS_AUTO),
                cfg_input("Classifier-free guidance scale; 1 turns it off." + ZERO_IS_AUTO, default=0.0),
                RewardType.Input("reward", optional=True, tooltip="Scores the images of both sides."),
                io.Latent.Input(
                    "latent_image", optional=True,
                    tooltip="Sets the image size; without it, the model's own: 1024 px for most models, 512 px for "
                    "SD1.5, 128 px for the tiny ones.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="before", tooltip="Images without the LoRA, for Compare Images."),
                io.Image.Output(display_name="after", tooltip="Images with the LoRA, for Compare Images."),
                io.Image.Output(display_name="grid", tooltip="Pairs with their prompts and scores."),
                io.String.Output(display_name="report", tooltip="Mean scores, for Preview as Text."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, lora, vae, prompts, seed, steps, cfg, reward=None, latent_image=None) -> io.NodeOutput:
        latent_image = latent_image or empty_latent(model)
        check_training_latent(model, latent_image)
        check_conditioning(model, [*prompts.positive, prompts.negative], "prompts")
        check_vae(model, vae)
        if reward is not None:
            require_scorable(reward, prompts.lines)
        preset = recipe(model)
        request = ImageRequest(vae, prompts, latent_image, seed, steps or preset.steps, cfg or preset.cfg)
        aligned = with_lora(model, lora)
        bar = ProgressBar(2 * len(prompts.lines))
        before, after = request.generate(model, bar.update), request.generate(aligned, bar.update)
        scores, report = score_sides(before, after, prompts, reward)
        grid = to_comfy_image(before_after(before, after, prompts.lines, scores, columns="square"))
        return io.NodeOutput(before, after, grid, report, ui=ui.PreviewImage(grid, cls=cls))


def score_sides(
    before: Tensor, after: Tensor, prompts: EncodedPrompts, reward: WeightedRewards | None
) -> tuple[tuple[list[float], list[float]] | None, str]:
    """Scores of both sides (None without a reward), and their means with the reasons of failed scores."""
    count = len(prompts.lines)
    if reward is None:
        return None, f"{count} prompts, no reward connected"
    (old, old_failed), (new, new_failed) = (scored(reward, images, prompts.lines) for images in (before, after))
    names, means = " + ".join(r.name for r in reward.rewards), [side.total.nanmean() for side in (old, new)]
    lines = [f"{names}: {means[0]:.3f} before, {means[1]:.3f} after, mean of {count} prompts"]
    lines += [f"before: {sentence}" for sentence in old_failed] + [f"after: {sentence}" for sentence in new_failed]
    return (old.total.tolist(), new.total.tolist()), "\n".join(lines)
