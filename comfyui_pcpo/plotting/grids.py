"""Image grids with captions, and pairs of images before and after training, by Pillow.

Everything is drawn at OVERSAMPLING times its size and reduced once, which smooths lines and letters.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from comfyui_pcpo.plotting.style import BETTER, DESK, HEADING, INK, MUTED, PALETTE, PAPER, TEXT, WORSE
from comfyui_pcpo.plotting.text import shorten, wrap

OVERSAMPLING = 3
IMAGE_SIDE = 160  # longer side of an image
GAP, CARD_GAP = 12, 14
ROW, CARD_ROW = 15, 17  # distance of two rows of text
INSET, BETWEEN = 10, 4  # beside a card's images, and between them
HEAD = 20  # above the cards
TITLE_ROW = 24  # of a group's title
SCORE_FOOT, PLAIN_FOOT = 38, 12  # below a card's images, with and without scores
CORNER, CARD_CORNER = 6, 10  # radii
VERDICT = 20  # size of ticks and crosses

Images = np.ndarray | Tensor
SideScores = tuple[Sequence[float], Sequence[float]]


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans: all plots share one font, and Pillow's own has no letter outside of English."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size * OVERSAMPLING)


def text_width(text: str, size: float) -> float:
    return _font(size).getlength(text) / OVERSAMPLING


class Canvas:
    """An image drawn at OVERSAMPLING times its size; coordinates are those of the finished one."""

    def __init__(self, width: float, height: float, paper: str = PAPER):
        self.size = (round(width), round(height))
        self.image = Image.new("RGB", (self.size[0] * OVERSAMPLING, self.size[1] * OVERSAMPLING), paper)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def box(self, edges: tuple[float, float, float, float], color: str, radius: float) -> None:
        left, top, right, bottom = (round(v * OVERSAMPLING) for v in edges)
        self.draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius * OVERSAMPLING, color)

    def text(
        self, at: tuple[float, float], text: str, color: str = INK, size: float = TEXT, anchor: str = "mm"
    ) -> None:
        """Text around a point, or to the right of it with anchor "lm"."""
        self.draw.text((at[0] * OVERSAMPLING, at[1] * OVERSAMPLING), text, color, _font(size), anchor)

    def paste(self, image: Image.Image, at: tuple[float, float], size: tuple[int, int]) -> None:
        """Put an image on the canvas with rounded corners and a hairline that holds white images on white paper."""
        filter = Image.Resampling.BICUBIC if size[0] > image.width else Image.Resampling.LANCZOS
        large = image.resize((size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), filter)
        mask = Image.new("L", large.size, 0)
        right, bottom = large.width - 1, large.height - 1
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, right, bottom), CORNER * OVERSAMPLING, 255)
        left, top = round(at[0] * OVERSAMPLING), round(at[1] * OVERSAMPLING)
        self.image.paste(large, (left, top), mask)
        edges = (left, top, left + right, top + bottom)
        self.draw.rounded_rectangle(edges, CORNER * OVERSAMPLING, outline=INK + "24", width=OVERSAMPLING)

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.BOX)


def to_pil_images(images: Images) -> list[Image.Image]:
    """uint8 or float in [0, 1], (B, H, W, 3) -> B images."""
    if isinstance(images, Tensor):
        images = (images.detach().float() if images.is_floating_point() else images.detach()).cpu().numpy()
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}, but must be (B, H, W, 3) with B of at least 1.")
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}, but must be uint8 or float in [0, 1]. Convert them.")
        images = np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    return [Image.fromarray(image) for image in images]


def _tile_size(image: Image.Image, tile: int) -> tuple[int, int]:
    ratio = tile / max(image.size)
    return max(1, round(image.width * ratio)), max(1, round(image.height * ratio))


def _require_same_count(images: int, others: Mapping[str, Sequence[Any] | None]) -> None:
    for name, values in others.items():
        if values is not None and len(values) != images:
            raise ValueError(f"{len(values)} {name} for {images} images. Give one for each.")


def _sheet(tiles: Sequence[Image.Image], columns: int, gap: int, paper: str = PAPER, head: int = 0) -> Image.Image:
    """Tiles of one size in rows, with gaps around them and `head` more pixels above."""
    width, height = tiles[0].width + gap, tiles[0].height + gap
    sheet = Image.new("RGB", (gap + columns * width, head + gap + math.ceil(len(tiles) / columns) * height), paper)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * width, head + gap + i // columns * height))
    return sheet


def grid(
    images: Images, captions: Sequence[str] | None = None, columns: int = 4, tile: int = IMAGE_SIDE
) -> Image.Image:
    """Images in rows, (B, H, W, 3), each over its caption of at most two rows."""
    parts = to_pil_images(images)
    _require_same_count(len(parts), {"captions": captions})
    width, height = size = _tile_size(parts[0], tile)
    texts = [wrap(caption, width, partial(text_width, size=TEXT)) for caption in captions or [""] * len(parts)]
    foot = 10 + ROW * max(len(text) for text in texts) if any(captions or ()) else 0
    tiles = []
    for image, text in zip(parts, texts, strict=True):
        canvas = Canvas(width, height + foot)
        canvas.paste(image, (0, 0), size)
        for k, line in enumerate(text):
            canvas.text((width / 2, height + 13 + ROW * k), line)
        tiles.append(canvas.finish())
    return _sheet(tiles, max(1, min(columns, len(tiles))), GAP)


def group_grid(images: Images, titles: Sequence[str], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Groups of one size, (P * G, H, W, 3): each group's P title above its images, and a caption below each image."""
    size = len(images) // len(titles)
    _require_same_count(len(images), {"images of the groups": range(size * len(titles)), "captions": captions})
    sheets = [
        grid(images[start : start + size], captions[start : start + size], columns)
        for start in range(0, len(images), size)
    ]
    width = sheets[0].width
    sheet = Image.new("RGB", (width, sum(TITLE_ROW + part.height for part in sheets)), PAPER)
    top = 0
    for title, part in zip(titles, sheets, strict=True):
        head = Canvas(width, TITLE_ROW)
        line = shorten(title, width - 2 * GAP, partial(text_width, size=HEADING))
        head.text((GAP, TITLE_ROW / 2 + 4), line, size=HEADING, anchor="lm")
        sheet.paste(head.finish(), (0, top))
        sheet.paste(part, (0, top + TITLE_ROW))
        top += TITLE_ROW + part.height
    return sheet


