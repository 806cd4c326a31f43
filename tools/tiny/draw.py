"""Draws a `Scene` with the glyphs of Noto Color Emoji (SIL Open Font License), 128x128 pixels, anti-aliased."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comfyui_pcpo.tiny.align import PIXELS
from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, Scene

GLYPH = 109  # the only size that the font's bitmaps come in
TILE = 144
FINE = 8  # shapes are drawn this much larger, then reduced
SHEET = Path(__file__).parent / "glyphs.png"
SINGLE = {"small": 52, "big": 96}
BESIDE, STACKED = ((34, 64), (94, 64)), ((64, 34), (64, 94))
PLACES = {3: ((64, 35), (34, 92), (94, 92)), 4: ((34, 34), (94, 34), (34, 94), (94, 94))}
GROUP_WIDTHS = {2: 56, 3: 50, 4: 48}


@dataclass(frozen=True)
class Box:
    """One drawn object or shape: its kind (see captions.KINDS), centre and longer side in pixels."""

    kind: str
    x: int
    y: int
    width: int


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


@cache
def glyphs() -> dict[str, Image.Image]:
    """One tightly cropped RGBA image per object, from the sheet beside this file."""
    sheet = Image.open(SHEET).convert("RGBA")
    tiles = [sheet.crop((n * TILE, 0, (n + 1) * TILE, TILE)) for n in range(len(OBJECTS))]
    return {name: tile.crop(tile.getbbox()) for name, tile in zip(OBJECTS, tiles, strict=True)}


@cache
def sprite(kind: str, width: int) -> Image.Image:
    """RGBA image of a kind whose longer side is `width`."""
    if kind not in OBJECTS:
        color, shape = kind.split()
        return draw_shape(shape, color).resize((width, width), Image.Resampling.LANCZOS)
    glyph = glyphs()[kind]
    scale = width / max(glyph.size)
    return glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)


def draw_shape(shape: str, color: str) -> Image.Image:
    """A filled shape with a darker outline, large enough to be reduced without jagged edges."""
    size, edge = FINE * 64, FINE * 3
    tile = Image.new("RGBA", (size, size))
    pen, fill = ImageDraw.Draw(tile), COLORS[color]
    outline = tuple(round(0.72 * value) for value in fill)
    if shape == "circle":
        pen.ellipse((0, 0, size - 1, size - 1), fill=fill, outline=outline, width=edge)
    elif shape == "square":
        pen.rounded_rectangle((0, 0, size - 1, size - 1), size // 12, fill=fill, outline=outline, width=edge)
    else:
        corners = [(size / 2, size * 0.05), (size - 1, size * 0.93), (0, size * 0.93)]
        middle = np.mean(corners, 0)
        pen.polygon(corners, fill=outline)
        pen.polygon([tuple(middle + 0.84 * (np.array(corner) - middle)) for corner in corners], fill=fill)
    return tile


@cache
def background(color: str, pattern: str) -> Image.Image:
    """A plain, striped (diagonal) or dotted ground; the second tone is lighter, or greyish on white."""
    base = np.array(COLORS[color], np.float32)
    light = base + (np.array((150, 170, 190)) - base) * 0.45 if color == "white" else base + (255 - base) * 0.45
    yy, xx = np.mgrid[0:PIXELS, 0:PIXELS]
    if pattern == "striped":  # distance to the stripe's edge in pixels, then one pixel of smooth edge
        inside = (8 - np.abs((xx + yy) % 32 - 15.5)) / 2**0.5
    elif pattern == "dotted":
        inside = 8 - np.hypot(xx % 32 - 15.5, yy % 32 - 15.5)
    else:
        inside = np.full((PIXELS, PIXELS), -1.0)
    mask = np.clip(inside + 0.5, 0, 1)[..., None]
    return Image.fromarray((base + (light - base) * mask).round().astype(np.uint8))


def arrange(scene: Scene, rng: np.random.Generator) -> list[Box]:
    """Places for everything in the scene; by default, a single thing is big, and two are side by side, in order."""
    kinds = [thing.kind for thing in scene.things for _ in range(thing.count)]
    if scene.total == 1:
        small = scene.things[0].size == "small"
        width, centres, jitter = SINGLE["small" if small else "big"], ((64, 64),), 9 if small else 3
    elif scene.total == 2:
        width, centres, jitter = GROUP_WIDTHS[2], STACKED if scene.relation == "above" else BESIDE, 3
    else:
        width, centres, jitter = GROUP_WIDTHS[scene.total], PLACES[scene.total], 2
    if scene.total > 2:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    moves = rng.integers(-jitter, jitter + 1, (len(kinds), 2)).tolist()
    return [Box(kind, x + dx, y + dy, width) for kind, (x, y), (dx, dy) in zip(kinds, centres, moves, strict=True)]


def paint(scene: Scene, boxes: list[Box]) -> Image.Image:
    """Image of a scene whose background is fully said."""
    if scene.color is None or scene.pattern is None:
        raise ValueError(f"{scene} has no background. Give a colour and a pattern.")
    canvas = background(scene.color, scene.pattern).copy()
    for box in boxes:
        image = sprite(box.kind, box.width)
        canvas.paste(image, (box.x - image.width // 2, box.y - image.height // 2), image)
    return canvas


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Image of a scene; objects move by a few pixels from image to image."""
    return paint(scene, arrange(scene, rng))
