"""TinyEval: a GenEval (arXiv 2310.11513) for the embedded models. Six tasks on held-out prompts."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from comfyui_pcpo.tiny.align import AlignImageEncoder, Reading, read_images
from comfyui_pcpo.tiny.captions import (
    COLORS,
    COUNTS,
    OBJECTS,
    PATTERNS,
    RELATIONS,
    SHAPE_NAMES,
    Scene,
    Thing,
    caption,
    is_held_out,
    is_valid,
    parse,
)
from comfyui_pcpo.tiny.judge import asked, judge
from comfyui_pcpo.tiny.pipelines import MODELS

HARD = ("two objects", "counting", "position", "attribute binding")
TASKS = ("one object", "colors", *HARD)
PROMPTS_PER_TASK = 20
REFERENCE_DRAWINGS = 4  # of each prompt, the reference of distances
READ_AT_ONCE = 64


def known_scene(prompt: str) -> Scene:
    """The scene of a prompt. Raises ValueError for a prompt from outside the embedded models' domain."""
    scene = parse(prompt)
    if scene is None:
        raise ValueError(
            f"{prompt!r} is not a prompt of the embedded models' domain, which TinyEval needs. Use one such as 'two "
            "foxes on a striped blue background' or 'a red circle left of a star'. At most four things of at most two "
            "kinds; colours belong to shapes and backgrounds and differ between the two. Objects: "
            f"{', '.join(OBJECTS)}; shapes: {', '.join(SHAPE_NAMES)}; colours: {', '.join(COLORS)}."
        )
    return scene


def task_of(scene: Scene) -> str:
    """The task that a scene belongs to, the hardest thing it asks for."""
    first, *others = scene.things
    if scene.relation is not None:
        return "position"
    if others:
        return "two objects" if {first.color, others[0].color} == {None} else "attribute binding"
    if first.count > 1:
        return "counting"
    return "one object" if first.color is None else "colors"


@cache
def suite() -> dict[str, tuple[str, ...]]:
    """Task -> PROMPTS_PER_TASK prompts with combinations that training never shows."""
    objects = [Thing(name) for name in OBJECTS]
    shapes = [Thing(name, color=color) for name in SHAPE_NAMES for color in COLORS]
    counted = [Thing(name, count) for count in COUNTS if count > 1 for name in OBJECTS]
    pairs = list(itertools.permutations(objects, 2))
    bound = [(a, b) for a, b in itertools.permutations(shapes, 2) if a.name != b.name and a.color != b.color]
    grounds = list(itertools.product(COLORS, (None, *PATTERNS)))
    scenes: dict[str, list[Scene]] = {
        "one object": [Scene((thing,), None, *ground) for thing in objects for ground in grounds],
        "colors": [Scene((thing,), color=color) for thing in shapes for color in COLORS],
        "two objects": [Scene(pair) for pair in pairs],
        "counting": [Scene((thing,), color=color) for thing in counted for color in COLORS],
        "position": [Scene(pair, relation) for pair in pairs for relation in RELATIONS],
        "attribute binding": [Scene(pair, color=color) for pair in bound for color in COLORS],
    }
    return {task: evenly(filter(is_new, scenes[task])) for task in TASKS}


def is_new(scene: Scene) -> bool:
    """Whether a scene can be drawn and no embedded model was trained on it."""
    return is_valid(scene) and is_held_out(scene)


def evenly(scenes: Iterable[Scene]) -> tuple[str, ...]:
    """PROMPTS_PER_TASK captions, evenly spaced over all of them."""
    captions = [caption(scene) for scene in scenes]
    return tuple(captions[k * len(captions) // PROMPTS_PER_TASK] for k in range(PROMPTS_PER_TASK))


def suite_prompts(tasks: Sequence[str] = TASKS) -> tuple[str, ...]:
    """The prompts of the tasks, one task after the other."""
    return tuple(itertools.chain.from_iterable(suite()[task] for task in tasks))


def drawing_features(tasks: Sequence[str] = TASKS, root: Path = MODELS) -> Tensor:
    """emoji-align's features of REFERENCE_DRAWINGS drawings of each prompt of the tasks, (D, 128)."""
    known = load_file(root / "emoji-align" / "drawings.safetensors")["features"].float()
    by_task = dict[str, Tensor](zip(TASKS, known.split(PROMPTS_PER_TASK * REFERENCE_DRAWINGS), strict=True))
    return torch.cat([by_task[task] for task in tasks])


def read_and_parse(encoder: AlignImageEncoder, images: Tensor, prompts: Sequence[str]) -> list[tuple[Reading, Scene]]:
    """What each image shows, and what its prompt asks for; images in [-1, 1], (B, 3, 128, 128) -> B pairs."""
    scenes = [known_scene(prompt) for prompt in prompts]
    readings = [reading for part in images.split(READ_AT_ONCE) for reading in read_images(encoder, part)]
    return list(zip(readings, scenes, strict=True))


def is_right(reading: Reading, scene: Scene) -> bool:
    """Whether an image shows everything that is asked for."""
    return all(judge(reading, scene).values())


def partial_score(reading: Reading, scene: Scene) -> float:
    """How much of what is asked for an image shows, in [0, 1]; 1 exactly if `is_right`.

    The mean over what the prompt states: the kinds of things (intersection over union), their number (1 minus the share
    that is missing or too many), and relation, size, background and pattern, each 0 or 1.
    """
    found, wanted = Counter(detection.kind for detection in reading.found), asked(scene)
    wrong = sum(abs(found[kind] - wanted[kind]) for kind in {*found, *wanted})
    verdicts: dict[str, float] = {**judge(reading, scene)}
    verdicts["object"] = len({*found} & {*wanted}) / len({*found, *wanted})
    verdicts["count"] = max(0.0, 1 - wrong / scene.total)
    return sum(verdicts.values()) / len(verdicts)


def shares(right: Sequence[bool], prompts: Sequence[str]) -> dict[str, float]:
    """Share of correct images by task, then of all hard tasks and of all tasks (means over tasks, as in GenEval)."""
    by_task: dict[str, list[bool]] = {task: [] for task in TASKS}
    for value, prompt in zip(right, prompts, strict=True):
        by_task[task_of(known_scene(prompt))].append(value)
    found = {task: sum(values) / len(values) for task, values in by_task.items() if values}
    for name, tasks in (("hard tasks", HARD), ("all tasks", TASKS)):
        if all(task in found for task in tasks):
            found[name] = sum(found[task] for task in tasks) / len(tasks)
    return found
