"""The documents name files, functions and tests that exist, and the README stays short."""

import re
import subprocess
from pathlib import Path

import pytest

from comfyui_pcpo.tiny.captions import parse
from comfyui_pcpo.tiny.tinyeval import TASKS, suite
from trainer.config.loading import tomllib

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
PAGES = [name for name in TRACKED if name.endswith(".md") and (ROOT / name).is_file()]
PATH = re.compile(r"`((?:comfyui_pcpo|trainer|nodes|benchmarks|tests|tools|configs|docs|web|workflows)/[\w./-]*)`")
EXAMPLE = re.compile(r"```.*?```|\*\*New file\*\* `[^`]+`|`docs/rewards/darkness.md`", re.DOTALL)  # need not exist
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_exist(page: str):
    text = EXAMPLE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    links = [(ROOT / page).parent / link for link in LINK.findall(text) if not re.match(r"\w+:", link)]
    paths = [ROOT / path for path in PATH.findall(text)]
    assert [str(path) for path in (*links, *paths) if not path.exists()] == []


def test_every_example_of_tinyeval_is_in_the_suite():
    rows = re.findall(r"^\| ([a-z ]+) \| `([^`]+)` \|$", (ROOT / "docs/evaluation.md").read_text("utf-8"), re.MULTILINE)
    assert [task for task, _ in rows] == list(TASKS)
    assert [prompt for task, prompt in rows if prompt not in suite()[task]] == []


def test_the_node_pages_prompts_are_in_the_embedded_models_domain():
    text = (ROOT / "web/docs/PCPOLoadTinyModel.md").read_text(encoding="utf-8")
    prompts = re.findall(r"`(an? [^`]+|two [^`]+)`", text)
    assert len(prompts) == 3 and all(parse(prompt) for prompt in prompts)


def test_the_paper_page_names_existing_tests_and_functions():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"\btest_\w+", text) if f"def {name}(" not in tests]
    for module, name in re.findall(r"`([a-z_]+)\.([a-z_0-9]+)\b(?!\.)", text):
        sources = (ROOT / "comfyui_pcpo").rglob(f"{module}.py")
        if not any(re.search(rf"^(def|class) {name}\b", file.read_text(), re.MULTILINE) for file in sources):
            missing.append(f"{module}.{name}")
    assert missing == []


def test_the_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_constraints_name_a_version_of_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [re.split(r"[>=;]", line)[0] for line in (*project["dependencies"], *extras["dev"])]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert [name for name in needed if name not in pinned and name != "tomli"] == []  # tomli: Python 3.10 only
