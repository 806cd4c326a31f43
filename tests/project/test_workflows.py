"""The workflow files as ComfyUI's page draws them: readable when opened, no wire behind a node, known nodes only."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
from workflow_geometry import SLOT, WIDGET, Drawing, read

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = json.loads((ROOT / "tests/golden/nodes.json").read_text(encoding="utf-8"))
STOCK = {  # least height of ComfyUI's nodes, as its page computes it
    "CLIPTextEncode": 88, "CheckpointLoaderSimple": 98, "EmptyLatentImage": 106, "ImageScaleBy": 82, "KSampler": 262,
    "LoraModelLoader": 102, "MarkdownNote": 88, "SaveImage": 58, "SaveLoRA": 82, "VAEDecode": 46,
}  # fmt: skip
PREVIEW = 220  # least height that the page gives to the images below a node's widgets
SHOWS_IMAGES = {
    "KSampler", "SaveImage", "PCPOCompare", "PCPOIRGKSampler", "PCPOKSampler", "PCPOPlotCredit", "PCPOPlotRun",
    "PCPOScoreImages", "PCPOTrainLoRA",
}  # fmt: skip
WIDEST, HIGHEST = 1500, 1050  # at 1440 x 900 the page opens a template at 1080 / width or 675 / height, text needs 57 %


def drawings(path):
    """A workflow, and each of its subgraphs with its nodes only."""
    workflow = read(path)
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    return Drawing(workflow), [Drawing({"nodes": subgraph["nodes"], "links": []}) for subgraph in subgraphs]


def least_height(kind):
    """What slots, basic widgets and images need: a node that has less grows over those below it."""
    if kind in STOCK:
        height = STOCK[kind]
    else:
        slots = [i for i in NODES[kind]["inputs"] if not is_widget(i[1])]
        widgets = [i for i in NODES[kind]["inputs"] if is_widget(i[1]) and not is_advanced(i)]
        rows = max(len(slots), len(NODES[kind]["outputs"]), 1)
        height = SLOT * rows + WIDGET * len(widgets)
    return height + PREVIEW * (kind in SHOWS_IMAGES)


def is_widget(kind):
    return kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def is_advanced(entry):
    return entry[3:] == ["advanced"]


def test_seven_templates_begin_with_their_number():
    assert [path.stem.split()[0] for path in WORKFLOWS] == list("1234567")
    assert all(path.with_suffix(".jpg").is_file() for path in WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_it_opens_with_readable_text(path):
    left, top, right, bottom = drawings(path)[0].bounds()
    assert right - left <= WIDEST and bottom - top <= HIGHEST


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_its_nodes_are_apart_and_have_room(path):
    outer, inner = drawings(path)
    kinds = {subgraph["id"] for subgraph in read(path).get("definitions", {}).get("subgraphs", [])}
    for drawing in (outer, *inner):
        assert drawing.overlaps(gap=18) == []
        for node in drawing.nodes.values():
            if node["type"] not in kinds and not node["flags"].get("collapsed"):
                assert node["size"][1] >= least_height(node["type"]), node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_no_wire_runs_behind_a_node(path):
    drawing = drawings(path)[0]
    assert {link: hidden for link in drawing.links if (hidden := drawing.hidden(link))} == {}


def test_a_wire_behind_a_node_is_found():
    drawing = drawings(WORKFLOWS[0])[0]
    link = next(link for link, stations in drawing.last_reroute.items() if stations)
    drawing.last_reroute.clear()
    assert drawing.hidden(link)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_it_has_known_nodes_one_note_and_no_unused_one(path):
    outer, inner = drawings(path)
    kinds = {subgraph["id"] for subgraph in read(path).get("definitions", {}).get("subgraphs", [])}
    for drawing in (outer, *inner):
        assert {node["type"] for node in drawing.nodes.values()} <= NODES.keys() | STOCK.keys() | kinds
    (note,) = [node for node in outer.nodes.values() if node["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith(f"# {path.stem.split()[0]} ") and len(note["widgets_values"][0]) < 600


def test_train_lora_shows_at_most_nine_widgets():
    inputs = NODES["PCPOTrainLoRA"]["inputs"]
    assert len([i for i in inputs if is_widget(i[1]) and not is_advanced(i)]) <= 9


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_note_beside_numbers_of_the_tiny_model_sends_real_models_to_workflow_6(path):
    """A number that a widget gives wins over the recipe of the connected model."""
    workflow = read(path)
    nodes = [*workflow["nodes"], *(n for s in workflow.get("definitions", {}).get("subgraphs", ()) for n in s["nodes"])]
    names = [i[0] for i in NODES["PCPOTrainLoRA"]["inputs"] if is_widget(i[1])]
    trains = [node["widgets_values"] for node in nodes if node["type"] == "PCPOTrainLoRA"]
    fixed = any(dict(zip(names, values, strict=True))["learning_rate"] for values in trains)
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert ("workflow 6" in note) == fixed
    assert not (fixed and "by its loader" in note)


def test_workflow_6_leaves_everything_to_the_recipe():
    workflow = read(WORKFLOWS[5])
    (train,) = [node for node in workflow["nodes"] if node["type"] == "PCPOTrainLoRA"]
    names = [i[0] for i in NODES["PCPOTrainLoRA"]["inputs"] if is_widget(i[1])]
    values = dict(zip(names, train["widgets_values"], strict=True))
    automatic = ("steps", "learning_rate", "rank", "cfg", "clip_range", "images_at_once")
    assert {name: values[name] for name in automatic} == dict.fromkeys(automatic, 0)
    assert values["noise_level"] == -1 and values["method"] == "auto" and not values["gradient_checkpointing"]
    (compare,) = [node for node in workflow["nodes"] if node["type"] == "PCPOCompare"]
    assert compare["widgets_values"][2:4] == [0, 0]
