"""Stage `card`: measures the embedded models on held-out prompts; writes the model card and grids."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comfyui_pcpo.method.samplers import SAMPLERS
from comfyui_pcpo.metrics.features import Tiny, extract
from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.tiny import tinyeval
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.pipelines import EMBEDDED, load_tiny
from comfyui_pcpo.tiny.polish import load_polish
from comfyui_pcpo.tiny.tinyeval import REFERENCE_DRAWINGS, is_right, known_scene, suite_prompts
from tools.tiny.card_text import Agreement, CardFigures, CardRow, card_text
from tools.tiny.codec import psnr
from tools.tiny.data import draw_scenes
from tools.tiny.fit import StageSettings
from tools.tiny.folders import Folders
from tools.tiny.latents import load_autoencoder
from tools.tiny.measure import attribute_shares, drawn, generate, generate_with_noise, suites, verdicts
from tools.tiny.templates import read_by_templates
from tools.tiny.train_polish import polish_quality
from trainer.evaluation.demo import DEMO_STEPS

logger = logging.getLogger("tiny")
FLOW_MODEL, EPS_MODEL = EMBEDDED
MODES = ((12, 1.0), (20, 3.0))  # steps, guidance scale; 1 is the model itself, without classifier-free guidance
STOCHASTIC = [(FLOW_MODEL if sampler.kind == "flow" else EPS_MODEL, name) for name, sampler in SAMPLERS.items()]
SAMPLES_PER_PROMPT = 2
SAMPLE_PROMPTS = (
    "a big fox on a plain blue background",
    "two pandas on a striped pink background",
    "a fox left of a panda",
    "a star above a house",
    "a blue circle left of a yellow triangle on a plain white background",
    "two foxes and a star on a plain green background",
    "a big rocket on a dotted yellow background",
    "four mushrooms on a plain green background",
    "a frog above a donut on a plain purple background",
    "a big house on a striped orange background",
    "two hearts and two stars on a dotted white background",
    "a red square above an octopus on a plain yellow background",
)


@dataclass(frozen=True)
class CardImages:
    """Images that a table has figures of."""

    source: str
    images: Tensor  # (B, H, W, 3)
    prompts: list[str]  # (B,)


def suite_rows(network: Tiny, name: str, prompts: list[str], root: Path) -> list[CardRow]:
    """Figures of drawings and of each model's images, for one suite of prompts."""
    each, reference = each_sample(prompts), reference_features(network, prompts)
    images = {"drawings": drawn(each, seed=11)}
    for model in EMBEDDED:
        for steps, guidance in MODES:
            images[label(model, steps, guidance)] = generate(model, each, steps, guidance, root)
    return [card_row(name, network, CardImages(source, shown, each), reference) for source, shown in images.items()]


def sampler_rows(network: Tiny, prompts: list[str], root: Path) -> list[CardRow]:
    """Figures of the images that each stochastic sampler gives, without guidance."""
    each, reference = each_sample(prompts), reference_features(network, prompts)
    rows = []
    for model, method in STOCHASTIC:
        shown = generate_with_noise(model, each, method, DEMO_STEPS, root)
        rows.append(card_row("samplers", network, CardImages(f"{model}, {method}", shown, each), reference))
    return rows


def each_sample(prompts: Sequence[str]) -> list[str]:
    """Every prompt as often as it is sampled, in order."""
    return [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]


@torch.no_grad()
def reference_features(network: Tiny, prompts: Sequence[str]) -> Tensor:
    """Features of the drawings that distances are measured to, (B, D)."""
    return extract(network, drawn(each_sample(prompts), seed=10))[0]


def card_row(name: str, network: Tiny, shown: CardImages, reference: Tensor) -> CardRow:
    """What one table says of images, SAMPLES_PER_PROMPT of each prompt; `reference` has features of drawings."""
    (features,) = extract(network, shown.images)
    shares = attribute_shares(verdicts(network.encoder, shown.images, shown.prompts))
    spread = diversity(features, SAMPLES_PER_PROMPT)
    row = CardRow(shown.source, shares, frechet(features, reference), spread)
    logger.info("%s: %s", name, row)
    return row


