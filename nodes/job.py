"""A training run inside ComfyUI: widgets to configuration, the trainer's loop, live pictures, the run folder."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from comfyui_pcpo.lora.formats import parse_state
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.plotting.run_curves import curves

from ..trainer.config.loading import build, without_effect
from ..trainer.config.schema import Config, ConfigError
from ..trainer.loop.align import Job, Update, align
from ..trainer.loop.state import make_training_state
from ..trainer.runs.folder import RunFolder
from ..trainer.runs.launch import Run
from .files import free_name, runs_folder
from .host.policy import ComfyPolicy, with_policy
from .types import EncodedPrompts, RewardSum

log = logging.getLogger("pcpo")
PREVIEW = 512
PREVIEW_CURVE = 220  # least height of the curve under the images


@dataclass(frozen=True)
class Task:
    """Everything that the Train node is connected to."""

    model: Any
    vae: Any
    prompts: EncodedPrompts
    reward: RewardSum
    latent: Tensor
    lora: dict[str, Tensor] | None
    resume: bool


def make_config(task: Task, tree: dict[str, dict[str, Any]]) -> Config:
    """The trainer's configuration: what the widgets say and what is connected."""
    combined = task.reward.combined()
    name = task.model.attachments.get("pcpo_model", type(task.model.model).__name__)
    scale = task.vae.spacial_compression_decode()
    height, width = (int(n) * scale for n in task.latent.shape[-2:])
    run = {"folder": str(runs_folder()), **tree["run"]}
    if not task.resume:
        run["name"] = free_name(str(run["name"]))
    found = {
        **tree,
        "model": {"name": name, "device": "auto", **tree["model"]},
        "prompts": {"lines": task.prompts.lines, "negative": task.prompts.negative_text},
        "rollout": {**tree["rollout"], "height": height, "width": width},
        "reward": {
            "weights": dict(zip(combined.names, combined.weights.tolist(), strict=True)),
            "standardise": task.reward.standardise,
        },
        "run": run,
    }
    config = build(found, "Train LoRA (PCPO)")
    for sentence in without_effect(config):
        log.warning("PCPO: %s", sentence)
    return config


def train(task: Task, config: Config) -> RunFolder:
    """Do the run, or what is left of it. Interrupted or failed, it keeps a checkpoint of the finished updates."""
    folder = RunFolder(config.run.folder / config.run.name)
    rewards = {reward.name: reward for reward in task.reward.rewards}
    bar = ProgressBar(config.run.updates)

    def work(policy: ComfyPolicy) -> None:
        if task.lora is not None:
            policy.start_from(parse_state(task.lora, list(policy.layers)))
        state = make_training_state(policy, config)
        checkpoint = "latest" if task.resume and folder.config_file.is_file() else None
        with Run(folder, state, Job(config, task.prompts.lines, rewards, tick=tick), checkpoint) as run:
            bar.update_absolute(state.done, config.run.updates)
            for update in align(run.state, run.job):
                run.keep(update)
                bar.update_absolute(
                    update.number, config.run.updates, ("JPEG", preview(update, folder, config), PREVIEW)
                )
                folder.log(f"update {update.number}: reward {update.metrics['reward_mean']:.4f}")

    try:
        with_policy(task.model, task.vae, task.prompts, config, task.latent, work)
    except mm.InterruptProcessingException:
        log.info("PCPO: cancelled; finished updates are in %s, continue with resume.", folder.path)
        raise
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, error) from error
    log.info("PCPO: the LoRA is %s", folder.lora_file.resolve())
    return folder


def tick() -> None:
    """Called before every model call, so that Cancel is felt within one denoising step."""
    mm.throw_exception_if_processing_interrupted()


def out_of_memory(config: Config, error: Exception) -> ConfigError:
    r = config.rollout
    return ConfigError(
        f"out of memory with images_at_once {r.images_at_once} at {r.width} x {r.height} pixels ({error}). "
        f"Use images_at_once {max(1, r.images_at_once // 2)}, gradient_checkpointing, or a smaller latent; "
        "with resume on, finished updates are kept."
    )


def preview(update: Update, folder: RunFolder, config: Config) -> Image.Image:
    """The newest group, best first, over the reward so far."""
    size = config.rollout.group_size
    scores = update.scores[-size:].nan_to_num(-torch.inf)
    order = scores.argsort(descending=True)
    captions = [f"{float(s):.2f}" for s in scores[order]]
    group = grid(update.images[-size:][order], captions, columns=min(size, 4), tile=120)
    records = [{**row, "rewards": {}} for row in folder.records()]  # the total alone
    curve = curves(records, panels=("reward",), size=(group.width, max(PREVIEW_CURVE, round(0.6 * group.width))))
    image = Image.new("RGB", (group.width, group.height + curve.height), "white")
    image.paste(group, (0, 0))
    image.paste(curve, (0, group.height))
    return image
