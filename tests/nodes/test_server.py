"""Every workflow through the API of a real server, and the server's descriptions of the nodes."""

import json
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import comfy_server  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def info(comfyui):
    return comfyui.get("/object_info")


def own(info):
    return {name: node for name, node in info.items() if name.startswith("PCPO")}


def test_every_node_has_a_help_page_tooltips_and_texts(comfyui, info):
    golden = json.loads((comfy_host.PACK / "tests/golden/nodes.json").read_text())
    texts = json.loads((comfy_host.PACK / "locales/en/nodeDefs.json").read_text())
    assert own(info).keys() == golden.keys() == texts.keys()
    for name, node in own(info).items():
        for key, spec in {**node["input"].get("required", {}), **node["input"].get("optional", {})}.items():
            assert spec[1]["tooltip"], (name, key)
        assert all(node["output_tooltips"]), name
        assert (comfy_host.PACK / "web/docs" / f"{name}.md").read_text().startswith(f"# {node['display_name']}")
        assert node["description"] == texts[name]["description"]


def test_the_page_finds_help_templates_and_texts(comfyui, info):
    for name in own(info):
        with urllib.request.urlopen(f"{comfyui.url}/extensions/comfyui_pcpo/docs/{name}.md") as answer:
            assert answer.read().startswith(b"# ")
    assert set(comfyui.get("/workflow_templates")["comfyui_pcpo"]) == {p.stem for p in comfy_server.WORKFLOWS}
    assert "PCPOTrainLoRA" in comfyui.get("/i18n")["en"]["nodeDefs"]


@pytest.mark.parametrize("path", comfy_server.UNATTENDED, ids=lambda p: p.stem)
def test_workflow_runs(comfyui, info, path):
    workflow = json.loads(path.read_text())
    entry = comfyui.run(comfy_server.api_graph(workflow, info))
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert comfy_server.seconds(entry) < 180
    images = [i for out in entry["outputs"].values() for i in out.get("images", ())]
    assert images
    for image in images:
        assert (comfyui.base / image["type"] / image["subfolder"] / image["filename"]).stat().st_size > 500
    assert path.with_suffix(".jpg").stat().st_size > 5000
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])


def train_graph(**changes):
    given = {
        "model": ["1", 0], "vae": ["1", 2], "prompts": ["2", 0], "reward": ["3", 0], "latent_image": ["4", 0],
        "name": "api", "updates": 1, "prompts_per_update": 1, "group_size": 2, "steps": 3, "learning_rate": 3e-3,
        "rank": 2, "credit": "proportionate", "seed": 0, "resume": False, **changes,
    }  # fmt: skip
    return {
        "1": {"class_type": "PCPOLoadTinyModel", "inputs": {"model": "emoji-flow"}},
        "2": {"class_type": "PCPOPrompts", "inputs": {"clip": ["1", 1], "text": "a fox"}},
        "3": {"class_type": "PCPOLoadReward", "inputs": {"reward": "colorfulness"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "PCPOTrainLoRA", "inputs": {k: v for k, v in given.items() if v is not None}},
    }


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"group_size": 1}, "group_size"),
        ({"name": "../up"}, "run.name"),
        ({"vae": None}, "vae"),
        ({"reward": None}, "reward"),
        ({"model": ["1", 1]}, "received_type(CLIP) mismatch input_type(MODEL)"),
    ],
)
def test_bad_input_is_refused_before_any_work(comfyui, change, word):
    status, answer = comfyui.post("/prompt", {"prompt": train_graph(**change)})
    assert status == 400
    assert word in json.dumps(answer)


def test_interrupt_stops_the_run_and_the_queue_continues(comfyui):
    sent = []

    def interrupt():
        metrics = comfyui.base / "output/pcpo/stopped/metrics.jsonl"
        if not sent and metrics.is_file() and metrics.read_text():
            sent.append(comfyui.post("/interrupt", {}))

    entry = comfyui.run(train_graph(name="stopped", updates=500), while_running=interrupt)
    assert entry["status"]["status_str"] == "error" and sent
    assert any(m[0] == "execution_interrupted" for m in entry["status"]["messages"])
    folder = comfyui.base / "output/pcpo/stopped"
    assert list((folder / "checkpoints").iterdir()) and (folder / "lora.safetensors").is_file()
    assert comfyui.run(train_graph(name="after"))["status"]["status_str"] == "success"


def test_load_run_opens_the_newest(comfyui):
    comfyui.run(train_graph(name="newest", seed=1))
    graph = {
        "1": {"class_type": "PCPOLoadRun", "inputs": {"run": "(newest)", "checkpoint": "best"}},
        "2": {"class_type": "PCPOPlotRun", "inputs": {"run": ["1", 0], "smoothing": 0.5, "panels": "all"}},
        "3": {"class_type": "SaveLoRA", "inputs": {"lora": ["1", 1], "prefix": "loras/found"}},
    }
    assert comfyui.run(graph)["status"]["status_str"] == "success"
    assert list((comfyui.base / "output/loras").glob("found*"))
    status, answer = comfyui.post("/prompt", {"prompt": {**graph, "1": {
        "class_type": "PCPOLoadRun", "inputs": {"run": "nowhere", "checkpoint": "best"},
    }}})  # fmt: skip
    assert status == 400 and "nowhere" in json.dumps(answer)


