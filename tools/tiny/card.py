"""Measures the embedded models on prompts that training never showed, and writes the model card and its picture."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.metrics import frechet as distance
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.tiny.align import AlignImageEncoder, load_image_encoder
from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, PATTERNS, Scene, held_out_prompts, parse
from comfyui_pcpo.tiny.pipelines import MODELS, load_tiny
from comfyui_pcpo.tiny.polish import load_polish
from tools.tiny.codec import fit_linear
from tools.tiny.data import draw_pictures
from tools.tiny.draw import draw, glyphs
from tools.tiny.spoil import spoiled

logger = logging.getLogger("make")
SETTINGS = {"emoji-flow": (20, 3.0), "emoji-eps": (50, 4.0)}  # steps, guidance scale
SHOWN = (
    "a big fox on a plain blue background",
    "two pandas on a striped pink background",
    "a big rocket on a dotted yellow background",
    "three mushrooms on a plain green background",
    "a frog and a donut on a plain purple background",
    "a big house on a striped orange background",
    "two hearts on a dotted white background",
    "a big octopus on a plain yellow background",
    "a sunflower and a butterfly on a plain blue background",
    "three cacti on a striped pink background",
    "a small star on a dotted purple background",
    "a big pig on a plain green background",
)


def generate(name: str, prompts: Sequence[str], seed: int, root: Path = MODELS) -> Tensor:
    """Pictures of the plain diffusers pipeline, -> (B, H, W, 3) in [0, 1]."""
    pipeline = load_tiny(name, root)
    pipeline.set_progress_bar_config(disable=True)
    steps, scale = SETTINGS[name]
    more = {"max_sequence_length": 0} if name == "emoji-flow" else {}
    pictures = []
    for start in range(0, len(prompts), 48):
        part = list(prompts[start : start + 48])
        generator = torch.Generator().manual_seed(seed + start)
        found = pipeline(
            part, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="np", **more
        )
        pictures.append(torch.from_numpy(found.images))
    return torch.cat(pictures)


def reality(prompts: Sequence[str], seed: int) -> Tensor:
    """Drawn pictures of the prompts, what is unsaid chosen at random, -> (B, H, W, 3) in [0, 1]."""
    rng, pictures = np.random.default_rng(seed), glyphs()
    drawn = []
    for prompt in prompts:
        scene = parse(prompt)
        assert scene is not None
        size = scene.size or ("small", "big")[rng.integers(2)]
        pattern = scene.pattern or PATTERNS[rng.integers(3)]
        full = Scene(scene.objects, scene.count, size if scene.total == 1 else None, scene.color, pattern)
        drawn.append(np.asarray(draw(full, pictures, rng), np.float32) / 255)
    return torch.from_numpy(np.stack(drawn))


@torch.no_grad()
def features(encoder: AlignImageEncoder, images: Tensor) -> Tensor:
    """emoji-align's features, (B, H, W, 3) -> (B, 128)."""
    return torch.cat([encoder.encode(x.permute(0, 3, 1, 2) * 2 - 1) for x in images.split(64)])


