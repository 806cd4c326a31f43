"""Evaluate a model with and without its LoRA on the same noise: rewards, distances and diversity over seeds."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import derive_seed
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.pipelines import EMBEDDED
from comfyui_pcpo.tiny.tinyeval import drawing_features, suite_prompts

from ..config.loading import with_options
from ..config.schema import Config, ConfigError, PromptsConfig
from ..policy.diffusers_policy import DiffusersPolicy, module_names
from ..policy.encoded import Encoded
from ..policy.families import denoiser_of
from ..policy.loading import load_configured
from ..runs.folder import RunFolder
from ..runs.rewards import make_reward, require_prompts, reward_settings
from .metrics import ROLES, TINYEVAL, Meter, Tally, load_networks
from .options import EvaluationOptions
from .report import MOST_SHOWN, Metric, Report, Shown, save_images
from .sampling import Draw, Guide, decoded, sample_latents, sampling_policy
from .source import Source, open_source, read_pairs

IMAGES_AT_ONCE = 64  # images per call of `Tally.add`; rewards move to their GPU once per call


@dataclass(frozen=True)
class EvalContext:
    """Everything needed to sample and measure one side, before or after."""

    options: EvaluationOptions
    policy: DiffusersPolicy
    guides: list[Guide]  # the LoRA; none for a model without one
    prompts: list[str]
    encoded: Encoded  # the prompts
    meter: Meter
    images_folder: Path | None = None  # where to save every image
    tick: Callable[[int], object] = lambda count: None

    @property
    def sides(self) -> dict[str, list[Guide]]:
        return {"before": [], "after": self.guides} if self.guides else {"before": []}


def evaluate(
    source: str,
    options: EvaluationOptions,
    images_folder: Path | None = None,
    tick: Callable[[int], object] = lambda count: None,
) -> Report:
    """Sample and measure both sides for every seed; `tick` receives the number of images after every few.

    All images are written to `images_folder`, which is replaced once they are complete.
    """
    opened = open_source(source)
    saved = None if images_folder is None else Replacement(images_folder)
    context, notes = prepare(opened, options, saved and saved.partial, tick)
    if saved is not None:
        saved.begin()
    values: dict[str, list[dict[str, float]]] = {side: [] for side in context.sides}
    shown = {side: Shown() for side in context.sides}
    failed: dict[str, int] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for side in context.sides:
            tally = run_side(context, side, seed, shown[side])
            values[side].append(tally.metrics())
            for name, count in tally.failed().items():
                failed[name] = failed.get(name, 0) + count
    pictures, unmoved = (None, []) if saved is None else saved.finish()
    notes += unmoved
    notes += [f"{count} scores of {name} failed and were left out" for name, count in failed.items() if count]
    metrics = [
        Metric(name, role(name, opened), *([v[name] for v in values.get(s, [])] for s in ("before", "after")))
        for name in values["before"][0]
    ]
    notes += [no_value(metric.name, context.meter) for metric in metrics if not metric.measured]
    described = describe_setup(opened.config, source, options) | {"pictures": pictures and str(pictures)}
    return Report(described, context.prompts, metrics, shown, notes)


class Replacement:
    """A folder that is written as `partial`, beside the one that it replaces."""

    def __init__(self, folder: Path):
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")

    def begin(self) -> None:
        """Remove what an earlier time has left."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> tuple[Path, list[str]]:
        """Put it in place, -> where it then is, and a note if that was impossible."""
        folder, partial = self.folder, self.partial
        try:
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except OSError as error:
            reason = error.strerror or error
            return partial, [f"the images are in {partial}, since {folder} could not be replaced: {reason}"]
        return folder, []


def no_value(name: str, meter: Meter) -> str:
    """A note on a metric without any value, with the reason where a reward has one."""
    reason = meter.rewards[name].failure if name in meter.rewards else ""
    return f"{name} has no value: {reason}" if reason else f"{name} has no value"


def count_images(source: str, options: EvaluationOptions) -> int:
    """Number of images that an evaluation samples."""
    opened = open_source(source)
    prompts = len(configured(opened.config, options).prompts.read())
    return prompts * options.images * options.seeds * (1 if opened.path is None else 2)


def configured(config: Config, options: EvaluationOptions) -> Config:
    """The source's configuration with the options applied."""
    changes = {"rollout": {"cfg": options.cfg}, "reward": {"folder": options.folder}}
    if options.prompts is not None:
        changes["prompts"] = {"file": options.prompts, "lines": ()}
    if options.suite is not None:
        if config.model.name not in EMBEDDED:
            raise ConfigError(
                f"--suite {options.suite} judges images of the embedded models ({', '.join(EMBEDDED)}) only, and the "
                f"model is {config.model.name}. Name prompts with --prompts, and rewards with --rewards."
            )
        prompts = PromptsConfig(lines=suite_prompts(), negative=config.prompts.negative)
        config = config.model_copy(update={"prompts": prompts})
    return with_options(config, changes)


