"""Before and after a LoRA on the same noise: rewards, held-out rewards, distances and variety over seeds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import derive_seed
from comfyui_pcpo.tiny.pipelines import EMBEDDED

from ..config.schema import Config, ConfigError
from ..policy.diffusers_policy import DiffusersPolicy, module_names
from ..policy.families import denoiser_of
from ..policy.loading import load_pipeline
from ..runs.folder import RunFolder
from ..runs.rewards import make_reward, reward_settings
from .metrics import Files, Meter, Tally, load_networks
from .report import MOST_SHOWN, Metric, Report, Shown, save_images
from .sampling import Draw, Guide, sample, sampling_policy
from .source import Source, open_source, read_pairs

AT_ONCE = 64  # pictures that are measured together; rewards visit their GPU once for so many
ROLES = {
    "tiny FD": "distance, lower is better",
    "FID": "distance, lower is better",
    "FD-DINOv2": "distance, lower is better",
    "tiny diversity": "variety",
    "LPIPS diversity": "variety",
    "Inception Score": "variety",
}


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what, and how."""

    source: str
    prompts: Path | None = None
    rewards: tuple[str, ...] = ()
    seeds: int = 4
    images: int = 4
    steps: int = 20
    cfg: float | None = None
    first_seed: int = 0
    checkpoint: str = "latest"
    folder: Path | None = None  # reward weights
    reference: Path | None = None
    files: Files = field(default_factory=Files)
    pictures: Path | None = None  # where to write every picture

    def __post_init__(self) -> None:
        for name in ("seeds", "images", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}, but must be 1 or more.")
        if self.images == self.seeds == 1:
            raise ConfigError("--images 1 and --seeds 1 leave 1 picture of each prompt, too few. Use 2 or more of one.")


@dataclass(frozen=True)
class EvalContext:
    """Everything that sampling and measuring one side needs."""

    request: Request
    policy: DiffusersPolicy
    guides: list[Guide]  # the LoRA; none for a model without one
    prompts: list[str]
    meter: Meter

    @property
    def sides(self) -> dict[str, list[Guide]]:
        return {"before": [], "after": self.guides} if self.guides else {"before": []}


def evaluate(request: Request, tick: Callable[[int], object] = lambda count: None) -> Report:
    """Sample and measure both sides for every seed; `tick` is told of every few pictures that are done."""
    given = open_source(request.source)
    bench, notes = prepare(given, request)
    values: dict[str, list[dict[str, float]]] = {side: [] for side in bench.sides}
    shown = {side: Shown() for side in bench.sides}
    failed: dict[str, int] = {}
    for number in range(request.first_seed, request.first_seed + request.seeds):
        for side in bench.sides:
            tally = run_side(bench, side, number, shown[side], tick)
            values[side].append(tally.metrics())
            for name, count in tally.failed().items():
                failed[name] = failed.get(name, 0) + count
    notes += [f"{count} scores of {name} failed and were left out" for name, count in failed.items() if count]
    metrics = [
        Metric(name, role(name, given), *([v[name] for v in values.get(s, [])] for s in ("before", "after")))
        for name in values["before"][0]
    ]
    return Report(setup(request, given.config), bench.prompts, metrics, shown, notes)


def count_images(request: Request) -> int:
    """How many pictures an evaluation will make."""
    given = open_source(request.source)
    prompts = len(configured(given.config, request).prompts.read())
    return prompts * request.images * request.seeds * (1 if given.path is None else 2)


def configured(config: Config, request: Request) -> Config:
    """The source's configuration with what the request lays on it."""
    p, r, w = config.prompts, config.rollout, config.reward
    if request.prompts is not None:
        p = p.model_copy(update={"file": request.prompts, "lines": ()})
    if request.cfg is not None:
        r = r.model_copy(update={"cfg": request.cfg})
    if request.folder is not None:
        w = w.model_copy(update={"folder": request.folder})
    return config.model_copy(update={"prompts": p, "rollout": r, "reward": w})


