"""The command line as a process: what it imports, how it is called, broken pipes, and output without a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.cli import progress
from trainer.cli.main import main
from trainer.cli.progress import Bar
from trainer.config.loading import tomllib
from trainer.policy.encoded import encode_prompts
from trainer.program import program_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "peft", "matplotlib", "PIL", "numpy")
TINY_RUN = [
    *("--model.device", "cpu", "--prompts.lines", "fox", "--reward.weights", "colorfulness", "--lora.rank", "2"),
    *("--rollout.prompts-per-update", "1", "--rollout.group-size", "2", "--rollout.steps", "2", "--run.updates", "1"),
]

IMPORTED = """
import sys
from trainer.cli.main import main
status = main(sys.argv[2:])
print(status, sorted(set(sys.argv[1].split(",")) & set(sys.modules)), file=sys.stderr)
"""

TWICE = """
import os, sys
from importlib.metadata import EntryPoint
main = EntryPoint("pcpo", {entry!r}, "console_scripts").load()
print(main(sys.argv[1:]), main(sys.argv[1:]))
ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("trainer", "comfyui_pcpo")]
files = [os.path.realpath(m.__file__) for m in ours]
print(sorted(file for file in files if files.count(file) > 1))
"""

IN_A_CLONE = """
import os, runpy, sys
sys.argv = ["-m", *sys.argv[1:]]
try:
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)
except SystemExit as error:
    print(error.code)
ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("trainer", "comfyui_pcpo")]
files = [os.path.realpath(m.__file__) for m in ours]
print(sorted(file for file in files if files.count(file) > 1))
"""


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def installed(tmp_path) -> Path:
    """The folder of an installed package, as pyproject.toml maps it."""
    site = tmp_path / "site-packages"
    package = site / "comfyui_pcpo"
    package.mkdir(parents=True)
    for entry in (ROOT / "comfyui_pcpo").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "trainer").symlink_to(ROOT / PROJECT["tool"]["setuptools"]["package-dir"]["comfyui_pcpo.trainer"])
    return site


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["--version"], 0),
        (["options"], 0),
        (["check", "gone.toml"], 2),
        (["check", "--rollout.group-sise", "4"], 2),
        (["check", "--rollout.group-size", "many"], 2),
        (["sample", "emoji-flow", "--promt", "a fox"], 2),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(arguments, status):
    done = python("-c", IMPORTED, ",".join(HEAVY), *arguments, PYTHONPATH=str(ROOT))
    assert done.stderr.splitlines()[-1] == f"{status} []", done.stderr


def test_the_installed_command_loads_every_module_once_and_names_itself(installed, tmp_path):
    """In a clone's folder too; the second run of one name is refused with the command that continues it."""
    script = tmp_path / "pcpo"
    script.write_text(TWICE.format(entry=PROJECT["project"]["scripts"]["pcpo"]))
    done = python(script, "train", *TINY_RUN, "--run.folder", tmp_path, PYTHONPATH=str(installed))
    status, duplicates = done.stdout.splitlines()[-2:]
    assert (status, duplicates) == ("0 2", "[]"), done.stdout + done.stderr
    assert f"`pcpo resume {tmp_path / 'run'}`" in done.stderr


def test_in_a_clone_the_clones_modules_are_loaded_once_beside_an_installed_package(installed, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(installed)])
    arguments = ["train", *TINY_RUN, "--run.folder", tmp_path]
    assert python("-m", "trainer", *arguments).returncode == 0
    done = python("-c", IN_A_CLONE, *arguments, PYTHONPATH=paths)
    assert done.stdout.splitlines()[-2:] == ["2", "[]"], done.stdout + done.stderr
    assert f"`python -m trainer resume {tmp_path / 'run'}`" in done.stderr


def test_the_wheel_has_every_package():
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    for folder in ("comfyui_pcpo", "trainer"):
        for init in (ROOT / folder).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            assert name.replace("trainer", "comfyui_pcpo.trainer", 1) in packages or name in packages


@pytest.mark.parametrize(
    ("called", "name"),
    [("/usr/bin/pcpo", "pcpo"), (r"C:\env\Scripts\pcpo.exe", "pcpo"), ("/opt/ComfyUI/main.py", "python -m trainer")],
)
def test_messages_name_the_program_as_it_was_called(called, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    assert program_name() == name


def test_a_closed_pipe_ends_the_command_without_a_message():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "options"],
            cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_text_that_the_outputs_encoding_lacks_is_escaped():
    call = [sys.executable, "-m", "trainer", "options", "\u72d0"]
    done = subprocess.run(call, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 2 and b"\\u72d0" in done.stderr and b"Traceback" not in done.stderr


def test_without_a_terminal_stderr_has_the_phase_and_no_librarys_messages(tmp_path):
    done = python("-m", "trainer", "train", *TINY_RUN, "--run.folder", tmp_path)
    assert done.returncode == 0
    assert done.stderr == "loading the model and the rewards ...\n"


def test_without_a_terminal_thousands_of_prompts_report_their_progress(monkeypatch, capsys):
    """R3: they are encoded some at a time, before the first model call, and end where the first update begins."""
    monkeypatch.setattr(progress, "FIRST_REPORT", 0.0)
    sizes = []

    def embed(some):
        sizes.append(len(some))
        return {"text": torch.zeros(len(some), 1, 1)}

    with Bar() as bar:
        bar.begin(0, 3)
        found = encode_prompts(embed, ["a fox"] * 2000, bar.encoding)
        bar.tick()
    assert sizes == [8] * 250 and len(found["text"]) == 2000
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "update 1/3: 8 of 2000 prompts encoded in 0 s" and len(lines) < 20
    assert lines[-1] == "update 1/3: 1 model calls in 0 s"


def test_a_run_shows_the_prompts_that_it_encodes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Bar, "encoding", lambda bar, done, total: seen.append((done, total)))
    lines = json.dumps([f"a fox {n}" for n in range(20)])
    assert main(["train", *TINY_RUN, "--prompts.lines", lines, "--run.folder", str(tmp_path)]) == 0
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_without_a_terminal_an_unfinished_update_reports_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_REPORT", 0.0)
    with Bar() as bar:
        bar.begin(0, 3)
        bar.tick()
        bar.tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["loading the model and the rewards ...", "update 1/3: 1 model calls in 0 s"]


def test_the_trainers_folder_runs_from_anywhere_even_where_python_ignores_the_current_folder(tmp_path):
    """-I stands for the embeddable Python of ComfyUI for Windows, whose ._pth file isolates it."""
    command = [sys.executable, "-I", str(ROOT / "trainer"), "download", "no-such-reward"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'no-such-reward' is not a known reward" in done.stderr
