"""Requirements of the Comfy Registry and of a user's ComfyUI: metadata, dependencies, shipped code."""

import ast
import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

from trainer.config.loading import tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]
REFUSED = {"subprocess", "pip", "ensurepip", "pty", "ctypes", "marshal", "dill"}


def shipped() -> list[Path]:
    """Tracked files that .comfyignore does not exclude from the archive."""
    rules = (ROOT / ".comfyignore").read_text().split()
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")

    def is_ignored(name: str) -> bool:
        return any(
            ("/" + name).startswith(r) if r.endswith("/") else fnmatch.fnmatch(name, r.lstrip("/")) for r in rules
        )

    return [ROOT / name for name in names if name and not is_ignored(name) and (ROOT / name).is_file()]


def test_metadata_names_publisher_and_required_comfyui_version():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["project"]["version"])
    assert "publish-node-action" in (ROOT / ".github/workflows/publish.yml").read_text()


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_a_requirement_is_a_lower_bound_shared_with_the_package(line):
    """Nothing is pinned or capped, so installing the pack never downgrades a package that ComfyUI needs."""
    assert re.fullmatch(r"[\w.-]+>=[\d.]+(; python_version < \"3\.\d+\")?", line)
    assert line.replace('"', "'") in [r.replace('"', "'") for r in PROJECT["project"]["dependencies"]]


def test_torch_is_left_to_the_host():
    assert not [line for line in REQUIREMENTS if re.match(r"(torch|torchvision|torchaudio|numpy)\b", line)]


def test_the_archive_contains_what_the_nodes_need_and_no_tests():
    names = {path.relative_to(ROOT).as_posix() for path in shipped()}
    folders = {name.split("/")[0] for name in names}
    assert {"__init__.py", "nodes", "trainer", "comfyui_pcpo", "workflows", "web", "locales", "LICENSE"} <= folders
    assert not folders & {"tests", "benchmarks", "docs", ".ci", ".github", "Makefile"}
    assert sum(path.stat().st_size for path in shipped()) < 40_000_000


def test_the_embedded_models_together_are_at_most_36_mb():
    files = (ROOT / "comfyui_pcpo" / "tiny" / "models").rglob("*")
    assert 15_000_000 < sum(path.stat().st_size for path in files if path.is_file()) <= 36_000_000


@pytest.mark.parametrize(
    "path", [p for p in shipped() if p.suffix == ".py"], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_shipped_code_contains_nothing_that_the_registry_refuses(path):
    """No subprocesses, evaluated strings, installations, unpickling or changes to the environment."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & REFUSED
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in REFUSED
        elif isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            assert text not in (
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "os.putenv",
                "__import__",
                "pickle.load",
                "pickle.loads",
            )
            if text == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            assert ast.unparse(node.value) != "os.environ"
