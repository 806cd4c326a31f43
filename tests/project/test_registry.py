"""What the Comfy Registry and a user's ComfyUI ask of this pack: metadata, requirements, shipped code."""

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
    """Tracked files that .comfyignore leaves in the archive."""
    rules = (ROOT / ".comfyignore").read_text().split()
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")

    def left_out(name: str) -> bool:
        return any(
            ("/" + name).startswith(r) if r.endswith("/") else fnmatch.fnmatch(name, r.lstrip("/")) for r in rules
        )

    return [ROOT / name for name in names if name and not left_out(name) and (ROOT / name).is_file()]


def test_the_registry_knows_publisher_name_and_the_hosts_version():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["project"]["version"])
    assert "publish-node-action" in (ROOT / ".github/workflows/publish.yml").read_text()


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_a_requirement_is_a_lower_bound_that_the_package_has_too(line):
    """Nothing is pinned or capped, so nothing that a user's ComfyUI needs is taken back."""
    assert re.fullmatch(r"[\w.-]+>=[\d.]+(; python_version < \"3\.\d+\")?", line)
    assert line.replace('"', "'") in [r.replace('"', "'") for r in PROJECT["project"]["dependencies"]]


def test_torch_is_the_hosts_own():
    assert not [line for line in REQUIREMENTS if re.match(r"(torch|torchvision|torchaudio|numpy)\b", line)]


def test_the_archive_has_what_the_nodes_need_and_no_tests():
    names = {path.relative_to(ROOT).as_posix() for path in shipped()}
    folders = {name.split("/")[0] for name in names}
    assert {"__init__.py", "nodes", "trainer", "comfyui_pcpo", "workflows", "web", "locales", "LICENSE"} <= folders
    assert not folders & {"tests", "benchmarks", "docs", ".ci", ".github", "Makefile"}
    assert sum(path.stat().st_size for path in shipped()) < 40_000_000


def test_the_embedded_models_together_are_at_most_20_mb():
    files = (ROOT / "comfyui_pcpo" / "tiny" / "models").rglob("*")
    assert 15_000_000 < sum(path.stat().st_size for path in files if path.is_file()) <= 20_000_000


@pytest.mark.parametrize(
    "path", [p for p in shipped() if p.suffix == ".py"], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_shipped_code_has_nothing_that_the_registry_refuses(path):
    """No processes, no evaluation of text, no installation, no unpickling, no change of the environment."""
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