def prepare(
    opened: Source, options: EvaluationOptions, images_folder: Path | None, tick: Callable[[int], object]
) -> tuple[EvalContext, list[str]]:
    """Load everything before the first image is sampled, -> the context, and notes on what is not measured."""
    config = configured(opened.config, options)
    prompts = config.prompts.read()
    pipeline = load_configured(config.model)
    guides = []
    if opened.path is not None:
        if opened.path.is_dir():
            pairs = RunFolder(opened.path).lora(options.checkpoint)
        else:
            pairs = read_pairs(opened.path, module_names(denoiser_of(pipeline)))
        guides = [Guide(pairs, ImplicitReward(1.0))]
    meter, notes = make_meter(opened, config, options)
    if len(prompts) * options.images == 1 and (meter.reference or options.inception):
        raise ConfigError(
            "--images 1 of a single prompt is one image per seed, but distances and the Inception Score compare "
            "several. Use --images 2 or more."
        )
    require_prompts(meter.rewards, prompts)
    policy = sampling_policy(config, [guide.pairs for guide in guides], pipeline)
    return EvalContext(options, policy, guides, prompts, policy.encode(prompts), meter, images_folder, tick), notes


def make_meter(opened: Source, config: Config, options: EvaluationOptions) -> tuple[Meter, list[str]]:
    """Rewards, feature networks and the reference's features; notes name what was left out."""
    settings, tiny = reward_settings(config), config.model.name in EMBEDDED
    rewards = {name: make_reward(name, settings) for name in reward_names(opened, options)}
    for reward in rewards.values():
        reward.to("cpu").load()
    networks = load_networks(tiny, options, settings.device)
    meter, notes = Meter(rewards, networks, config.reward.offload, settings.images_at_once), []
    if options.suite is not None:
        meter.reader = load_image_encoder()
    notes.append(set_reference(meter, options))
    if options.images == 1:
        notes.append("one image per prompt, so no diversity")
    return meter, notes


def set_reference(meter: Meter, options: EvaluationOptions) -> str:
    """Set what distances are measured to, -> a note that names it and the distances left out."""
    names = meter.networks.by_name
    if options.reference is not None:
        if not names:
            return "neither --inception nor --dino, so no Frechet distance"
        return f"{meter.set_reference(options.reference)} images in {options.reference}"
    if options.suite is None:
        return "no --reference, so no Frechet distance"
    meter.reference["tiny FD"] = drawing_features()
    left_out = " or ".join(name for name in names if name not in meter.reference)
    note = "tiny FD is the distance to drawings of the suite's prompts"
    return f"{note}; no --reference, so no {left_out}" if left_out else note


def reward_names(opened: Source, options: EvaluationOptions) -> list[str]:
    """The rewards of the options, else those of the run; code that only a LoRA file names is never imported."""
    r = opened.config.reward
    names = list(dict.fromkeys(options.rewards or r.names))
    from_file = opened.path is not None and opened.path.is_file() and not options.rewards
    code = [name for name in names if ":" in name]
    if from_file and code:
        raise ConfigError(
            f"{opened.path} names code as a reward, {code[0]}, and code from a LoRA file is not run. "
            "Name the rewards with --rewards."
        )
    return names


def role(name: str, opened: Source) -> str:
    """What a metric stands for: trained, constraint or held out for the rewards of a LoRA, else its kind."""
    if name.startswith(TINYEVAL):
        return "share of correct images"
    if opened.path is None or name in ROLES:
        return ROLES.get(name, "reward")
    r = opened.config.reward
    return "trained" if name in r.weights else "constraint" if name in r.constraints else "held out"


def run_side(context: EvalContext, side: str, seed: int, shown: Shown) -> Tally:
    """One side's images of one seed, sampled prompt by prompt; decoded and measured IMAGES_AT_ONCE at a time."""
    options, group = context.options, context.options.images
    tally, waiting, first, count = Tally(context.meter, group), [], 0, len(context.prompts)
    most = min(MOST_SHOWN, count)
    places = [k * count // most for k in range(most)]
    for place in range(len(context.prompts)):
        settings = Draw(derive_seed(seed, place), options.steps, each=group)
        waiting.append(sample_latents(context.policy, context.encoded.rows([place]), context.sides[side], settings))
        if len(waiting) * group >= IMAGES_AT_ONCE or place == len(context.prompts) - 1:
            images = torch.cat([decoded(context.policy, latents) for latents in waiting])
            tally.add(images, [prompt for prompt in context.prompts[first : place + 1] for _ in range(group)])
            if seed == options.first_seed:
                shown.images += [images[None, (k - first) * group] for k in places if first <= k <= place]
            if context.images_folder is not None:
                save_images(images, context.images_folder / side / str(seed), first * group, group)
            waiting, first = [], place + 1
        context.tick(group)
    if seed == options.first_seed:
        scores = torch.cat(next(iter(tally.scores.values())))
        shown.scores += [float(scores[k * group]) for k in places]
        shown.prompts += [context.prompts[k] for k in places]
    return tally


def describe_setup(config: Config, source: str, options: EvaluationOptions) -> dict[str, Any]:
    """The settings of an evaluation, for its JSON file."""
    settings = {key: value for key, value in vars(options).items() if key != "prompts"}
    settings["rewards"] = list(options.rewards or ())
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return {"model": config.model.name, "source": source} | plain
