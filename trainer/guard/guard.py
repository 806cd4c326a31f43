"""A guard against reward hacking: it measures fixed images every few updates, keeps the best update, stops the run."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from comfyui_pcpo.durable import safetensors_parts, write_durably

from ..loop.scoring import RunError
from ..loop.state import TrainingState
from .limits import GuardVerdict, guard_row, next_verdict
from .probe import ImageMeasures, Probe

FEATURES, SCORES = "features", "scores."


@dataclass
class Guard:
    """The guard of one run; `verdict` changes with every measurement."""

    probe: Probe
    base: ImageMeasures  # of the model without its LoRA
    verdict: GuardVerdict = field(default_factory=GuardVerdict)

    @property
    def exhausted(self) -> bool:
        """Whether the measurements were beyond the limits for as long as `patience` allows."""
        return self.verdict.violations >= self.probe.config.guard.patience

    @property
    def stopped(self) -> bool:
        return self.exhausted and self.probe.config.guard.action == "stop"

    def check(self, state: TrainingState, number: int) -> dict[str, Any]:
        """The metrics that the guard adds to update `number`: none unless it measures this update.

        It measures the LoRA that a run keeps, which is the EMA if there is one, and always that of the last update,
        which could not be kept otherwise.
        """
        if number % self.probe.config.guard.every and number != self.probe.config.run.updates:
            return {}
        start = time.perf_counter()
        with state.sampling("ema"):
            row = guard_row(self.probe.measure(), self.base, self.probe.config)
        self.verdict = next_verdict(self.verdict, row, number, self.probe.config.guard)
        row |= {"kept": self.verdict.kept, "violations": self.verdict.violations, "message": self.message()}
        row |= {"probe": self.probe.digest, "model_evaluations": self.probe.evaluations}
        return {"guard": row, "seconds_guard": round(time.perf_counter() - start, 4)}

    def message(self) -> str | None:
        """One sentence about a violation; None within the limits."""
        if self.verdict.reason is None:
            return None
        kept = "no update is within the limits" if self.verdict.kept is None else f"update {self.verdict.kept} is kept"
        count = f"{self.verdict.violations} of {self.probe.config.guard.patience} allowed measurements"
        head = "the guard stops the run" if self.stopped else "guard"
        return f"{head}: {self.verdict.reason} ({count}; {kept})"


def make_guard(probe: Probe, file: Path, renew: bool, write: bool) -> Guard:
    """A guard whose base values are read from `file`, or measured and written there."""
    base = None if renew else read_measures(file, probe.identity)
    if base is None:
        base = measure_base(probe)
        if write:
            write_measures(base, file, probe.identity)
    return Guard(probe, base)


def measure_base(probe: Probe) -> ImageMeasures:
    """The model without its LoRA. Raises RunError for a reward that fails on all of its images."""
    with probe.policy.reference():
        base = probe.measure()
    failed = [name for name, scores in base.scores.items() if not scores.isfinite().any()]
    if failed:
        raise RunError(
            f"{failed[0]} failed on all {len(probe.texts)} images of the base model (NaN or infinite), so the guard "
            "has nothing to compare with. Check the reward, or set guard.every = 0."
        )
    return base


def write_measures(base: ImageMeasures, file: Path, identity: str) -> None:
    tensors = {FEATURES: base.features, **{SCORES + name: values for name, values in base.scores.items()}}
    write_durably(file, *safetensors_parts(tensors, {"identity": json.dumps(identity)}))


def read_measures(file: Path, identity: str) -> ImageMeasures | None:
    """Base values that were measured as `identity` says; None where the file holds none."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("identity") != json.dumps(identity):
                return None
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (safe_open has no iter)
    except (OSError, SafetensorError):
        return None  # damaged: measured anew
    scores = {key.removeprefix(SCORES): values for key, values in tensors.items() if key.startswith(SCORES)}
    return ImageMeasures(scores, tensors[FEATURES])
