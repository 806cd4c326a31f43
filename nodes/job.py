"""A training run inside ComfyUI: configuration, the trainer's loop, live preview, run folder."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from comfyui_pcpo.lora.formats import parse_state
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.plotting.run_curves import curves
from comfyui_pcpo.prompt import prompt_line
from comfyui_pcpo.reward import Reward

from ..trainer.config.diagnostics import without_effect
from ..trainer.config.loading import build
from ..trainer.config.presets import AUTO, PRESETS, described, resolved
from ..trainer.config.schema import Config, ConfigError
from ..trainer.loop.align import Job, Update, align
from ..trainer.loop.objectives import make_objective
from ..trainer.loop.plan import make_plan
from ..trainer.loop.scoring import ImageGroups, score, unattended
from ..trainer.loop.state import make_training_state
from ..trainer.policy.base import LoraPairs
from ..trainer.runs.folder import RunFolder
from ..trainer.runs.identity import NotResumed
from ..trainer.runs.launch import Run, StoppedByGuard
from ..trainer.runs.rewards import require_prompts
from .files import STARTED, free_run_name, has_updates, last_started, runs_folder
from .host.policy import ComfyPolicy, with_policy
from .host.presets import host_preset, model_content, training_room
from .types import EncodedPrompts, WeightedRewards

logger = logging.getLogger("pcpo")
BAR_UNITS = 100  # of an update in the progress bar
PREVIEW_SIZE = 1024  # longer side, which ComfyUI reduces the preview to
PREVIEW_IMAGES, PREVIEW_COLUMNS, PREVIEW_WIDTH = 8, 4, 416  # of a preview's images together
PREVIEW_CURVE = 0.42  # height of a curve below the images, as a share of the preview's width


@dataclass(frozen=True)
class TrainingInputs:
    """What is connected to Train LoRA (PCPO, GRPO), and its resume switch."""

    model: Any
    vae: Any
    prompts: EncodedPrompts
    reward: WeightedRewards
    latent: Tensor
    lora: dict[str, Tensor] | None
    resume: bool


def make_config(inputs: TrainingInputs, tree: dict[str, dict[str, Any]]) -> Config:
    """The trainer's configuration, from the widgets' sections and what is connected."""
    single = torch.tensor(inputs.reward.weights).tolist()  # in the precision of the runs that may be resumed
    weights = dict(zip(inputs.reward.names, single, strict=True))
    held_out = [name for name, weight in weights.items() if weight == 0] if any(weights.values()) else []
    name = inputs.model.attachments.get("pcpo_model", type(inputs.model.model).__name__)
    scale = inputs.vae.spacial_compression_decode()
    height, width = (int(n) * scale for n in inputs.latent.shape[-2:])
    run = {"folder": str(runs_folder()), **tree["run"]}
    found = last_started(str(run["name"])) if inputs.resume else None
    run["name"] = found or free_run_name(str(run["name"]))
    sections = {
        **tree,
        "lora": {"targets": AUTO, **tree["lora"]},
        "model": {"name": name, "device": "auto", **tree["model"]},
        "prompts": {
            "lines": [prompt_line(line) for line in inputs.prompts.lines],
            "file": None,
            "negative": inputs.prompts.negative_text,
        },
        "rollout": {"sde_window": AUTO, **tree["rollout"], "height": height, "width": width},
        "reward": {
            "weights": {name: weight for name, weight in weights.items() if name not in held_out},
            "held_out": held_out,
            "standardise": inputs.reward.standardise,
        },
        "run": run,
    }
    known = run_settings(runs_folder() / found) if found else {}
    chosen_now = {
        key: {**known.get(key, {}), **without_known_auto(values, known.get(key, {}))}
        for key, values in sections.items()
    }
    sections = {**known, **chosen_now}
    preset = host_preset(inputs.model)
    sections, chosen = resolved(sections, preset, training_room(inputs.model))
    config = build(sections, "Train LoRA (PCPO, GRPO)")
    logger.info("PCPO: %s", described(preset, chosen))
    suggest_size(config, preset)
    for sentence in without_effect(config):
        logger.warning("PCPO: %s", sentence)
    return config


def run_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a run, for the options that have no widget; empty before its first update."""
    return RunFolder(folder).config().model_dump() if has_updates(folder) else {}


