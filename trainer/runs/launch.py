"""Start, resume and continue a run: written once, for the command line, the ComfyUI node and the benchmark."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config.schema import Config, ConfigError
from ..guard.guard import Guard, make_guard
from ..guard.limits import replay
from ..guard.probe import Probe
from ..loop.align import Job, Update
from ..loop.distributed import Processes, join
from ..loop.state import TrainingState, make_training_state
from ..policy.loading import make_policy
from .folder import NotSaved, RunFolder, writing
from .rewards import read_rewards
from .tensorboard import make_board, write_board


class Run:
    """A run and its folder:  `with run: for update in align(run.state, run.job): run.keep(update)`

    Entering locks the folder and begins or continues what it holds; whatever ends the run, finished updates are saved.
    """

    def __init__(self, folder: RunFolder, state: TrainingState, job: Job, checkpoint: str | None = None):
        self.folder, self.state, self.job = folder, state, job
        self.checkpoint = checkpoint  # to continue from; None begins a new run
        self.guard: Guard | None = None
        self.saved = 0
        self.board: Any = None
        self._open = ExitStack()

    @property
    def config(self) -> Config:
        return self.job.config

    def __enter__(self) -> "Run":
        main = self.job.processes.main
        with ExitStack() as stack:
            if main:
                stack.enter_context(self.folder.locked())
            begin(self.folder, self.state, self.config, self.checkpoint, write=main)
            self.saved = self.state.done
            self._set_guard()
            if main and self.config.run.tensorboard:
                self.board = make_board(self.folder.path / "tensorboard")
            self._open = stack.pop_all()
        return self

    def _set_guard(self) -> None:
        """Make the configured guard, as it was after the recorded updates. Raises ConfigError if it stopped the run."""
        if not self.config.guard.every:
            return
        job, new = self.job, self.checkpoint is None
        probe = Probe(self.state.policy, self.config, list(job.prompts), job.rewards, job.processes, job.tick)
        self.guard = make_guard(probe, self.folder.guard_file, renew=new, write=job.processes.main)
        records = [] if new else [row for row in self.folder.records() if row["update"] <= self.state.done]
        self.guard.verdict = replay(records, self.config.guard)
        if self.guard.stopped:
            raise ConfigError(
                f"{self.folder.path} was stopped by its guard: {self.guard.verdict.reason}. Resume from an earlier "
                "checkpoint (--checkpoint kept), or change its config.toml: a larger guard.tolerance, or "
                'guard.action = "warn".'
            )
        self.job = replace(job, guard=self.guard)

    def keep(self, update: Update) -> None:
        """Record a finished update; draw and save as often as the configuration says."""
        if not self.job.processes.main:
            return
        r = self.config.run
        self.folder.record(update)
        if r.preview_every and (update.number % r.preview_every == 0 or update.number == 1):
            self.folder.draw(update, self.config.rollout.group_size)
            self.folder.draw_curves()
        if self.board is not None:
            write_board(self.board, update)
        kept = self.guard is not None and self.guard.verdict.kept == update.number
        if kept or update.number % r.save_every == 0 or update.number == r.updates:
            self._save()

    def _save(self) -> None:
        self.folder.save(self.state, self.config)
        self.saved = self.state.done

    def _write_kept(self) -> None:
        """Make lora.safetensors that of the update that the guard keeps."""
        if self.guard is not None and self.guard.verdict.kept is not None:
            number = self.guard.verdict.kept
            with writing(self.folder.lora_file, self.folder.path):
                pairs = self.folder.lora(str(number))
                self.folder.write_lora(pairs, self.state.policy.family, self.config, number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with self._open:
            if not self.job.processes.main:
                return
            if self.state.done > self.saved and not isinstance(error, NotSaved):
                self._save()
            self._write_kept()
            self.folder.draw_curves()
            if self.board is not None:
                self.board.close()


def begin(folder: RunFolder, state: TrainingState, config: Config, checkpoint: str | None, write: bool = True) -> None:
    """Begin a new run in an empty folder, or bring `state` to a checkpoint and cut off what came after it."""
    if checkpoint is None:
        if write:
            folder.start(config)
        return
    if folder.numbers():
        folder.load(state, checkpoint)
    if write:
        folder.rewrite_config(config)
        folder.keep_records(state.done)
        folder.keep_checkpoints(state.done)


def start_run(config: Config, tick: Callable[[], None] = lambda: None) -> Run:
    """A new run; everything is loaded and checked before its folder is made."""
    folder = RunFolder(config.run.folder / config.run.name)
    if folder.path.exists():
        with folder.locked():  # names another process that is writing it
            folder.require_new()
    return _assemble(folder, config, tick, None)


def resume_run(
    path: Path, checkpoint: str = "latest", updates: int | None = None, tick: Callable[[], None] = lambda: None
) -> Run:
    """A run that continues from a checkpoint, to `updates` in all. Raises ConfigError when it is finished."""
    folder = RunFolder(path)
    config = folder.config()
    if updates is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"updates": updates})})
    done = int(folder.checkpoint(checkpoint).name) if folder.numbers() or checkpoint != "latest" else 0
    if done >= config.run.updates:
        raise ConfigError(
            f"{path} is finished: {done} of {config.run.updates} updates are done. Give --updates with a larger number."
        )
    return _assemble(folder, config, tick, str(done) if done else "latest")


def _assemble(folder: RunFolder, config: Config, tick: Callable[[], None], checkpoint: str | None) -> Run:
    prompts, rewards = config.prompts.read(), read_rewards(config)
    join()
    job = Job(config, prompts, rewards, Processes(), tick)
    return Run(folder, make_training_state(make_policy(config), config), job, checkpoint)