def prepare(given: Source, request: Request) -> tuple[EvalContext, list[str]]:
    """Read everything before the first picture is made, -> the bench and notes on what is not measured."""
    config = configured(given.config, request)
    prompts = config.prompts.read()
    pipeline = load_pipeline(config.model.name, config.model.config)
    guides = []
    if given.path is not None:
        names = module_names(denoiser_of(pipeline))
        run = given.path.is_dir()
        pairs = RunFolder(given.path).lora(request.checkpoint) if run else read_pairs(given.path, names)
        guides = [Guide(pairs, ImplicitReward(1.0))]
    meter, notes = make_meter(given, config, request)
    policy = sampling_policy(config, [guide.pairs for guide in guides], pipeline)
    return EvalContext(request, policy, guides, prompts, meter), notes


def make_meter(given: Source, config: Config, request: Request) -> tuple[Meter, list[str]]:
    """Rewards, feature networks and the reference's features; notes say what was left out."""
    settings, tiny = reward_settings(config), config.model.name in EMBEDDED
    rewards = {name: make_reward(name, settings) for name in reward_names(given, request)}
    for reward in rewards.values():
        reward.to("cpu").load()
    networks = load_networks(tiny, request.files, settings.device)
    meter, notes = Meter(rewards, networks, config.reward.offload, settings.images_at_once), []
    if request.reference is None:
        notes.append("no --reference, so no Frechet distance")
    elif not networks.by_name:
        notes.append("no --inception and no --dino, so no Frechet distance")
    else:
        notes.append(f"{meter.look_at(request.reference)} pictures in {request.reference}")
    if request.images == 1:
        notes.append("1 image for each prompt, so no diversity")
    return meter, notes


def reward_names(given: Source, request: Request) -> list[str]:
    """The rewards asked for, else those of the run; code is only imported where a user names it."""
    r = given.config.reward
    names = list(dict.fromkeys(request.rewards or (*r.weights, *r.held_out)))
    foreign = given.path is not None and given.path.is_file() and not request.rewards
    code = [name for name in names if ":" in name]
    if foreign and code:
        raise ConfigError(f"{given.path} names {len(code)} reward as code, {code[0]}. Name the rewards with --rewards.")
    return names


def role(name: str, given: Source) -> str:
    """What a metric is, beside its name; only a LoRA was trained on something."""
    if given.path is None or name in ROLES:
        return ROLES.get(name, "reward")
    return "trained" if name in given.config.reward.weights else "held out"


def run_side(bench: EvalContext, side: str, seed: int, shown: Shown, tick: Callable[[int], object]) -> Tally:
    """One side's pictures of one seed, sampled prompt by prompt and measured AT_ONCE at a time."""
    request, group = bench.request, bench.request.images
    tally, waiting, texts = Tally(bench.meter, group), [], []
    for place, prompt in enumerate(bench.prompts):
        noise = derive_seed(seed, place)
        images = sample(bench.policy, [prompt], bench.sides[side], Draw(noise, request.steps, each=group))
        waiting.append(images)
        texts += [prompt] * group
        if seed == request.first_seed and place < MOST_SHOWN:
            shown.images.append(images[:1])
        if request.pictures is not None:
            save_images(images, request.pictures / side / str(seed), place * group, group)
        if len(texts) >= AT_ONCE or place == len(bench.prompts) - 1:
            tally.add(torch.cat(waiting), texts)
            waiting, texts = [], []
        tick(group)
    if seed == request.first_seed:
        first: Tensor = torch.cat(next(iter(tally.scores.values())))
        shown.scores += first[::group][:MOST_SHOWN].tolist()
    return tally


def setup(request: Request, config: Config) -> dict[str, Any]:
    """How the figures were made, for the JSON file."""
    options = {k: v for k, v in vars(request).items() if k not in ("prompts", "files")} | vars(request.files)
    return {"model": config.model.name} | {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