def try_once(policy: ComfyPolicy, rewards: dict[str, Reward], config: Config) -> None:
    """A plan, a prediction, an image and its scores before the run begins, so that no rollout is in vain."""
    require_prompts(rewards, policy.lines)
    make_plan(policy, config, make_objective(config), policy.lines, 1)
    try:
        with torch.no_grad():
            noise = torch.zeros(1, *policy.latent_shape)
            time = policy.grid(config.rollout.steps).timesteps.tolist()[0]
            policy.predict(noise.to(policy.device), time, policy.encode(policy.lines[:1]))
            images = policy.decode(noise)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"the model, prompts, vae and latent_image do not fit together ({cause}). Connect the CLIP and the VAE "
            "of the model, and a latent of a size that it supports."
        ) from error
    pair = ImageGroups(images.repeat(2, 1, 1, 1), [policy.lines[0]] * 2, 2)
    score(unattended(rewards), pair)


def connected_lora(state: dict[str, Tensor], modules: list[str]) -> LoraPairs:
    """The LoRA to continue from, by module. Raises ConfigError if it is one of another model."""
    try:
        return parse_state(state, modules)
    except ValueError as error:
        what = str(error).split(". ")[0]  # its remedy is one for callers of the library
        raise ConfigError(
            f"the connected lora does not belong to this model ({what}). Connect one that was trained on this model."
        ) from error


