"""What results record of the code they were made with, their files, and the command line that makes them."""

import inspect
import re
from typing import get_args

import pytest

from benchmarks import __main__ as command_line
from benchmarks.pretend.full_size import CASES
from benchmarks.speed import peer_speed
from benchmarks.speed.full_size import FULL_SIZE
from benchmarks.study import archive
from benchmarks.study.files import commit, source_checksum
from benchmarks.study.studies import STUDIES
from trainer.cli.main import version


def test_the_commit_is_that_of_a_clone_and_of_a_worktree_linked_to_it(tmp_path):
    clone, linked = tmp_path / "clone", tmp_path / "linked"
    (clone / ".git" / "refs" / "heads").mkdir(parents=True)
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (clone / ".git" / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    (clone / ".git" / "packed-refs").write_text("# pack-refs\n" + "b" * 40 + " refs/heads/other\n")
    own = clone / ".git" / "worktrees" / "linked"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/other\n")
    (own / "commondir").write_text("../..\n")
    linked.mkdir()
    (linked / ".git").write_text(f"gitdir: {own}\n")
    assert (commit(clone), commit(linked)) == ("a" * 12, "b" * 12)


def test_a_copy_without_git_has_the_commit_that_its_file_names(tmp_path):
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("c" * 40)
    commit.cache_clear()
    assert commit(tmp_path) == "c" * 12


def test_the_checksum_of_the_sources_changes_with_what_decides_a_run(tmp_path):
    def checksum() -> str:
        source_checksum.cache_clear()
        return source_checksum(tmp_path)

    files = [tmp_path / name for name in ("trainer/loop/align.py", "comfyui_pcpo/a.py", "benchmarks/study/cells.py")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")
    found = [checksum()]
    for file in files:
        file.write_text("x = 2\n")
        found.append(checksum())
    (tmp_path / "trainer" / "loop" / "align.py").rename(tmp_path / "trainer" / "other.py")
    found.append(checksum())
    assert len(set(found)) == len(found)
    (tmp_path / "benchmarks" / "report.py").write_text("x = 1\n")
    files[1].write_bytes(b"x = 2\r\n")
    assert checksum() == found[-1]


def test_peers_are_written_where_no_study_was_run(tmp_path, monkeypatch, capsys):
    rates = ("images_per_second", "evaluations_per_second", "images_per_cpu_second", "evaluations_per_image")
    side = dict.fromkeys(rates, 1.0)
    row = {"peer": "flow_grpo", "ours": side, "theirs": side, "ratio": 1.0}
    monkeypatch.setattr(peer_speed, "compare_with_peers", lambda *_: [row])
    tokens = ["peers", "--flow-grpo", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command_line.run_command(tokens) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "frontier" / "peers.json").is_file()


def test_the_version_is_the_trainers(capsys):
    assert command_line.run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device"), 2, "Free some disk space. Finished cells are intact."),
        (PermissionError(13, "Permission denied"), 2, "Check the path and its permissions. Finished cells are intact."),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_an_error_of_the_system_is_named_with_what_helps(error, status, said, monkeypatch, capfd):
    def fail(*_):
        raise error

    monkeypatch.setattr(archive, "write_archive", fail)
    monkeypatch.setattr(command_line, "discard_output", lambda: 141)  # it would close this process's output
    assert command_line.run_command(["archive", "--study", "quick"]) == status
    printed = capfd.readouterr().err.strip()
    assert printed.endswith(said) and bool(printed) == bool(said)


@pytest.mark.parametrize(
    ("command", "models"), [(command_line.full_size, FULL_SIZE), (command_line.pretend, CASES)], ids=["full", "pretend"]
)
def test_the_help_names_every_model(command, models):
    text = " ".join((inspect.getdoc(command) or "").split())
    listed = re.search(r"One model: ([^.]+)\.", text)
    assert listed is not None and re.split(", | or ", listed[1]) == list(models)


def test_the_command_line_knows_every_study():
    assert get_args(command_line.Studies) == tuple(STUDIES)
