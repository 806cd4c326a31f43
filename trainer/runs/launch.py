"""Start, resume and continue a run: written once, for the command line, the ComfyUI node and the benchmark."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config.loading import with_options
from ..config.schema import Config, ConfigError
from ..files import require_writable
from ..guard.guard import Guard, make_guard
from ..guard.limits import GuardVerdict, replay
from ..guard.probe import Probe
from ..loop.align import Job, Update
from ..loop.distributed import Processes, join
from ..loop.interrupts import interrupts
from ..loop.plan import make_plan
from ..loop.state import TrainingState, make_training_state
from ..policy.base import Policy
from ..policy.loading import make_policy
from ..program import program_name
from .folder import NotSaved, RunFolder, writing
from .identity import NotResumed, RunRecord, identity_of, require_accepted
from .rewards import load_rewards, require_prompts
from .rows import row_problems
from .tensorboard import make_board, require_tensorboard, write_board


class StoppedByGuard(NotResumed):
    """A run whose guard stopped it. Its updates are exactly repeatable, so without a change it would stop again."""

    def __init__(self, folder: RunFolder, verdict: GuardVerdict):
        self.kept = verdict.kept
        other = "a lower optimizer.learning_rate or a higher objective.kl_weight"
        command = f"`{program_name()} resume {folder.path} --checkpoint kept --accept-changes`"
        super().__init__(
            f"{folder.path} was stopped by its guard: {verdict.reason}.",
            f'Raise the guard\'s tolerances in {folder.config_file} or set guard.action = "warn", then resume. Or '
            + (f"start a new run with {other}." if self.kept is None else f"set {other} there, then {command}."),
        )


class Run:
    """A run and its folder:  `with run: for update in align(run.state, run.job): run.keep(update)`

    Entering locks the folder and begins or continues what it holds. Whatever ends the run, finished updates are saved:
    from then on signals wait, except while an update is computed.
    """

    def __init__(self, folder: RunFolder, state: TrainingState, job: Job, checkpoint: str | None = None):
        self.folder, self.state, self.job = folder, state, job
        self.checkpoint = checkpoint  # to continue from; None begins a new run
        self.accept_changes = False  # of what the run was made with
        self.guard: Guard | None = None
        self.saved = 0
        self.board: Any = None
        self._unrecorded: Update | None = None
        self._open = ExitStack()

    @property
    def config(self) -> Config:
        return self.job.config

    def __enter__(self) -> "Run":
        main = self.job.processes.main
        with ExitStack() as stack:
            stack.enter_context(interrupts.hold())
            if main:
                stack.enter_context(self.folder.locked())
            stack.enter_context(self.folder.using(self.config))
            self._begin(stack, main)
            self.saved = self.state.done
            with interrupts.allow():
                self._set_guard()
            if main and self.config.run.tensorboard:
                self.board = make_board(self.folder.board, self.state.done)
            self._open = stack.pop_all()
        return self

    def _begin(self, stack: ExitStack, write: bool) -> None:
        """Begin or continue the folder's run, and record what it is made with; `stack` then cleans up."""
        levels = self.state.policy.grid(self.config.rollout.steps).levels.tolist()
        changes, identity = resume_changes(self.folder, self.job, self.checkpoint, levels)
        require_accepted(self.folder.path, changes, self.accept_changes)
        if write and self.checkpoint is None:
            self.folder.require_new()
            stack.callback(self._remove_unstarted)
        begin(self.folder, self.state, self.config, self.checkpoint, write)
        if write:
            with writing(self.folder.record_file, self.folder.path):
                RunRecord(self.folder.record_file).accept(identity, self.state.done, changes)
            if changes:
                self.folder.log(f"accepted after update {self.state.done}: {'; '.join(changes)}")

    def _remove_unstarted(self) -> None:
        if self.state.done == 0:
            self.folder.remove_unstarted()

    def _set_guard(self) -> None:
        """Make the configured guard, as it was after the recorded updates. May raise StoppedByGuard."""
        if not self.config.guard.every:
            return
        job, new = self.job, self.checkpoint is None
        records = [] if new else [row for row in self.folder.records() if row["update"] <= self.state.done]
        self.guard = guard_after(records, self.state.policy, job, self.folder, renew=new)
        if self.guard.stopped:
            raise StoppedByGuard(self.folder, self.guard.verdict)
        self.job = replace(job, guard=self.guard)

    def keep(self, update: Update) -> None:
        """Record a finished update; draw and save as often as the configuration says."""
        if not self.job.processes.main:
            return
        r, self._unrecorded = self.config.run, update
        self._record()
        if r.preview_every and (update.number % r.preview_every == 0 or update.number == 1):
            self.folder.draw(update, self.config.rollout.group_size)
            self.folder.draw_curves()
        if self.board is not None:
            write_board(self.board, update)
        kept = self.guard is not None and self.guard.verdict.kept == update.number
        if kept or update.number % r.save_every == 0 or update.number == r.updates:
            self._save()

    def _record(self) -> None:
        if self._unrecorded is not None:
            self.folder.record(self._unrecorded)
            self._unrecorded = None

    def _save(self) -> None:
        kept = None if self.guard is None else self.guard.verdict.kept
        self.folder.save(self.state, self.config, kept in (None, self.state.done))
        self.saved = self.state.done
        self.folder.prune(self.config.run.keep, kept)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with self._open, interrupts.hold():
            if not self.job.processes.main:
                return
            self._record()  # without its row, no checkpoint of an update
            if isinstance(error, NotSaved):  # a full disk has no room for these either, but that error is the cause
                with suppress(ConfigError):
                    self._finish()
                return
            if self.state.done > self.saved:
                self._save()
            self._finish()

    def _finish(self) -> None:
        """Bring the files beside the checkpoints up to date."""
        if self.board is not None:
            self.board.close()
        if self.guard is not None and self.folder.checkpoints.numbers():
            self.folder.write_final(self.state.policy.family, self.config)
        self.folder.draw_curves()


