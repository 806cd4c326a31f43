"""Stage `card`: measures the embedded models on prompts never seen in training; writes the model card and grids."""

import logging
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from comfyui_pcpo.metrics.frechet import diversity, frechet
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.tiny import tinyeval
from comfyui_pcpo.tiny.align import AlignImageEncoder, load_image_encoder
from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, SHAPE_NAMES
from comfyui_pcpo.tiny.tinyeval import REFERENCE_DRAWINGS, TASKS, is_right, known_scene, suite_prompts
from tools.tiny.fit import StageSettings
from tools.tiny.folders import Folders
from tools.tiny.measure import attribute_shares, drawn, features, generate, suites, verdicts
from tools.tiny.templates import read_by_templates

logger = logging.getLogger("tiny")
# model -> (steps, guidance scale); guidance 1 is the model itself, without classifier-free guidance
MODES = {"emoji-flow": ((12, 1.0), (20, 3.0)), "emoji-eps": ((50, 1.0), (50, 4.0))}
SAMPLES_PER_PROMPT = 2  # images per prompt
ATTRIBUTES = ("object", "count", "relation", "background", "pattern", "all")
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
CardRow = tuple[str, dict[str, float], float, float]


def rows(encoder: AlignImageEncoder, name: str, prompts: list[str], root: Path) -> list[CardRow]:
    """Shares, distance to drawings and diversity of drawings and of each model's images, for one suite of prompts."""
    each = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    first, second = (drawn(each, seed) for seed in (10, 11))
    reference = features(encoder, first)
    images = {"drawings": second}
    for model, modes in MODES.items():
        if (root / model).exists():
            for steps, guidance in modes:
                label = f"{model}, {steps} steps, guidance {guidance:g}"
                images[label] = generate(model, each, steps, guidance, root)
    table = []
    for label, found in images.items():
        seen = features(encoder, found)
        right = attribute_shares(verdicts(encoder, found, each))
        table.append((label, right, frechet(seen, reference), diversity(seen, SAMPLES_PER_PROMPT)))
        logger.info("%s: %s", name, table[-1])
    return table


def write_drawing_features(encoder: AlignImageEncoder, folder: Path) -> None:
    """The reference of TinyEval's distances: features of drawings of its prompts, read back by `drawing_features`."""
    each = [prompt for prompt in suite_prompts() for _ in range(REFERENCE_DRAWINGS)]
    save_file({"features": features(encoder, drawn(each, seed=30)).half()}, folder / "drawings.safetensors")


def suite_rows(encoder: AlignImageEncoder, root: Path) -> list[str]:
    """TinyEval's shares of right images: drawings, and each model without guidance."""
    each = [prompt for prompt in suite_prompts() for _ in range(SAMPLES_PER_PROMPT)]
    images = {"drawings": drawn(each, seed=31)}
    for model, modes in MODES.items():
        if (root / model).exists():
            steps, guidance = modes[0]
            images[f"{model}, {steps} steps, guidance {guidance:g}"] = generate(model, each, steps, guidance, root)
    lines = []
    for label, shown in images.items():
        found = tinyeval.shares([verdict["all"] for verdict in verdicts(encoder, shown, each)], each)
        logger.info("TinyEval, %s: %s", label, found)
        cells = [f"{100 * found[name]:.0f} %" for name in (*TASKS, "hard tasks", "all tasks")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def second_opinion(encoder: AlignImageEncoder, images: Tensor, prompts: list[str]) -> str:
    """How often emoji-align and template matching agree on whether an image is right, and what the others are."""
    first = [verdict["all"] for verdict in verdicts(encoder, images, prompts)]
    second = [
        is_right(read_by_templates(image.permute(2, 0, 1)), known_scene(p))
        for image, p in zip(images, prompts, strict=True)
    ]
    same = sum(a == b for a, b in zip(first, second, strict=True))
    alone = sum(a and not b for a, b in zip(first, second, strict=True))
    return f"{same} of {len(images)} ({alone} right for emoji-align alone, {len(images) - same - alone} for the other)"


def write_card(settings: StageSettings, folders: Folders) -> None:
    """Measure everything; write README.md beside the models and grids into the work folder."""
    encoder = load_image_encoder(folders.models / "emoji-align")
    write_drawing_features(encoder, folders.models / "emoji-align")
    tables = {name: rows(encoder, name, prompts, folders.models) for name, prompts in suites().items()}
    for name, modes in MODES.items():
        if (folders.models / name).exists():
            shown = [prompt for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_PER_PROMPT)]
            steps, guidance = modes[-1]
            images = generate(name, shown, steps, guidance, folders.models, seed=3)
            grid(images, shown, columns=6, tile=160).save(settings.work / f"{name}.png")
    each = [prompt for prompt in suite_prompts() for _ in range(SAMPLES_PER_PROMPT)]
    opinions = {"drawings": second_opinion(encoder, drawn(each, seed=32), each)}
    if (folders.models / "emoji-flow").exists():
        images = generate("emoji-flow", each, *MODES["emoji-flow"][0], folders.models)
        opinions["images of emoji-flow"] = second_opinion(encoder, images, each)
    agreement = "; ".join(f"{label} {opinion}" for label, opinion in opinions.items())
    text = card_text(tables, suite_rows(encoder, folders.models), agreement)
    (folders.models / "README.md").write_text(text, encoding="utf-8")