def test_an_error_reaches_its_node_in_two_sentences(comfyui):
    comfyui.run(train_graph(name="short"))
    entry = comfyui.run({
        "1": {"class_type": "PCPOLoadRun", "inputs": {"run": "short", "checkpoint": "77"}},
        "2": {"class_type": "PCPOPlotRun", "inputs": {"run": ["1", 0], "smoothing": 0.5, "panels": "all"}},
    })  # fmt: skip
    (error,) = [m[1] for m in entry["status"]["messages"] if m[0] == "execution_error"]
    assert error["node_type"] == "PCPOLoadRun"
    assert "checkpoint 77 is not in" in error["exception_message"] and "There are 1." in error["exception_message"]


def test_a_program_votes_over_the_routes_and_the_learned_taste_trains_the_rest(comfyui):
    workflow = next(path for path in comfy_server.WORKFLOWS if path.stem == "7 your taste")
    graph = comfy_server.api_graph(json.loads(workflow.read_text()), comfyui.get("/object_info"))
    nodes = {entry["class_type"]: entry["inputs"] for entry in graph.values()}
    nodes["PCPOHumanVote"] |= {"name": "by-program", "votes": 8}
    nodes["PCPOTrainTaste"] |= {"name": "by-program"}
    nodes["PCPOTrainLoRA"] |= {"updates": 3, "name": "by-program"}
    asked = {}

    def vote():
        question = comfyui.get("/pcpo/vote")
        if question["open"] and question["id"] not in asked:
            asked[question["id"]] = question
            bad, _ = comfyui.post(f"/pcpo/vote/{question['id']}", {"ranks": [0, 1]})
            good, _ = comfyui.post(f"/pcpo/vote/{question['id']}", {"ranks": [0, 1, 1, 1, 1, 2], "seconds": 1})
            late, _ = comfyui.post(f"/pcpo/vote/{question['id']}", {"ranks": [0, 1, 1, 1, 1, 2]})
            assert (bad, good, late) == (400, 200, 409)

    entry = comfyui.run(graph, while_running=vote)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert len(asked) == 8 and {q["total"] for q in asked.values()} == {8}
    assert comfyui.get("/pcpo/vote") == {"open": False}
    report = next(out["text"][0] for out in entry["outputs"].values() if "text" in out)
    assert report.startswith("8 votes: agrees with")


def test_cancel_while_a_question_is_open_ends_the_run_at_once(comfyui):
    workflow = next(path for path in comfy_server.WORKFLOWS if path.stem == "7 your taste")
    graph = comfy_server.api_graph(json.loads(workflow.read_text()), comfyui.get("/object_info"))
    for entry in graph.values():
        if entry["class_type"] in ("PCPOHumanVote", "PCPOTrainTaste"):
            entry["inputs"]["name"] = "cancelled"
    since = []

    def cancel():
        if comfyui.get("/pcpo/vote")["open"] and not since:
            since.append(time.time())
            comfyui.post("/interrupt", {})

    entry = comfyui.run(graph, while_running=cancel)
    assert time.time() - since[0] < 15
    assert any(message[0] == "execution_interrupted" for message in entry["status"]["messages"])
    assert comfyui.get("/pcpo/vote") == {"open": False}


def test_a_cancelled_blind_comparison_goes_on_where_it_stopped(comfyui):
    colors = {"1": 0xFF0000, "2": 0x00FF00, "3": 0x0000FF, "4": 0xFFFFFF}
    graph = {
        **{key: {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": color}}
           for key, color in colors.items()},
        "5": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
        "6": {"class_type": "ImageBatch", "inputs": {"image1": ["3", 0], "image2": ["4", 0]}},
        "7": {"class_type": "PCPOCompareBlind", "inputs": {
            "images_a": ["5", 0], "images_b": ["6", 0], "question": "Which?", "votes": 0, "seed": 5,
        }},
    }  # fmt: skip
    numbers = []

    def vote_once_then(cancel: bool):
        def look():
            question = comfyui.get("/pcpo/vote")
            if question["open"] and cancel and numbers:
                comfyui.post("/interrupt", {})
            elif question["open"]:
                numbers.append(question["number"])
                assert comfyui.post(f"/pcpo/vote/{question['id']}", {"ranks": [0, 1]})[0] == 200

        return look

    assert comfyui.run(graph, while_running=vote_once_then(cancel=True))["status"]["status_str"] == "error"
    assert comfyui.run(graph, while_running=vote_once_then(cancel=False))["status"]["status_str"] == "success"
    assert numbers == [1, 2]
    (kept,) = (comfyui.base / "output/pcpo_votes/compare_blind").glob("*.json")
    assert len(json.loads(kept.read_text())["wins"]) == 2
