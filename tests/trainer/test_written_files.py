"""What runs and exports write: whole or not at all, equal bytes for equal content, no paths and prompts, the umask."""

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from running import start_run
from safetensors import safe_open

from comfyui_pcpo.durable import safetensors_parts, write_durably
from trainer.cli.main import main
from trainer.config.loading import build, dump_shareable, tomllib, without_folder
from trainer.config.schema import ConfigError
from trainer.evaluation.source import open_source
from trainer.files import advice, digest, digest_of, require_writable
from trainer.fingerprints import sampled_digest
from trainer.runs.folder import RunFolder

METADATA = {f"key {n}": "value" for n in range(8)}
SECRET = "a fox that nobody may know of"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs")
    tree = {
        "model": {"device": "cpu"},
        "prompts": {"lines": [SECRET], "negative": "a secret frog"},
        "rollout": {"prompts_per_update": 1, "group_size": 2, "steps": 2},
        "reward": {"weights": {"colorfulness": 1.0}, "folder": str(folder / "rewards")},
        "lora": {"rank": 2},
        "optimizer": {"minibatches": 1},
        "run": {"folder": str(folder), "updates": 1, "preview_every": 0},
    }
    run, updates = start_run(build(tree, "test"))
    list(updates)
    return run


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    write_durably(file, b"old")

    with pytest.raises(TypeError):
        write_durably(file, b"new", None)  # type: ignore[arg-type]
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert digest([b"ol", b"d"]) == digest_of(file)


def test_equal_tensors_and_metadata_give_equal_bytes_that_the_library_reads(tmp_path):
    tensors = {"b": torch.randn(3, 2).T, "a": torch.arange(5, dtype=torch.float16), "\u00e9": torch.zeros(0)}
    parts = [
        b"".join(bytes(p) for p in safetensors_parts(tensors, m)) for m in (METADATA, dict(reversed(METADATA.items())))
    ]
    assert parts[0] == parts[1]
    (tmp_path / "a.safetensors").write_bytes(parts[0])
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == METADATA
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_durably(tmp_path / "a.safetensors", *safetensors_parts({"a": torch.zeros(1)}, METADATA))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.slow
def test_every_file_of_a_run_has_the_permissions_of_the_umask(finished):
    expected = 0o666 & ~os.umask(os.umask(0o022))
    files = [p for p in finished.path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {p.name: oct(expected) for p in files}


def metadata(file: Path) -> str:
    with safe_open(file, "pt") as opened:
        return str(opened.metadata())


@pytest.mark.slow
def test_a_lora_file_has_no_prompt_and_no_path_unless_it_is_asked_for(finished, tmp_path):
    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "copy")))
    assert main(["export", str(copy.path)]) == 0
    for file in (copy.lora_file, copy.path / "lora-comfyui.safetensors"):
        found = metadata(file)
        assert "group_size = 2" in found
        for private in (SECRET, "secret frog", str(finished.path.parent), "rewards"):
            assert private not in found
    assert main(["export", str(copy.path), "--metadata", "full", "--out", str(tmp_path / "full.safetensors")]) == 0
    full = metadata(tmp_path / "full.safetensors")
    assert SECRET in full and str(finished.path.parent) in full


@pytest.mark.slow
def test_equal_runs_under_other_names_write_equal_files(finished, tmp_path):
    config = finished.config()
    again = config.model_copy(update={"run": config.run.model_copy(update={"folder": tmp_path, "name": "again"})})
    other, updates = start_run(again)
    list(updates)
    files = ["lora.safetensors", *(f"checkpoints/000001/{p.name}" for p in finished.checkpoint().iterdir())]
    assert len(files) == 5
    for file in files:
        assert (finished.path / file).read_bytes() == (other.path / file).read_bytes(), file


@pytest.mark.slow
def test_a_lora_in_its_runs_folder_has_the_runs_settings_and_a_copy_elsewhere_the_shared_ones(finished, tmp_path):
    assert open_source(str(finished.lora_file)).config == finished.config()
    moved = open_source(str(shutil.copy(finished.lora_file, tmp_path / "lora.safetensors"))).config
    assert moved.prompts.lines == () and moved.rollout == finished.config().rollout


@pytest.mark.parametrize(
    ("name", "shown"),
    [("/home/me/sd15.safetensors", "sd15.safetensors"), (r"C:\models\sd15.safetensors", "sd15.safetensors"),
     ("stabilityai/sdxl", "stabilityai/sdxl"), ("emoji-flow", "emoji-flow")],
)  # fmt: skip
def test_a_shared_configuration_names_files_without_their_folder(name, shown):
    assert without_folder(name) == shown
    tree = tomllib.loads(dump_shareable(build({"model": {"name": name}, "prompts": {"lines": ["x"]}}, "test")))
    assert tree["model"]["name"] == shown and "prompts" not in tree
    assert not {"name", "folder"} & tree["run"].keys()


def test_a_path_is_tried_and_nothing_is_left_of_the_trial(tmp_path):
    assert require_writable(tmp_path / "a" / "b" / "c.png", "--out") == tmp_path / "a" / "b" / "c.png"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "file" / "c.png", r"file is a file, not a folder"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
        (tmp_path / "folder", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_writable(path, "--out")
    with pytest.raises(ConfigError, match=r"--out .*file exists and is not overwritten.*--overwrite"):
        require_writable(tmp_path / "file", "--out", replace=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_no_command_overwrites_a_file_that_is_not_its_own(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.png", "mine.safetensors", "compare.png", "samples.png", "evaluation.json"):
        Path(name).write_text("mine")
    sampling = ["sample", "emoji-flow", "--prompt", "a fox", "--steps", "1", "--images", "1"]
    for arguments in (
        [*sampling, "--out", "mine.png"],
        ["plot", str(finished.path), "--out", "mine.png"],
        ["export", str(finished.path), "--out", "mine.safetensors"],
        ["evaluate", str(finished.path), "--out", "."],
    ):
        assert main(arguments) == 2
        assert "exists and is not overwritten" in capsys.readouterr().err
    assert main(["plot", str(finished.path), str(finished.path)]) == 0
    assert Path("compare-2.png").stat().st_size > 1000
    assert {p.read_text() for p in tmp_path.iterdir() if p.name != "compare-2.png"} == {"mine"}
    assert main(["export", str(finished.path), "--out", "mine.safetensors", "--overwrite"]) == 0
    assert Path("mine.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_run_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, command):
    from trainer.runs import launch

    monkeypatch.setattr(launch, "make_policy", lambda config: pytest.fail("the model is loaded"))
    (tmp_path / "file").write_text("mine")
    where = {"train": ["--prompts.lines", "a fox", "--run.folder"], "demo": ["--folder"]}[command]
    assert main([command, *where, str(tmp_path / "file")]) == 2
    assert "file is a file, not a folder" in capsys.readouterr().err


def test_a_sampled_digest_needs_no_large_file(tmp_path):
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "empty").write_bytes(b"")
    assert sampled_digest(tmp_path / "small") != sampled_digest(tmp_path / "empty")


def test_what_to_do_about_a_failed_write_depends_on_why_it_failed():
    assert advice(OSError(errno.ENOSPC, "No space left on device")) == "Free some disk space."
    assert advice(PermissionError(errno.EACCES, "Permission denied")) == "Check the path and its permissions."


def test_a_drive_that_does_not_exist_is_named(tmp_path, monkeypatch):
    """As on Windows, where not even the root of a path needs to exist."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(ConfigError, match=r"--out .*x.png cannot be written: / does not exist"):
        require_writable(tmp_path / "x.png", "--out")
