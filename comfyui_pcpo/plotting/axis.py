"""Axes: where a value lies on the paper, and round numbers to write beside it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Data range [low, high] on pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def drawable(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)


def nice_step(span: float, count: int = 6) -> float:
    """Smallest of 1, 2, 5 x 10^n that cuts `span` into at most `count` parts."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def ticks(low: float, high: float, count: int = 6, log: bool = False) -> list[float]:
    """Round numbers in [low, high]: about `count` of them, or powers of ten (with 2 and 5 where decades are few)."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, round((last - first) / count))
        factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
        found = [f * 10.0**n for n in range(first, last + 1, stride) for f in factors]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        return found if len(found) > 1 else ticks(low, high, count)
    step = nice_step(high - low, count)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's number with the digits that its step needs; step 0 stands for a logarithmic axis."""
    if value == 0:
        return "0"
    if not 1e-3 <= (step or value) < 1e5:
        return f"{value:.2e}".replace(".00e", "e").replace("0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if step else f"{value:.4g}"
