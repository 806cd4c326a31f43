"""A drawing surface on Pillow: lines, boxes, dots, pictures and text, and the colours of every picture here.

Everything is drawn at SCALE times its size and reduced once, which smooths lines and letters.
"""

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
PAPER, INK, MUTED, GRID, SHADE = "#ffffff", "#1f2933", "#66727f", "#e4e8ed", "#f1f3f5"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563")  # Okabe and Ito
UP, DOWN = "#00785a", "#b84a00"
ELLIPSIS = "\u2026"


@cache
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


class Canvas:
    """A picture drawn at SCALE times its size; coordinates are those of the finished picture."""

    def __init__(self, width: float, height: float, paper: str = PAPER):
        self.size = (round(width), round(height))
        self.image = Image.new("RGB", (self.size[0] * SCALE, self.size[1] * SCALE), paper)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1) -> None:
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], color, round(width * SCALE), joint="curve")

    def polygon(self, points: Sequence[tuple[float, float]], color: str) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], color)

    def box(self, edges: tuple[float, float, float, float], color: str, radius: float = 0) -> None:
        left, top, right, bottom = (round(v * SCALE) for v in edges)
        if right > left and bottom > top:
            self.draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius * SCALE, color)

    def dot(self, x: float, y: float, color: str, radius: float = 3) -> None:
        self.draw.circle((x * SCALE, y * SCALE), radius * SCALE, color)

    def text(self, at: tuple[float, float], text: str, color: str = INK, size: float = 11, anchor: str = "lm") -> None:
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, color, font(size), anchor)

    def vertical_text(self, at: tuple[float, float], text: str, size: float = 11) -> None:
        """Text that reads upward, centred on a point."""
        width, height = round(text_width(text, size) + 4), round(size * 1.8)
        strip = Canvas(width, height)
        strip.text((width / 2, height / 2), text, MUTED, size, "mm")
        turned = strip.image.rotate(90, expand=True)
        self.image.paste(turned, (round(at[0] * SCALE) - turned.width // 2, round(at[1] * SCALE) - turned.height // 2))

    def paste(self, picture: Image.Image, at: tuple[float, float], size: tuple[int, int], radius: float = 0) -> None:
        """Put a picture on the canvas with rounded corners and a hairline that holds white pictures on white paper."""
        kind = Image.Resampling.BICUBIC if size[0] > picture.width else Image.Resampling.LANCZOS
        large = picture.resize((size[0] * SCALE, size[1] * SCALE), kind)
        mask = Image.new("L", large.size, 0)
        edges = (0, 0, large.width - 1, large.height - 1)
        ImageDraw.Draw(mask).rounded_rectangle(edges, radius * SCALE, 255)
        left, top = round(at[0] * SCALE), round(at[1] * SCALE)
        self.image.paste(large, (left, top), mask)
        edges = (left, top, left + edges[2], top + edges[3])
        self.draw.rounded_rectangle(edges, radius * SCALE, outline=INK + "24", width=SCALE)

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.BOX)


def text_width(text: str, size: float) -> float:
    return font(size).getlength(text) / SCALE


def shorten(text: str, size: float, width: float) -> str:
    """Text that fits a width; what does not fit becomes an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text.rstrip() + ELLIPSIS, size) > width:
        text = text[:-1]
    return text.rstrip() + ELLIPSIS


def wrap(text: str, size: float, width: float, rows: int = 2) -> list[str]:
    """Words on at most `rows` rows of a width; the last row is shortened."""
    found, words = [""], text.split()
    while words:
        longer = f"{found[-1]} {words[0]}".strip()
        if found[-1] and len(found) == rows and text_width(longer, size) > width:
            found[-1] = shorten(" ".join([found[-1], *words]), size, width)
            break
        if found[-1] and text_width(longer, size) > width:
            found.append(words.pop(0))
        else:
            found[-1] = longer
            words.pop(0)
    return [shorten(row, size, width) for row in found]