def label(model: str, steps: int, guidance: float) -> str:
    return f"{model}, {steps} steps, guidance {guidance:g}"


def write_drawing_features(network: Tiny, folder: Path) -> None:
    """The reference of TinyEval's distances: features of drawings of its prompts, read back by `drawing_features`."""
    each = [prompt for prompt in suite_prompts() for _ in range(REFERENCE_DRAWINGS)]
    (features,) = extract(network, drawn(each, seed=30))
    save_file({"features": features.half()}, folder / "drawings.safetensors")


def tinyeval_images(prompts: list[str], root: Path) -> dict[str, Tensor]:
    """Drawings of the prompts, and each model's images without guidance."""
    images = {"drawings": drawn(prompts, seed=31)}
    steps, guidance = MODES[0]
    for model in EMBEDDED:
        images[label(model, steps, guidance)] = generate(model, prompts, steps, guidance, root)
    return images


def tinyeval_row(source: str, correct: list[bool], prompts: list[str]) -> CardRow:
    """TinyEval's shares of correct images."""
    shares = tinyeval.shares(correct, prompts)
    logger.info("TinyEval, %s: %s", source, shares)
    return CardRow(source, shares)


def second_opinion(source: str, first: list[bool], images: Tensor, prompts: list[str]) -> Agreement:
    """How often template matching agrees with emoji-align (`first`) on whether an image is correct, and the others."""
    readings = [read_by_templates(image) for image in images.permute(0, 3, 1, 2)]
    second = [is_right(reading, known_scene(prompt)) for reading, prompt in zip(readings, prompts, strict=True)]
    pairs = list(zip(first, second, strict=True))
    both, reader, templates = ((True, True), (True, False), (False, True))
    return Agreement(source, len(pairs), pairs.count(both), pairs.count(reader), pairs.count(templates))


def parameter_counts(root: Path) -> dict[str, int]:
    """Number of parameters by model."""
    flow, eps = (load_tiny(name, root) for name in EMBEDDED)
    models: dict[str, nn.Module] = {
        "`emoji-flow`": flow.transformer,
        "`emoji-eps`": eps.unet,
        "autoencoder": flow.vae,
        "text encoder": flow.text_encoder,
        "`emoji-align`": load_image_encoder(root / "emoji-align"),
        "`emoji-polish`": load_polish(root / "emoji-polish"),
    }
    return {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}


@torch.no_grad()
def reconstruction_psnr(folders: Folders, number: int) -> float:
    """The autoencoder's peak signal-to-noise ratio on new drawings, in dB."""
    vae, images = load_autoencoder(folders), draw_scenes(number, seed=100).every_image
    return psnr(vae.decode(vae.encode(images).latents).sample, images)


def save_samples(root: Path, folder: Path) -> None:
    """A grid of each model's images, with guidance."""
    each, (steps, guidance) = each_sample(SAMPLE_PROMPTS), MODES[-1]
    for model in EMBEDDED:
        images = generate(model, each, steps, guidance, root, seed=3)
        grid(images, each, columns=6, tile=160).save(folder / f"{model}.png")


def write_card(settings: StageSettings, folders: Folders) -> None:
    """Measure everything; write README.md beside the models and grids into the work folder."""
    network = Tiny(load_image_encoder(folders.models / "emoji-align"))
    write_drawing_features(network, folders.models / "emoji-align")
    save_samples(folders.models, settings.work)
    each = each_sample(suite_prompts())
    images = tinyeval_images(each, folders.models)
    correct = {
        source: [verdict["all"] for verdict in verdicts(network.encoder, shown, each)]
        for source, shown in images.items()
    }
    figures = CardFigures(
        parameter_counts(folders.models),
        {name: suite_rows(network, name, prompts, folders.models) for name, prompts in suites().items()},
        sampler_rows(network, suites()["equal"], folders.models),
        [tinyeval_row(source, verdict, each) for source, verdict in correct.items()],
        [second_opinion(source, correct[source], shown, each) for source, shown in images.items()],
        reconstruction_psnr(folders, settings.at_most(48)),
        polish_quality(folders, settings.at_most(400)),
    )
    (folders.models / "README.md").write_text(card_text(figures), encoding="utf-8")