def table_text(table: list[CardRow]) -> str:
    lines = ["| | " + " | ".join(ATTRIBUTES) + " | tiny FD | diversity |", "|---|" + "---|" * (len(ATTRIBUTES) + 2)]
    for label, right, far, apart in table:
        cells = [f"{100 * right[name]:.1f} %" if name in right else "" for name in ATTRIBUTES]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {far:.2f} | {apart:.3f} |")
    return "\n".join(lines)


def card_text(tables: dict[str, list[CardRow]], suite: list[str], agreement: str) -> str:
    sections = "\n\n".join(f"{SUITE_TITLES[name]}\n\n{table_text(table)}" for name, table in tables.items())
    head = ["| | " + " | ".join((*TASKS, "hard tasks", "all tasks")) + " |", "|---|" + "---|" * (len(TASKS) + 2)]
    world = {"objects": ", ".join(OBJECTS), "shapes": ", ".join(SHAPE_NAMES), "colors": ", ".join(COLORS)}
    return CARD.format(**world, tables=sections, agreement=agreement, suite="\n".join((*head, *suite)))


SUITE_TITLES = {
    "equal": "One to three equal objects on a background colour never seen with them:",
    "pairs": "Two objects never seen in one image, side by side or above each other:",
    "shapes": "Two things, at least one a coloured shape, in combinations never seen:",
    "mixed": "Three or four things of two kinds, in combinations never seen:",
}
CARD = """# The embedded models

Tiny text-to-image models, trained from scratch, 128x128 pixels: `emoji-flow` (SD3-type flow transformer), `emoji-eps`
(SD1.5-type epsilon UNet), one 8x autoencoder with 16 latent channels, one CLIP-type text encoder, `emoji-align`, which
finds objects, background and pattern in an image and compares images with captions, and `emoji-polish`, which rates how
clean a drawing is.
They know 20 objects ({objects}) and coloured shapes ({shapes}); up to four in an image, of one or two
kinds, one left of or above the other; on 8 colours ({colors}), plain, striped or dotted.

## Quality on prompts never seen in training

Read by emoji-align; `object` is the right kinds and no others, `count` the right number of each. Tiny FD is the Frechet
distance of its features to drawings, diversity the mean cosine distance between two images of a prompt. The first row
of each table is a second set of drawings: the ceiling. Plain diffusers pipelines.

{tables}

## TinyEval

Six tasks of 20 prompts each, none of whose combinations were trained. An image is right if everything its prompt asks
for is there. The hard tasks are the last four. `pcpo evaluate emoji-flow --suite tinyeval` measures it with more seeds.

{suite}

Reader and generators learned from the same kind of drawings, so these figures measure prompt following inside this
world only. The reader was checked against template matching with the drawn sprites, which learns nothing
(`tools/tiny/templates.py`). Both say the same of an image's being right or wrong: {agreement}.

## How they were made

Drawn from the glyphs of Noto Color Emoji (SIL Open Font License 1.1), captions with attributes left out at random, 10 %
empty captions for classifier-free guidance. `python -m tools.tiny --help` lists the stages. The weights are stored as
float16 and run in float32.

Licence: Apache-2.0, as the rest of the project. The glyphs that the models imitate are Google's Noto Color Emoji.
"""
