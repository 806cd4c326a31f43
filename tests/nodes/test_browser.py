"""Every workflow in ComfyUI's page: it opens readable, without missing nodes, and runs; and what the page lists.

PCPO_SHOTS=FOLDER keeps the screenshots; PCPO_VIEWPORT=1900x1080 makes the window larger than 1440x900.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import comfy_server  # noqa: E402

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
VOTES = 9
MODULES = os.environ.get("PLAYWRIGHT_MODULES", "")
if not (CHROMIUM and shutil.which("node") and (Path(MODULES) / "node_modules" / "playwright-core").is_dir()):
    pytest.skip(
        "needs node, Chromium (CHROMIUM), and PLAYWRIGHT_MODULES, a folder where `npm i playwright-core` was run",
        allow_module_level=True,
    )


@pytest.mark.parametrize("path", comfy_server.UNATTENDED, ids=lambda p: p.stem)
def test_workflow_opens_and_runs_in_the_page(comfyui, path, tmp_path):
    shots = Path(os.environ.get("PCPO_SHOTS", tmp_path)) / path.stem.split()[0]
    shots.mkdir(parents=True, exist_ok=True)
    comfyui.post("/free", {"unload_models": True, "free_memory": True})  # nothing from the cache
    done = subprocess.run(
        ["node", str(Path(__file__).parents[1] / "support" / "browser.mjs"), comfyui.url, str(path), str(shots), "600",
         str(shots / "saved.json")],
        env={**os.environ, "CHROMIUM": str(CHROMIUM), "PLAYWRIGHT_MODULES": MODULES},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["missing"] == [] and report["dialogs"] == []
    assert report["zoom"] >= 0.6 and not report["textless"]
    assert all(count <= 9 for count in report["widgets"])
    assert report["status"] == "success", report
    assert report["grown"] == []  # every node has room for its images
    assert (shots / "done.png").stat().st_size > 50_000
    queued = json.loads((shots / "saved.json").read_text())["api"]
    ours = comfy_server.api_graph(json.loads(path.read_text()), comfyui.get("/object_info"))
    for node, entry in ours.items():
        assert queued[node]["class_type"] == entry["class_type"]
        for name, value in entry["inputs"].items():
            assert queued[node]["inputs"][name] == value, (path.name, entry["class_type"], name)


def test_templates_are_listed_in_order_and_grpo_finds_train_lora(comfyui, tmp_path):
    shots = Path(os.environ.get("PCPO_SHOTS", tmp_path)) / "library"
    shots.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["node", str(Path(__file__).parents[1] / "support" / "library.mjs"), comfyui.url, str(shots), "comfyui_pcpo",
         "grpo"],
        env={**os.environ, "CHROMIUM": str(CHROMIUM), "PLAYWRIGHT_MODULES": MODULES},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["templates"] == [path.stem for path in comfy_server.WORKFLOWS]
    assert report["found"][0].startswith("Train LoRA")


def test_a_person_votes_in_the_page_closes_it_comes_back_and_the_run_finishes(comfyui, tmp_path):
    workflow = next(path for path in comfy_server.WORKFLOWS if path.stem.startswith("7"))
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    nodes["PCPOHumanVote"]["widgets_values"][3] = VOTES
    nodes["PCPOTrainLoRA"]["widgets_values"][1] = 4  # updates
    short, shots = tmp_path / "7.json", Path(os.environ.get("PCPO_SHOTS", tmp_path)) / "vote"
    short.write_text(json.dumps(graph), encoding="utf-8")
    shots.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["node", str(Path(__file__).parents[1] / "support" / "vote.mjs"), comfyui.url, str(short), str(shots),
         str(VOTES), "500"],
        env={**os.environ, "CHROMIUM": str(CHROMIUM), "PLAYWRIGHT_MODULES": MODULES},
        capture_output=True, text=True, timeout=700,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == "success" and report["errors"] == [], report
    assert report["undone"] == 1 and report["reopened"] and report["enlarged"] == 6 and report["panel"] == 0, report
    assert report["elsewhere"] == [6, 0], report  # over another workflow, and on the node again
    rows = (comfyui.base / "output" / "pcpo_votes" / "my-taste" / "votes.jsonl").read_text().splitlines()
    votes = {row["group"]: row for row in map(json.loads, rows)}
    assert sum(not vote["undone"] for vote in votes.values()) == VOTES
    assert all(vote["seconds"] > 0 for vote in votes.values())
