"""Rules of the whole project: ASCII sources, imports only downward, light imports, configurations that load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("comfyui_pcpo", "trainer", "nodes", "tests", "benchmarks")
HEAVY = ("diffusers", "transformers", "open_clip", "peft")
LIGHT = (
    "comfyui_pcpo",
    "comfyui_pcpo.method.schedule",
    "comfyui_pcpo.method.transition",
    "comfyui_pcpo.method.credit",
    "comfyui_pcpo.method.surrogate",
    "comfyui_pcpo.method.advantage",
    "comfyui_pcpo.method.rollout",
    "comfyui_pcpo.method.guidance",
    "comfyui_pcpo.lora.formats",
    "comfyui_pcpo.plotting.plot",
    "comfyui_pcpo.reward",
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it; a relative import counts by where it leads."""
    parts, found = path.relative_to(ROOT).with_suffix("").parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else ()
            full = [*base, *(node.module or "").split(".")] if node.module else list(base)
            found |= {full[0]} if full else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", [*sources(*FOLDERS), *sorted(ROOT.glob("*.py"))], ids=named)
def test_source_is_ascii(path: Path):
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("path", sources("comfyui_pcpo"), ids=named)
def test_the_method_imports_neither_trainer_nor_nodes(path: Path):
    assert not imported(path) & {"trainer", "nodes", "comfy", "comfy_api", "folder_paths"}


@pytest.mark.parametrize("path", sources("trainer"), ids=named)
def test_the_trainer_does_not_import_nodes(path: Path):
    assert not imported(path) & {"nodes", "comfy", "comfy_api", "folder_paths"}


def test_relative_imports_are_counted_by_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "trainer" / "loop.py"
    file.parent.mkdir()
    file.write_text("from ..nodes import plan\nfrom .config import load\nfrom .. import other\nimport torch.nn\n")
    assert imported(file) == {"nodes", "trainer", "other", "torch"}


def test_importing_the_method_imports_no_heavy_library():
    lines = [f"import {name}\nfound.append(({name!r}, sorted(heavy & set(sys.modules))))" for name in LIGHT]
    code = "\n".join(["import sys", f"heavy, found = set({HEAVY!r}), []", *lines, "print([f for f in found if f[1]])"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=named)
def test_a_shipped_configuration_loads(path: Path):
    from trainer.config.loading import load

    load(path)
