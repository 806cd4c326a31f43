"""Text cut to a width, in time that depends on the width and not on the length of the text."""

from bisect import bisect_left
from collections.abc import Callable

Measure = Callable[[str], float]
"""Text -> its width in pixels."""
ELLIPSIS = "\u2026"


def shorten(text: str, width: float, measure: Measure) -> str:
    """Text on one line that fits a width; an ellipsis replaces what does not fit."""
    text = " ".join(text.split())
    most = int(width)  # characters are at least a pixel wide
    if len(text) <= most and measure(text) <= width:
        return text
    lengths = range(1, min(len(text), most) + 1)
    kept = bisect_left(lengths, True, key=lambda length: measure(text[:length].rstrip() + ELLIPSIS) > width)
    return text[:kept].rstrip() + ELLIPSIS


def wrap(text: str, width: float, measure: Measure, rows: int = 2) -> list[str]:
    """Words on at most `rows` rows of a width, at least one row; the last row is shortened."""
    words, lines = text.split(), []
    while words and len(lines) < rows - 1:
        count = 1
        while count < len(words) and measure(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words or not lines:
        lines.append(" ".join(words))
    return [shorten(line, width, measure) for line in lines]
