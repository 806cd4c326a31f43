"""Markdown tables and the numbers in them."""

import math
from collections.abc import Iterable, Sequence

from .study.statistics import Interval


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def format_number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def format_interval(interval: Interval, digits: int = 2) -> str:
    """`value [low, high]`, or the value alone if it has no limits."""
    if not math.isfinite(interval.value) or math.isnan(interval.low):
        return format_number(interval.value, digits)
    low, high = format_number(interval.low, digits), format_number(interval.high, digits)
    return f"{format_number(interval.value, digits)} [{low}, {high}]"


def format_p_value(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
