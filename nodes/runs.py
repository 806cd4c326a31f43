"""Runs on disk: load one, plot one."""

from comfy_api.latest import io, ui
from torch import Tensor

from comfyui_pcpo.lora.formats import export_state
from comfyui_pcpo.plotting.run_curves import curves

from ..trainer.config.schema import ConfigError
from ..trainer.runs.folder import RunFolder
from .files import NEWEST, find_run, run_names
from .images import to_comfy_image
from .inputs import checked
from .types import RunReference, RunType

PANEL_CHOICES = {
    "all": ("reward", "clip", "kl", "per_step", "guard"),
    "reward": ("reward",),
    "clip": ("clip",),
    "kl": ("kl",),
    "per step": ("per_step",),
    "guard": ("guard",),
}
CHECKPOINT_TOOLTIP = (
    "final (kept by the guard, or the latest), latest, best (highest mean reward), kept or an update number."
)


class PlotRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOPlotRun",
            display_name="Plot Run",
            category="PCPO/training",
            description="Plots a run: reward, clip fraction, KL to the reference, and statistics of each step.",
            search_aliases=["training curves", "reward curve", "plot training"],
            is_output_node=True,
            inputs=[
                RunType.Input("run", tooltip="A run, from Train LoRA (PCPO, GRPO) or Load Run."),
                io.Float.Input(
                    "smoothing", default=0.6, min=0.0, max=0.99, step=0.05,
                    tooltip="Exponential smoothing of the curves; 0 plots the raw values.",
                ),
                io.Combo.Input("panels", options=list(PANEL_CHOICES), default="all", tooltip="Curves to plot."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The plot.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, run: RunReference, smoothing: float, panels: str) -> io.NodeOutput:
        image = to_comfy_image(curves(RunFolder(run.path).records(), smoothing, PANEL_CHOICES[panels]))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class LoadRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadRun",
            display_name="Load Run",
            category="PCPO/training",
            description="Loads a run from output/pcpo, trained by a node or by the command line.",
            search_aliases=["load training run", "load checkpoint lora", "resume"],
            inputs=[
                io.Combo.Input(
                    "run", options=[NEWEST, *run_names()], default=NEWEST, tooltip="Folder under output/pcpo."
                ),
                io.String.Input("checkpoint", default="final", tooltip=CHECKPOINT_TOOLTIP),
            ],
            outputs=[
                RunType.Output(display_name="run", tooltip="For Plot Run."),
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model and Save LoRA."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run: str | None = None) -> bool | str:
        try:
            if run is not None:  # None: linked, and checked when its value is known
                find_run(run)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, checkpoint: str | None = None) -> str | float:
        if run is None or checkpoint is None:
            return float("nan")  # a linked value is not known yet; NaN equals nothing, so the node runs
        folder = RunFolder(find_run(run))
        which = checkpoint.strip().lower()
        return f"{folder.path} {folder.checkpoint(which)} {folder.metrics_file.stat().st_mtime}"

    @classmethod
    @checked
    def execute(cls, run: str, checkpoint: str) -> io.NodeOutput:
        folder = RunFolder(find_run(run))
        return io.NodeOutput(RunReference(folder.path), lora_state(folder, checkpoint))


def lora_state(folder: RunFolder, checkpoint: str = "final") -> dict[str, Tensor]:
    """A checkpoint's LoRA under the key names that ComfyUI loads."""
    pairs, rank = folder.lora(checkpoint.strip().lower()), folder.config().lora.rank
    return export_state(pairs, rank, rank, "comfyui", folder.family())