def without_known_auto(widgets: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The widgets of a section, without those at `auto` that a resumed run has already resolved."""
    return {key: value for key, value in widgets.items() if value != AUTO or key not in known}


def suggest_size(config: Config, preset: str) -> None:
    """Log the size of the published recipe where the latent is larger: training there costs much less."""
    r, side = config.rollout, PRESETS[preset].side
    if side is not None and r.height and r.width and r.height * r.width > 1.5 * side**2:
        logger.info(
            "PCPO: training at %d x %d pixels; the recipe trains at %d x %d, several times faster, and samples "
            "at larger sizes. A smaller Empty Latent Image does that.", r.width, r.height, side, side,
        )  # fmt: skip


def train_lora(inputs: TrainingInputs, config: Config, name: str) -> RunFolder:
    """Train, or finish a resumed run. If it is interrupted or fails, the finished updates are saved."""
    folder = RunFolder(config.run.folder / config.run.name)
    rewards = {reward.name: reward for reward in inputs.reward.rewards}
    bar = RunBar(config)

    def work(policy: ComfyPolicy) -> None:
        if inputs.lora is not None:
            policy.start_from(connected_lora(inputs.lora, list(policy.layers)))
        try_once(policy, rewards, config)
        STARTED[name] = config.run.name
        state = make_training_state(policy, config)
        checkpoint = "latest" if inputs.resume and has_updates(folder.path) else None
        job = Job(
            config, inputs.prompts.lines, rewards, tick=bar.tick, content=model_content(inputs.model),
            waiting=mm.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        with Run(folder, state, job, checkpoint) as run:
            bar.show(state.done)
            for update in align(run.state, run.job):
                run.keep(update)
                bar.show(update.number, preview(update, folder, config))
                folder.log(f"update {update.number}: reward {update.metrics['reward_mean']:.4f}")
                warn_of_guard(update, folder)

    try:
        with_policy(inputs.model, inputs.vae, inputs.prompts, config, inputs.latent, work)
    except mm.InterruptProcessingException:
        logger.info("PCPO: cancelled; finished updates are saved in %s. Set resume to continue.", folder.path)
        raise
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, error, has_updates(folder.path)) from error
    except NotResumed as error:
        raise ConfigError(f"{error.what} {how_to_go_on(error, folder)}") from error
    logger.info("PCPO: saved the LoRA to %s", folder.lora_file.resolve())
    return folder


def warn_of_guard(update: Update, folder: RunFolder) -> None:
    """Log what the guard says about a violation."""
    message = update.metrics.get("guard", {}).get("message")
    if message:
        logger.warning("PCPO: update %d: %s", update.number, message)
        folder.log(message)


class RunBar:
    """ComfyUI's progress bar over a run, which moves with the model calls of each update.

    How many an update makes is a guess in the first one, and then what the one before it made. The guard's calls for
    the base model move the bar as well; ComfyUI does not draw it backwards, so it then waits for the first update.
    """

    def __init__(self, config: Config):
        r = config.rollout
        images = r.prompts_per_update * r.group_size
        self.done, self.calls, self.expected = 0, 0, 2 * r.steps * math.ceil(images / r.images_at_once)
        self.bar = ProgressBar(BAR_UNITS * config.run.updates)

    def tick(self) -> None:
        """Runs before every model call, so Cancel takes effect within one denoising step."""
        mm.throw_exception_if_processing_interrupted()
        self.calls += 1
        share = min(self.calls / self.expected, 1 - 1 / BAR_UNITS)
        self.bar.update_absolute(int(BAR_UNITS * (self.done + share)))

    def show(self, done: int, image: Image.Image | None = None) -> None:
        """That many updates are finished; `image` becomes the node's preview."""
        if image is not None:  # after an update; what was called before the first one says nothing about an update
            self.expected = self.calls
        self.calls, self.done = 0, done
        self.bar.update_absolute(BAR_UNITS * done, preview=image and ("JPEG", image, PREVIEW_SIZE))


def how_to_go_on(error: NotResumed, folder: RunFolder) -> str:
    """The node's fix for a run that cannot be resumed."""
    if not isinstance(error, StoppedByGuard):
        return "Undo that, or turn resume off to start a new run."
    other = "set a lower learning_rate or a higher kl_weight"
    start = "" if error.kept is None else f", connect Load Run (run {folder.path.name}, checkpoint kept) to lora"
    return f"Set guard_every to 0 to go on without the guard. Or turn resume off{start}, and {other}."


def out_of_memory(config: Config, error: Exception, saved: bool) -> ConfigError:
    """What needs less memory and is not set yet; `saved`: whether any update was finished."""
    r = config.rollout
    kept = " Finished updates are saved; set resume to continue." if saved else ""
    if str(error).startswith("reward "):
        return ConfigError(
            f"out of memory while scoring ({error}). Choose dtype float16 in Load Reward, or a smaller reward.{kept}"
        )
    fewer = f"set images_at_once to {r.images_at_once // 2}, " if r.images_at_once > 1 else ""
    checkpointed = "" if config.model.gradient_checkpointing else "turn on gradient_checkpointing, "
    return ConfigError(
        f"out of memory with images_at_once {r.images_at_once} at {r.width} x {r.height} pixels ({error}). To need "
        f"less, {fewer}{checkpointed}{'or ' if fewer or checkpointed else ''}use a smaller latent.{kept}"
    )


def best_to_worst(scores: Tensor, most: int) -> Tensor:
    """Places of at most `most` scores, (G,) -> (min(G, most),): evenly spaced by rank, best first."""
    ranks = torch.linspace(0, len(scores) - 1, min(len(scores), most)).round().long()
    return scores.argsort(descending=True)[ranks]


def preview(update: Update, folder: RunFolder, config: Config) -> Image.Image:
    """Images of the newest group, best first, above the reward curve and, once it has measured twice, the guard's.

    Of a large group, PREVIEW_IMAGES from its best to its worst; all previews are about as wide.
    """
    size = config.rollout.group_size
    scores = update.scores[-size:].nan_to_num(-torch.inf)
    shown = best_to_worst(scores, PREVIEW_IMAGES)
    captions = [f"{float(s):.2f}" for s in scores[shown]]
    columns = min(PREVIEW_COLUMNS, len(shown))  # few images are drawn larger, so that the curves keep their size
    group = grid(update.images[-size:][shown], captions, columns=columns, tile=PREVIEW_WIDTH // columns)
    records = [{**row, "rewards": {}} for row in folder.records()]  # the total only
    names = ["reward", *(["guard"] if sum("guard" in row for row in records) > 1 else [])]
    panel = (group.width, round(PREVIEW_CURVE * group.width))
    parts = [group, *(curves(records, panels=(name,), size=panel) for name in names)]
    image = Image.new("RGB", (group.width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height
    return image