def read_right(encoder: AlignImageEncoder, found: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures whose object, count, background colour and pattern (where said) are read as asked for."""
    read = encoder.read(found)
    names, colors = list(OBJECTS), list(COLORS)
    right: dict[str, list[bool]] = {"object": [], "count": [], "background": [], "pattern": []}
    for row, prompt in enumerate(prompts):
        scene = parse(prompt)
        assert scene is not None and scene.color is not None
        asked = {names.index(name) for name in scene.objects}
        best = set(read["objects"][row].topk(len(asked)).indices.tolist())
        right["object"].append(asked == best)
        right["count"].append(int(read["total"][row].argmax()) + 1 == scene.total)
        right["background"].append(int(read["color"][row].argmax()) == colors.index(scene.color))
        if scene.pattern is not None:
            right["pattern"].append(int(read["pattern"][row].argmax()) == PATTERNS.index(scene.pattern))
    return {name: sum(values) / len(values) for name, values in right.items()}


def polish_quality(root: Path, number: int = 800) -> float:
    """Share of the variance of cleanness that emoji-polish explains, on drawings that it never saw (R squared)."""
    images = draw_pictures(number, seed=12).images(torch.arange(number))
    with torch.random.fork_rng():
        torch.manual_seed(12)
        copies, clean = spoiled(images, fit_linear(images))
    judge = load_polish(root / "emoji-polish")
    found = torch.cat([judge(x) for x in copies.split(100)])
    return 1 - float((found - clean).square().mean() / clean.var(correction=0))


def write_card(args: argparse.Namespace) -> None:
    """Measure everything; writes models/README.md and docs/images/emoji-*.png."""
    encoder = load_image_encoder(args.models / "emoji-align")
    prompts = [prompt for prompt in held_out_prompts()[:: args.every] for _ in range(2)]
    drawn = features(encoder, reality(prompts, seed=10))
    rows = {"drawn pictures": (read_right(encoder, drawn, prompts), 0.0, distance.diversity(drawn, 2))}
    again = features(encoder, reality(prompts, seed=11))
    rows["drawn pictures"] = (rows["drawn pictures"][0], distance.frechet(drawn, again), rows["drawn pictures"][2])
    args.images.mkdir(parents=True, exist_ok=True)
    for name in SETTINGS:
        found = features(encoder, generate(name, prompts, 0, args.models))
        rows[name] = (
            read_right(encoder, found, prompts), distance.frechet(found, drawn), distance.diversity(found, 2)
        )  # fmt: skip
        logger.info("%s %s", name, rows[name])
        shown = [prompt for prompt in SHOWN for _ in range(3)]
        pictures = generate(name, shown, 3, args.models)
        grid(pictures, shown, columns=6, tile=128).save(args.images / f"{name}.png")
    (args.models / "README.md").write_text(card_text(rows, len(prompts), polish_quality(args.models)), encoding="utf-8")


def card_text(rows: dict[str, tuple[dict[str, float], float, float]], count: int, polish: float) -> str:
    table = "\n".join(
        f"| {name} | {100 * r['object']:.1f} % | {100 * r['count']:.1f} % | {100 * r['background']:.1f} % | "
        f"{100 * r['pattern']:.1f} % | {far:.2f} | {apart:.3f} |"
        for name, (r, far, apart) in rows.items()
    )
    settings = ", ".join(f"{name}: {steps} steps, guidance {scale:g}" for name, (steps, scale) in SETTINGS.items())
    return f"""# The embedded models

Tiny text-to-image models, really trained, 64x64 pixels: `emoji-flow` (SD3-type flow transformer, 3.8 M parameters),
`emoji-eps` (SD1.5-type epsilon UNet), one 8x autoencoder with 16 latent channels, one CLIP-type text encoder, and
`emoji-align`, which compares pictures with captions and reads object, count, background and pattern from a picture, and
`emoji-polish`, 52,000 parameters that judge how clean a drawing is.
They know {len(OBJECTS)} objects ({", ".join(OBJECTS)}), one to three of them or a pair, on {len(COLORS)} colours
({", ".join(COLORS)}), plain, striped or dotted.

## Quality on prompts never seen in training

{count} pictures of held-out combinations of object and background colour, read by emoji-align, and the Frechet distance
of its features to drawn pictures ("tiny FD"); diversity is the mean cosine distance between pictures of one prompt. The
first row is what emoji-align makes of drawn pictures: the ceiling. Plain diffusers pipelines; {settings}.

| | object | count | background | pattern | tiny FD | diversity |
|---|---|---|---|---|---|---|
{table}

The reader and the generators were trained on the same kind of pictures, so these figures measure prompt following
inside this little world and say nothing beyond it.

emoji-polish says how far a drawing was spoiled by blur, noise, a ghost image, fading or disturbed latents: R squared
{polish:.2f} on 800 drawings that it never saw.

## How they were made

50,000 pictures drawn from the glyphs of Noto Color Emoji (SIL Open Font License 1.1), captions with attributes left out
at random, 10 % empty captions for classifier-free guidance. A closed-form linear codec fixes the latents; the
generators train on them while the autoencoder learns to match it. The commands, on two CPU cores:

    python -m tools.tiny text    --work build/tiny --minutes 1.3
    python -m tools.tiny align   --work build/tiny --minutes 11
    python -m tools.tiny polish  --work build/tiny --minutes 5 --pictures 12000 --lr 2e-3
    python -m tools.tiny decoder --work build/tiny --minutes 50 --batch 24 --lr 2e-3
    python -m tools.tiny flow    --work build/tiny --minutes 45 --lr 1.5e-3
    python -m tools.tiny eps     --work build/tiny --minutes 60
    python -m tools.tiny card    --work build/tiny

Minutes are wall-clock, with three stages at a time on two cores. The shipped weights were trained in two or three
pieces (`--go-on`) that add up to these minutes. They are stored as float16 and run in float32.

Licence: Apache-2.0, as the rest of the project. The glyphs that the models imitate are Google's Noto Color Emoji.
"""
