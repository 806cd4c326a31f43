"""The text of the model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, SHAPE_NAMES
from comfyui_pcpo.tiny.tinyeval import TASKS

ATTRIBUTES = ("object", "count", "relation", "background", "pattern", "all")


@dataclass(frozen=True)
class CardRow:
    """What one table says of drawings or of a model's images."""

    label: str
    shares: dict[str, float]  # of correct images, by attribute or task
    distance: float = 0.0  # tiny FD
    diversity: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """On how many of a source's images emoji-align and template matching find all that the prompt asks for."""

    source: str
    images: int
    both: int
    reader_only: int
    templates_only: int


@dataclass(frozen=True)
class CardFigures:
    """All figures of the card."""

    parameters: dict[str, int]  # by model
    suites: dict[str, list[CardRow]]
    samplers: list[CardRow]  # on the first suite
    tinyeval: list[CardRow]
    agreement: list[Agreement]
    psnr: float  # of the autoencoder, in dB
    polish: float  # R squared of emoji-polish


@dataclass(frozen=True)
class StageRun:
    """How a stage was run for the shipped weights; None where that was not recorded."""

    stage: str
    options: str = ""
    minutes: int | None = None
    steps: int | None = None


TRAINING = (  # copied by hand from the logs of the last training
    StageRun("codec"),
    StageRun("text", minutes=2),
    StageRun("decoder", "--batch 16 --lr 1.5e-3 --float32", 57, 4092),
    StageRun("flow", "--batch 64 --lr 2e-3 --float32 --muon --compile", 253, 11_710),
    StageRun("align", minutes=38, steps=1568),
    StageRun("eps", "--batch 32 --lr 2e-3 --float32 --muon", 368, 14_867),
    StageRun("polish", "--batch 24 --lr 4e-3 --float32", 15, 800),
)
WIDTH = 120  # of a line
SUITE_TITLES = {
    "equal": "One to three equal objects on a background colour never seen with them:",
    "pairs": "Two objects never seen in one image, side by side or above each other:",
    "shapes": "Two things, at least one a coloured shape, in combinations never seen:",
    "mixed": "Three or four things of two kinds, in combinations never seen:",
}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is for labels."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def domain() -> str:
    objects, shapes, colors = (", ".join(names) for names in (OBJECTS, SHAPE_NAMES, COLORS))
    return fill(
        f"Domain: {len(OBJECTS)} objects ({objects}) and coloured shapes ({shapes}); up to four in an image, of one or "
        f"two kinds, one left of or above the other; on {len(COLORS)} colours ({colors}), plain, striped or dotted.",
        WIDTH,
    )


def suite_table(rows: list[CardRow]) -> str:
    lines = []
    for row in rows:
        cells = [f"{100 * row.shares[name]:.1f} %" if name in row.shares else "" for name in ATTRIBUTES]
        lines.append([row.label, *cells, f"{row.distance:.2f}", f"{row.diversity:.3f}"])
    return table(["", *ATTRIBUTES, "tiny FD", "diversity"], lines)


def tinyeval_table(rows: list[CardRow]) -> str:
    names = (*TASKS, "hard tasks", "all tasks")
    return table(["", *names], [[row.label, *(f"{100 * row.shares[name]:.0f} %" for name in names)] for row in rows])


def agreement_table(rows: list[Agreement]) -> str:
    header = ("", "images", "correct for both", "emoji-align only", "templates only", "neither")
    lines = []
    for row in rows:
        counts = row.both, row.reader_only, row.templates_only
        lines.append([row.source, *map(str, (row.images, *counts, row.images - sum(counts)))])
    return table(header, lines)


def training_table() -> str:
    lines = []
    for run in TRAINING:
        steps = "" if run.steps is None else f"{run.steps:,}"
        minutes = "" if run.minutes is None else str(run.minutes)
        lines.append([f"`{run.stage}`", f"`{run.options}`" if run.options else "", minutes, steps])
    return table(["stage", "options", "minutes", "steps"], lines)


def card_text(figures: CardFigures) -> str:
    suites = [f"{SUITE_TITLES[name]}\n\n{suite_table(rows)}" for name, rows in figures.suites.items()]
    return CARD.format(
        domain=domain(),
        parameters=table(["model", "parameters"], [[name, f"{n:,}"] for name, n in figures.parameters.items()]),
        suites="\n\n".join(suites),
        samplers=suite_table(figures.samplers),
        tinyeval=tinyeval_table(figures.tinyeval),
        agreement=agreement_table(figures.agreement),
        psnr=figures.psnr,
        polish=figures.polish,
        training=training_table(),
    )


CARD = """# The embedded models

Tiny text-to-image models, trained from scratch, 128x128 pixels: `emoji-flow` (SD3-type flow transformer), `emoji-eps`
(SD1.5-type epsilon UNet), one 8x autoencoder with 16 latent channels, one CLIP-type text encoder, `emoji-align`, which
finds objects, background and pattern in an image and compares images with captions, and `emoji-polish`, which rates how
clean a drawing is.

{parameters}

{domain}

## Quality on held-out prompts

Read by emoji-align; `object` is the right kinds and no others, `count` the right number of each. Tiny FD is the Frechet
distance of its features to drawings, diversity the mean cosine distance between two images of a prompt. The first row
of each table is a second set of drawings: the ceiling. Plain diffusers pipelines.

{suites}

The prompts of the first table through the stochastic samplers of training, each at its published noise level, with the
demo's 8 steps and without guidance:

{samplers}

## TinyEval

Six tasks of 20 prompts each, none of whose combinations were trained. An image is correct if it shows everything its
prompt asks for. The hard tasks are the last four. `pcpo evaluate emoji-flow --suite tinyeval` measures it with more
seeds.

{tinyeval}

Reader and generators were trained on the same kind of drawings, so these figures measure prompt following inside this
domain only. The reader was checked against template matching with the drawn sprites, which is not trained
(`tools/tiny/templates.py`). Images that show all that their prompt asks for, by either:

{agreement}

## Autoencoder and emoji-polish

The autoencoder reconstructs new drawings with a peak signal-to-noise ratio of {psnr:.1f} dB. emoji-polish predicts how
far new drawings were degraded by blur, noise, ghosting, fading or noise on the latents with an R squared of
{polish:.2f}.

## Training

The drawings are composed of the glyphs of Noto Color Emoji. Captions omit attributes at random, and 10 % are empty, for
classifier-free guidance. Some are wrong on purpose, as captions from the web are: of the images that the generators saw
for `a fox and a panda`, `a fox above a panda` or `four foxes`, two in five show two foxes, a panda above a fox or
three foxes (`tools/tiny/wording.py`). This makes the hard tasks hard, and leaves reinforcement learning something to
correct. Each stage is `python -m tools.tiny STAGE --work build/tiny --minutes MINUTES` with the options below; `--help`
lists more. Minutes are wall-clock on two CPU cores, shared by up to three stages, and add up those of resumed runs; an
empty cell was not recorded.

{training}

Weights are stored in float16 and run in float32.

## Licence

Apache-2.0, as the rest of the project. The glyphs that the models imitate are Google's Noto Color Emoji (SIL Open Font
License 1.1).
"""
