"""The result of an evaluation: a table, a JSON file and images."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from comfyui_pcpo.metrics.paired import Estimate, estimate, paired
from comfyui_pcpo.plotting.evaluation import Slope, slope_chart
from comfyui_pcpo.plotting.grids import before_after, grid, to_pil_images

from ..runs.rows import finite
from .metrics import DISTANCE

MOST_SHOWN = 12  # prompts, evenly spaced over all
FILES = ("evaluation.json", "evaluation.png", "before_after.png", "samples.png")
"""What `Report.write` may write."""


@dataclass(frozen=True)
class Metric:
    """One metric, a value for each seed; `after` is empty for a model without a LoRA."""

    name: str
    role: str
    before: list[float]
    after: list[float]

    @property
    def measured(self) -> bool:
        """Whether any seed has a value."""
        return any(map(math.isfinite, self.before))

    @property
    def lower(self) -> bool:
        return self.role == DISTANCE

    def summary(self) -> dict[str, Any]:
        """Means, standard errors and the paired test."""
        summary: dict[str, Any] = {"role": self.role, "better": "lower" if self.lower else "higher"}
        for side in ("before", "after") if self.after else ("before",):
            values = getattr(self, side)
            summary[side] = {**_named(estimate(values)), "seeds": values}
        if self.after:
            test = paired(self.before, self.after)
            summary["difference"] = {**_named(test.difference), "t": test.t, "p": test.p}
        return summary

    def row(self) -> tuple[str, ...]:
        """The cells of its row in the table."""
        head, before = f"{self.name} ({self.role})", _cell(estimate(self.before))
        if not self.after:
            return head, before
        test = paired(self.before, self.after)
        p = "-" if math.isnan(test.p) else "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
        return head, before, _cell(estimate(self.after)), _cell(test.difference, "+"), p


@dataclass
class Shown:
    """The first seed's first image of some prompts on one side, with its score."""

    prompts: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # (1, H, W, 3) each
    scores: list[float] = field(default_factory=list)


@dataclass
class Report:
    """Setup, metrics, sample images and notes of one evaluation."""

    setup: dict[str, Any]
    prompts: list[str]
    metrics: list[Metric]
    shown: dict[str, Shown]  # before, after
    notes: list[str]

    def tree(self) -> dict[str, Any]:
        """Everything but the images, as stored in the JSON file."""
        metrics = {metric.name: metric.summary() for metric in self.metrics}
        return finite({**self.setup, "prompts": self.prompts, "metrics": metrics, "notes": self.notes})

    def table(self) -> list[str]:
        """A header, and one line per metric."""
        measured = [metric.row() for metric in self.metrics if metric.measured]
        rows = [("metric", "before", "after", "difference", "p"), *measured]
        rows[0] = rows[0][: len(rows[-1])]
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        cells = [[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows]
        return ["  ".join([row[0].ljust(widths[0]), *rest]) for row, rest in zip(rows, cells, strict=True)]

    def write(self, folder: Path) -> list[Path]:
        """Write evaluation.json and the images, -> the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "evaluation.json"]
        files[0].write_text(json.dumps(self.tree(), indent=2) + "\n", encoding="utf-8")
        for name, image in self.draw().items():
            files.append(folder / name)
            image.save(files[-1])
        return files

    def draw(self) -> dict[str, Image.Image]:
        """File name -> image: the metrics and the pairs, or samples of a model without a LoRA."""
        before = self.shown["before"]
        texts = before.prompts
        if "after" not in self.shown:
            captions = [f"{text}  {value:.2f}" for text, value in zip(texts, before.scores, strict=True)]
            return {"samples.png": grid(torch.cat(before.images), captions)}
        after = self.shown["after"]
        lines = [Slope(m.name, m.role, m.before, m.after, m.lower) for m in self.metrics if m.measured]
        columns = len(lines) if len(lines) < 5 else math.ceil(len(lines) / math.ceil(len(lines) / 4))
        scores = before.scores, after.scores
        pairs = before_after(torch.cat(before.images), torch.cat(after.images), texts, scores, columns=4)
        return {"evaluation.png": slope_chart(lines, columns), "before_after.png": pairs}


def _named(e: Estimate) -> dict[str, float]:
    return {"mean": e.mean, "standard_error": e.error}


def _cell(e: Estimate, sign: str = "") -> str:
    return f"{e.mean:{sign}.4f}" + (f" +- {e.error:.4f}" if math.isfinite(e.error) else "")


def save_images(images: Tensor, folder: Path, first: int, group: int) -> None:
    """Write images as PROMPT-IMAGE.png, the first of them being number `first` of its side."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(to_pil_images(images), first):
        image.save(folder / f"{n // group:04d}-{n % group:02d}.png")