def before_after(
    before: Images,
    after: Images,
    prompts: Sequence[str],
    scores: SideScores | None = None,
    columns: int | Literal["square"] | None = None,
    titles: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """Pairs of images on cards with their prompt and scores, (B, H, W, 3) twice; 4 or 3 columns, without a hole.

    Scores may be verdicts (bool), which become ticks and crosses. `columns` may be "square": as many as make the
    sheet nearest to a square. `titles` name the two sides above each column.
    """
    pairs = to_pil_images(before), to_pil_images(after)
    count = len(pairs[0])
    lists = dict(zip(("before scores", "after scores"), scores or (), strict=False))
    _require_same_count(count, {"after images": pairs[1], "prompts": prompts, **lists})
    size = _tile_size(pairs[0][0], IMAGE_SIDE)
    texts = [wrap(prompt, 2 * size[0] + BETWEEN, partial(text_width, size=HEADING)) for prompt in prompts]
    head = 20 + CARD_ROW * max(len(text) for text in texts)
    marks = list(zip(*scores, strict=True)) if scores else [None] * count
    cards = [_card(*parts, size, head) for parts in zip(zip(*pairs, strict=True), texts, marks, strict=True)]
    if columns == "square":
        columns = _square_columns(count, *cards[0].size)
    columns = max(1, min(columns or min((4, 3), key=lambda n: -count % n), count))
    sheet = _sheet(cards, columns, CARD_GAP, DESK, HEAD)
    header = Canvas(cards[0].width, HEAD + CARD_GAP, DESK)
    for middle, title, color in zip(_middles(size[0]), titles, (MUTED, PALETTE[0]), strict=True):
        header.text((middle, header.size[1] / 2 + 4), title, color, HEADING)
    for k in range(columns):
        sheet.paste(header.finish(), (CARD_GAP + k * (cards[0].width + CARD_GAP), 0))
    return sheet


def _square_columns(count: int, width: int, height: int) -> int:
    """Columns in which `count` cards make a sheet near to a square, with few holes."""

    def fault(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * width / (rows * height))) + (rows * columns - count) / count

    return min(range(1, count + 1), key=fault)


def _middles(width: int) -> tuple[float, float]:
    """The middles of a card's two images, from its left edge."""
    return INSET + width / 2, INSET + BETWEEN + 1.5 * width


def _card(
    images: tuple[Image.Image, Image.Image],
    prompt: Sequence[str],
    scores: tuple[float, float] | None,
    size: tuple[int, int],
    head: int,
) -> Image.Image:
    """A prompt over two images over their scores."""
    width, height = 2 * (size[0] + INSET) + BETWEEN, head + size[1] + (SCORE_FOOT if scores else PLAIN_FOOT)
    canvas = Canvas(width, height, DESK)
    canvas.box((0, 0, width, height), PAPER, CARD_CORNER)
    for k, line in enumerate(prompt):
        canvas.text((width / 2, head / 2 + 1 + CARD_ROW * (k - (len(prompt) - 1) / 2)), line, INK, HEADING)
    for image, middle in zip(images, _middles(size[0]), strict=True):
        canvas.paste(image, (middle - size[0] / 2, head), size)
    if scores:
        _draw_scores(canvas, scores, _middles(size[0]), head + size[1] + SCORE_FOOT / 2 - 1)
    return canvas.finish()


def _score_text(value: float) -> str:
    if isinstance(value, bool):
        return "\u2713" if value else "\u2717"
    return "no score" if not math.isfinite(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _draw_scores(canvas: Canvas, scores: tuple[float, float], middles: tuple[float, float], y: float) -> None:
    """The two scores under their images; the second is green where it is higher. Verdicts are ticks and crosses."""
    before, after = scores
    if isinstance(before, bool) and isinstance(after, bool):
        for middle, value in zip(middles, (before, after), strict=True):
            canvas.text((middle, y), _score_text(value), BETTER if value else WORSE, VERDICT)
        return
    old, new = _score_text(before), _score_text(after)
    color = MUTED if old == new else BETTER if after > before else WORSE if after < before else MUTED
    canvas.text((middles[0], y), old, MUTED, HEADING - 1)
    half = text_width(new, HEADING - 1) / 2 + 9
    canvas.box((middles[1] - half, y - 10, middles[1] + half, y + 10), color + "1f", CARD_CORNER)
    canvas.text((middles[1], y), new, color, HEADING - 1)