def resume_changes(
    folder: RunFolder, job: Job, checkpoint: str | None, levels: Sequence[float] | None = None
) -> tuple[list[str], dict[str, Any]]:
    """What a resume would change of the folder's run, its damaged metrics included, and what the run is now.

    `levels` are the noise levels of a rollout, None before the model is loaded.
    """
    identity = identity_of(job.config, job.prompts, job.rewards, job.content, levels)
    if checkpoint is None:
        return [], identity
    done = int(folder.checkpoint(checkpoint).name) if folder.checkpoints.numbers() else 0
    return [
        *RunRecord(folder.record_file).changes(identity, required=folder.checkpoints.has_manifest()),
        *row_problems(folder.metrics_file, done),
    ], identity


def begin(folder: RunFolder, state: TrainingState, config: Config, checkpoint: str | None, write: bool = True) -> None:
    """Begin a new run in an empty folder, or bring `state` to a checkpoint and cut off what came after it."""
    if checkpoint is None:
        if write:
            folder.start(config)
        return
    if folder.checkpoints.numbers():
        folder.load(state, checkpoint)
    if write:
        with writing(folder.path, folder.path):
            folder.rewrite_config(config)
            folder.keep_records(state.done)
            folder.checkpoints.put_aside(state.done)
            folder.remove_leftovers()
        if folder.checkpoints.numbers():
            folder.write_final(state.policy.family, config)


def guard_after(
    records: Sequence[dict[str, Any]], policy: Policy, job: Job, folder: RunFolder, renew: bool = False
) -> Guard:
    """A job's guard, as it was after the recorded updates; `renew` measures the base model anew."""
    probe = Probe(policy, job.config, list(job.prompts), job.rewards, job.processes, job.tick, job.content)
    guard = make_guard(probe, folder.guard_file, renew=renew, write=job.processes.main)
    guard.verdict = replay(records, job.config.guard, folder.checkpoints.numbers(), probe.digest)
    return guard


def close(folder: RunFolder, config: Config) -> None:
    """Do what the end of a finished run does, for one that was killed before it could."""
    with folder.locked():
        folder.remove_leftovers()
        kept = folder.kept()
        folder.prune(config.run.keep, kept)
        if kept is not None:
            folder.write_final(folder.family(), config)
        folder.draw_curves()


def start_run(config: Config, tick: Callable[[], None] = lambda: None) -> Run:
    """A new run; everything is loaded and checked before its folder is made."""
    folder = RunFolder(config.run.folder / config.run.name)
    join()
    main = Processes().main  # only the main process checks the folder, since the check writes to it
    with folder.locked() if main and folder.path.exists() else nullcontext():  # names another run that is writing it
        folder.require_new()
    if main:
        require_writable(folder.config_file, "run.folder:")
    if config.run.tensorboard:
        require_tensorboard()
    return Run(*_loaded(folder, config, tick))


@dataclass(frozen=True)
class ResumeOptions:
    """Where a run continues from, to how many updates in all, and whether changed settings are accepted."""

    checkpoint: str = "latest"
    updates: int | None = None
    accept_changes: bool = False


def resume_run(path: Path, options: ResumeOptions = ResumeOptions(), tick: Callable[[], None] = lambda: None) -> Run:
    """A run that continues from a checkpoint. Raises ConfigError when it is finished, or is not as it began."""
    folder = RunFolder(path)
    config = with_options(folder.config(), {"run": {"updates": options.updates}})
    some = bool(folder.checkpoints.numbers()) or options.checkpoint != "latest"
    done = folder.intact(options.checkpoint) if some else 0
    join()
    if done >= config.run.updates:
        if Processes().main:
            close(folder, config)
        raise ConfigError(
            f"{path} is finished: {done} of {config.run.updates} updates are done. Give --updates with a larger number."
        )
    checkpoint = str(done) if done else "latest"
    prompts = config.prompts.read()
    changes, _ = resume_changes(folder, Job(config, prompts, {}), checkpoint)  # before minutes of loading
    require_accepted(path, changes, options.accept_changes)
    modules = folder.lora_modules(checkpoint) if done and config.lora.start else []
    run = Run(*_loaded(folder, config, tick, modules), checkpoint)
    run.accept_changes = options.accept_changes
    return run


def _loaded(
    folder: RunFolder, config: Config, tick: Callable[[], None], resumed: Collection[str] = ()
) -> tuple[RunFolder, TrainingState, Job]:
    """What a Run takes; `resumed` as in make_policy."""
    prompts, rewards = config.prompts.read(), load_rewards(config)
    require_prompts(rewards, prompts)
    job = Job(config, prompts, rewards, Processes(), tick)
    state = make_training_state(make_policy(config, resumed), config)
    make_plan(state.policy, config, job.objective, prompts, state.done + 1)  # refuses steps that do not fit the model
    return folder, state, job
