"""SIGINT, SIGTERM and SIGHUP: raised at once where nothing can be lost, held where something can."""

import signal
import sys

import pytest
from running import start_run

from trainer.cli import progress
from trainer.cli.main import main
from trainer.loop.interrupts import SIGNALS, Interrupted, Interrupts, interrupts
from trainer.runs.folder import RunFolder
from trainer.runs.launch import Run

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process")


@pytest.fixture
def handled():
    """Interrupts with Ctrl-C and SIGHUP not ignored, as in a terminal."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    with Interrupts() as found:
        yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@needs_signals
@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_raises_with_the_status_of_its_number(handled, number):
    with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
        signal.raise_signal(number)
    assert caught.value.status == 128 + number


@needs_signals
def test_a_held_signal_waits_until_it_is_allowed(handled):
    with handled.hold():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"), handled.allow():
            pytest.fail("the body does not begin")
        assert handled.held


@needs_signals
def test_after_the_first_signal_further_ones_do_not_disturb_what_it_set_off(handled):
    with handled.hold():
        with pytest.raises(Interrupted), handled.allow():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)  # as if somebody were impatient
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Interrupted, match="SIGTERM"):
            handled.check()


@needs_signals
def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_signals
def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


OPTIONS = [
    *("--model.device", "cpu", "--prompts.lines", "a fox", "--reward.weights", "colorfulness", "--lora.rank", "2"),
    *("--rollout.prompts-per-update", "1", "--rollout.group-size", "2", "--rollout.steps", "2"),
    *("--optimizer.minibatches", "1", "--run.updates", "4", "--run.save-every", "100", "--run.preview-every", "0"),
]


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_an_update_and_its_row_loses_neither(tmp_path, capsys, monkeypatch, number):
    """It arrives when update 2 is finished but not recorded, twice more while the checkpoint is written."""
    keep, save = Run.keep, RunFolder.save

    def interrupted_keep(self, update):
        if update.number == 2:
            signal.raise_signal(number)
        keep(self, update)

    def interrupted_save(self, *arguments):
        signal.raise_signal(number)
        signal.raise_signal(number)
        return save(self, *arguments)

    monkeypatch.setattr(Run, "keep", interrupted_keep)
    monkeypatch.setattr(RunFolder, "save", interrupted_save)
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert main(["train", *OPTIONS, "--run.folder", str(tmp_path)]) == 128 + number
    finally:
        signal.signal(number, before)
    folder = RunFolder(tmp_path / "run")
    assert [row["update"] for row in folder.records()] == [1, 2]
    assert folder.checkpoints.numbers() == [2] and folder.intact() == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"stopped by {signal.Signals(number).name}: update 2 and all before it are saved in ")
    assert last.endswith(f"resume {folder.path}")
    assert last in folder.log_file.read_text()


@pytest.mark.slow
def test_a_row_that_could_not_be_written_is_written_before_the_checkpoint(make_config, monkeypatch):
    """The disk is full once, when update 2 is recorded."""
    failed, record = [], RunFolder.record

    def full_once(self, update):
        if update.number == 2 and not failed:
            failed.append(update)
            raise OSError(28, "No space left on device")
        record(self, update)

    monkeypatch.setattr(RunFolder, "record", full_once)
    folder, updates = start_run(make_config(run={"updates": 3, "save_every": 100}))
    with pytest.raises(OSError):
        list(updates)
    assert [row["update"] for row in folder.records()] == [1, 2]
    assert folder.checkpoints.numbers() == [2]


@pytest.mark.slow
def test_a_run_that_ends_before_its_first_update_leaves_nothing(make_config):
    def stop():
        raise KeyboardInterrupt

    config = make_config(guard={"every": 1})
    with pytest.raises(KeyboardInterrupt):
        list(start_run(config, stop)[1])
    assert not (config.run.folder / "run").exists()


def test_the_last_line_survives_a_closed_terminal(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", closed)
    progress.say_last("stopped", RunFolder(tmp_path))


def test_without_a_handler_nothing_is_received():
    interrupts.check()
    with interrupts.hold(), interrupts.allow():
        pass
