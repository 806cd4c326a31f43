"""Interrupt tiny runs at random moments, resume them, and compare what they leave with a run that nothing interrupted.

    python tests/support/torture.py --kills 200          (make torture)

A moment is a model call, an operation on a file of the run, or a point in time; there the process is killed, or gets
SIGINT, SIGTERM or SIGHUP once to three times within 50 ms. Every child is a fork of one process that has imported
everything, and its command line is that of `python -m trainer`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
UPDATES = 4
TINY_RUN = {
    "model.device": "cpu",
    "prompts.lines": '["a fox", "a red star"]',
    "rollout.group-size": 2,
    "rollout.steps": 2,
    "rollout.prompts-per-update": 2,
    "reward.weights": "colorfulness",
    "objective.kl-every": 2,
    "optimizer.minibatches": 1,
    "optimizer.ema-decay": 0.9,
    "optimizer.ema-every": 1,
    "lora.rank": 2,
    "run.updates": UPDATES,
    "run.save-every": 2,
    "run.preview-every": 3,
}
POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_PER_RUN = 5  # then the run may finish


@dataclass(frozen=True)
class Moment:
    """When a child is interrupted, and how."""

    when: str  # call, file or time
    count: float  # which call, which file operation, or seconds after the first call
    number: signal.Signals
    times: int

    @property
    def name(self) -> str:
        place = {"call": "in a model call", "file": "at a file operation", "time": "at a point in time"}[self.when]
        return f"{self.number.name} {place}"


def strike(moment: Moment) -> None:
    for _ in range(moment.times):
        os.kill(os.getpid(), moment.number)


class Child:
    """In the forked process: counts its model calls and file operations, and strikes at the moment."""

    def __init__(self, folder: Path, moment: Moment | None, started: int | None):
        self.folder, self.moment, self.started = str(folder), moment, started
        self.calls = self.operations = 0

    def run(self, arguments: list[str]) -> int:
        from trainer.cli.main import main
        from trainer.cli.progress import Bar

        tick = Bar.tick

        def counted(bar: Bar) -> None:
            self.calls += 1
            if self.calls == 1 and self.started is not None:
                os.write(self.started, b"!")
            self.reached("call", self.calls)
            tick(bar)

        Bar.tick = counted  # type: ignore[method-assign]
        sys.addaudithook(self.audit)
        return main(arguments)

    def audit(self, event: str, arguments: tuple) -> None:
        touches = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
        if touches and str(arguments[0]).startswith(self.folder):
            self.operations += 1
            self.reached("file", self.operations)

    def reached(self, when: str, count: int) -> None:
        if self.moment is not None and self.moment.when == when and self.moment.count == count:
            strike(self.moment)


def spawn(folder: Path, arguments: list[str], moment: Moment | None, log: Path) -> int:
    """Run a command in a fork, -> its exit status; negative: killed by that signal."""
    reader, started = os.pipe()
    process = os.fork()
    if process == 0:
        status = 70
        try:
            os.close(reader)
            for number in POLITE:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = Child(folder, moment, started).run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(started)
    if moment is not None and moment.when == "time":
        os.read(reader, 1)  # its first model call, or its end
        time.sleep(moment.count)
        for _ in range(moment.times):
            os.kill(process, moment.number)
            time.sleep(random.uniform(0.005, 0.05))
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(reader)
    return status


def choose(rng: random.Random, most: dict[str, float]) -> Moment:
    """A random moment within a run that has this many calls, operations and seconds."""
    when = rng.choice(["call", "file", "file", "time"])
    count = rng.uniform(0, most["time"]) if when == "time" else rng.randint(1, int(most[when]))
    if rng.random() < 0.5:
        return Moment(when, count, signal.SIGKILL, 1)
    return Moment(when, count, rng.choice(POLITE), rng.choice([1, 2, 3]))


def command(folder: Path) -> list[str]:
    """What a user would type next."""
    if (folder / "config.toml").is_file():
        return ["resume", str(folder)]
    options = {**TINY_RUN, "run.folder": folder.parent, "run.name": folder.name}
    return ["train", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds_")} for line in lines]


def check_polite_end(folder: Path, log: Path, status: int, moment: Moment) -> list[str]:
    """What is wrong after a signal: everything finished has to be saved, and the last line has to say so."""
    if status != 128 + moment.number:
        return [f"exit status {status} instead of {128 + moment.number}: {log.read_text()[-600:]}"]
    last = log.read_text().rstrip().splitlines()[-1]
    if last == f"stopped by {moment.number.name}" or not folder.exists():  # while it was loading, or in update 1
        return [] if last.startswith("stopped by") else [f"last line: {last}"]
    saved = sorted(p.name for p in folder.glob("checkpoints/*") if p.name.isdigit())
    if not saved:  # killed before its first checkpoint, and interrupted when it began again
        return (
            []
            if "none is saved" in last and f"resume {folder}" in last and not rows(folder)
            else [f"last line: {last}"]
        )
    numbers = [row["update"] for row in rows(folder)]
    wrong = []
    if numbers != list(range(1, int(saved[-1]) + 1)):
        wrong.append(f"rows {numbers}, latest checkpoint {saved[-1]}")
    if saved[-1] not in last or f"resume {folder}" not in last:
        wrong.append(f"last line: {last}")
    return wrong


def compare(whole: Path, other: Path) -> list[str]:
    """Names of everything that differs, bit by bit; checkpoints that only one has come from its interruptions."""
    wrong = [] if rows(whole) == rows(other) else ["metrics.jsonl"]
    both = [p.name for p in (whole / "checkpoints").iterdir() if (other / "checkpoints" / p.name).is_dir()]
    if f"{UPDATES:06d}" not in both:
        wrong.append("the last checkpoint is missing")
    files = ["lora.safetensors", "run.json", *(str(p.relative_to(whole)) for p in whole.glob("grids/*"))]
    files += [f"checkpoints/{name}/{p.name}" for name in both for p in (whole / "checkpoints" / name).iterdir()]
    wrong += [f for f in files if not (other / f).is_file() or (whole / f).read_bytes() != (other / f).read_bytes()]
    config = (other / "config.toml").read_text().replace(f'"{other.name}"', f'"{whole.name}"')
    wrong += [] if config == (whole / "config.toml").read_text() else ["config.toml"]
    left = [str(p.relative_to(other)) for p in other.rglob("*") if p.suffix in (".tmp", ".gone")]
    return wrong + [f"{name} is left over" for name in left]


def torture(kills: int, seed: int, place: Path) -> int:
    """Interrupt runs until `kills` have struck, -> the number of things that are wrong."""
    rng, done, runs, wrong = random.Random(seed), Counter(), 0, []
    whole, log = place / "whole", place / "log"
    child, start = Child(whole, None, None), time.monotonic()
    if child.run(command(whole)):  # here, so that the forks find everything imported
        raise SystemExit("the uninterrupted run failed")
    most = {"call": child.calls, "file": child.operations, "time": (time.monotonic() - start) / 2}
    while sum(done.values()) < kills:
        folder, struck, finished = place / f"run{runs}", [], False
        while not finished:
            moment = None if len(struck) == MOST_PER_RUN or sum(done.values()) == kills else choose(rng, most)
            status = spawn(folder, command(folder), moment, log)
            if status == 2 and "Invalid thread pool" in log.read_text():
                continue  # PyTorch's thread pool did not survive the fork, while the model was loaded: not our moment
            finished = status == 0 or (status == 2 and "is finished: " in log.read_text())  # killed after its last save
            if moment is None and not finished:
                wrong.append(f"after {struck}: {log.read_text()[-600:]}")
                break
            if moment is not None and not finished:
                struck.append(moment)
                done[moment.name] += 1
                killed = moment.number == signal.SIGKILL
                problems = [] if killed and status < 0 else check_polite_end(folder, log, status, moment)
                wrong += [f"{moment}: {problem}" for problem in problems]
        if finished:
            wrong += [f"after {struck}: {name} differs" for name in compare(whole, folder)]
        shutil.rmtree(folder, ignore_errors=True)
        runs += 1
        print(f"run {runs}: {', '.join(moment.name for moment in struck)}", flush=True)
    for name, count in sorted(done.items()):
        print(f"{count:5} {name}")
    print(f"{sum(done.values()):5} interruptions of {runs} runs; {len(wrong)} differences from an uninterrupted run")
    print("\n".join(wrong))
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        return min(1, torture(options.kills, options.seed, Path(place)))


if __name__ == "__main__":
    sys.exit(main())
