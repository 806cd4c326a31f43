"""Rules for the whole project: ASCII sources, light imports, example configurations that load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("comfyui_pcpo", "trainer", "nodes", "tests", "benchmarks", "tools")
HEAVY = ("diffusers", "transformers", "open_clip", "peft", "matplotlib")
LIGHT = (
    "comfyui_pcpo",
    "comfyui_pcpo.method.schedule",
    "comfyui_pcpo.method.transition",
    "comfyui_pcpo.method.ddim_variance",
    "comfyui_pcpo.method.samplers",
    "comfyui_pcpo.method.credit",
    "comfyui_pcpo.method.surrogate",
    "comfyui_pcpo.method.advantage",
    "comfyui_pcpo.method.rollout",
    "comfyui_pcpo.method.guidance",
    "comfyui_pcpo.lora.formats",
    "comfyui_pcpo.plotting.credit",
    "comfyui_pcpo.plotting.evaluation",
    "comfyui_pcpo.plotting.grids",
    "comfyui_pcpo.plotting.run_curves",
    "comfyui_pcpo.reward",
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*sources(*FOLDERS), *sorted(ROOT.glob("*.py"))], ids=name_of)
def test_source_is_ascii(path: Path):
    assert path.read_bytes().isascii()


def test_importing_the_library_imports_no_heavy_package():
    lines = [f"import {name}\nloaded.append(({name!r}, sorted(heavy & set(sys.modules))))" for name in LIGHT]
    code = "\n".join(
        ["import sys", f"heavy, loaded = set({HEAVY!r}), []", *lines, "print([f for f in loaded if f[1]])"]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_configuration_reads_the_names_of_the_method_without_torch():
    code = "import sys, trainer.config.schema; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=name_of)
def test_an_example_configuration_loads(path: Path):
    from trainer.config.loading import load

    load(path)
