"""Draws a `Scene` with the glyphs of Noto Color Emoji (SIL Open Font License), 64x64 pixels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comfyui_pcpo.tiny.align import PIXELS
from comfyui_pcpo.tiny.captions import COLORS, COUNTS, OBJECTS, PATTERNS, Scene, is_held_out

GLYPH = 109  # the only size that the font's bitmaps come in
TILE = 144
SHEET = Path(__file__).parent / "glyphs.png"
PLACES = {  # (number of objects) -> (size, centres)
    2: (29, ((16, 32), (48, 32))),
    3: (26, ((32, 17), (16, 46), (48, 46))),
}
SINGLE = {"small": 28, "big": 48, None: 38}


def draw_sheet(font: Path) -> Image.Image:
    """All glyphs of a font side by side, RGBA, one TILE each."""
    face = ImageFont.truetype(str(font), GLYPH)
    sheet = Image.new("RGBA", (TILE * len(OBJECTS), TILE))
    for column, (name, (_, code)) in enumerate(OBJECTS.items()):
        tile = Image.new("RGBA", (2 * TILE, 2 * TILE))
        ImageDraw.Draw(tile).text((20, 20), chr(code), font=face, embedded_color=True)
        box = tile.getbbox()
        if box is None:
            raise ValueError(f"{font} has no glyph for {name} (U+{code:X}). Use Noto Color Emoji with colour bitmaps.")
        sheet.paste(tile.crop(box), (column * TILE, 0))
    return sheet


def glyphs() -> dict[str, Image.Image]:
    """One tightly cropped RGBA picture per object, from the sheet beside this file."""
    sheet = Image.open(SHEET).convert("RGBA")
    tiles = [sheet.crop((n * TILE, 0, (n + 1) * TILE, TILE)) for n in range(len(OBJECTS))]
    return {name: tile.crop(tile.getbbox()) for name, tile in zip(OBJECTS, tiles, strict=True)}


def background(color: str, pattern: str) -> Image.Image:
    """A plain, striped (diagonal) or dotted ground; the second tone is a third of the way to white, or to grey."""
    base = np.array(COLORS[color], np.float32)
    light = base + (np.array((150, 170, 190)) - base) * 0.45 if color == "white" else base + (255 - base) * 0.45
    yy, xx = np.mgrid[0:PIXELS, 0:PIXELS]
    if pattern == "striped":
        mask = ((xx + yy) % 16) < 8
    elif pattern == "dotted":
        mask = ((xx % 16 - 7.5) ** 2 + (yy % 16 - 7.5) ** 2) < 16
    else:
        mask = np.zeros((PIXELS, PIXELS), bool)
    return Image.fromarray(np.where(mask[..., None], light, base).round().astype(np.uint8))


def draw(scene: Scene, pictures: dict[str, Image.Image], rng: np.random.Generator) -> Image.Image:
    """Picture of a fully specified scene; objects move by a few pixels from picture to picture."""
    if scene.color is None or scene.pattern is None:
        raise ValueError(f"{scene} has no background. Give a colour and a pattern.")
    canvas = background(scene.color, scene.pattern)
    if scene.total == 1:
        size, centres, jitter = SINGLE[scene.size], ((32, 32),), 5 if scene.size == "small" else 2
    else:
        (size, centres), jitter = PLACES[scene.total], 1
    names = scene.objects if len(scene.objects) == scene.total else scene.objects * scene.total
    for name, (x, y) in zip(names, centres, strict=True):
        glyph = pictures[name]
        scale = size / max(glyph.size)
        small = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
        dx, dy = rng.integers(-jitter, jitter + 1, 2)
        canvas.paste(small, (x + int(dx) - small.width // 2, y + int(dy) - small.height // 2), small)
    return canvas


def random_scene(rng: np.random.Generator) -> Scene:
    """A fully specified scene that is not held out: half single objects, the rest two, three or a pair."""
    names, colors = list(OBJECTS), list(COLORS)
    while True:
        color = colors[rng.integers(len(colors))]
        pattern = PATTERNS[rng.choice(3, p=(0.5, 0.25, 0.25))]
        kind = rng.random()
        first, second = rng.choice(len(names), 2, replace=False)
        if kind < 0.5:
            scene = Scene((names[first],), 1, ("small", "big")[rng.integers(2)], color, pattern)
        elif kind < 0.85:
            scene = Scene((names[first],), int(rng.integers(2, max(COUNTS) + 1)), None, color, pattern)
        else:
            scene = Scene((names[first], names[second]), 1, None, color, pattern)
        if not is_held_out(scene):
            return scene
