"""Whether a reading of an image shows what its prompt asks for, attribute by attribute.

What a prompt leaves open is not judged: any size and any arrangement is correct, as in GenEval (arXiv 2310.11513).
"""

from collections import Counter

from comfyui_pcpo.tiny.align import Detection, Reading
from comfyui_pcpo.tiny.captions import SIZES, Scene

BIG = 74  # pixels, half way between a small and a big object


def asked(scene: Scene) -> Counter[str]:
    """The number of each kind that a scene asks for."""
    return Counter({thing.kind: thing.count for thing in scene.things})


def judge(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Verdicts on object and count, and on relation, size, background and pattern where the scene specifies them.

    `object` asks for the right kinds and no others; `count` for the right number of each kind.
    """
    found, wanted = Counter(detection.kind for detection in reading.found), asked(scene)
    verdicts = {"object": set(found) == set(wanted), "count": found == wanted}
    if scene.relation is not None:
        verdicts["relation"] = found == wanted and related(reading.found, scene)
    if scene.things[0].size is not None:
        verdicts["size"] = found == wanted and SIZES[reading.found[0].width > BIG] == scene.things[0].size
    if scene.color is not None:
        verdicts["background"] = reading.color == scene.color
    if scene.pattern is not None:
        verdicts["pattern"] = reading.pattern == scene.pattern
    return verdicts


def related(found: tuple[Detection, ...], scene: Scene) -> bool:
    """Whether the first of two things is on the requested side of the second, measured along the larger offset."""
    first, second = (next(d for d in found if d.kind == thing.kind) for thing in scene.things)
    right, down = second.x - first.x, second.y - first.y
    return right > abs(down) if scene.relation == "left of" else down > abs(right)
