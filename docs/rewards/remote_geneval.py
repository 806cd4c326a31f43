"""GenEval-style checking as a reward server: the objects, counts, colours and positions that a prompt's metadata names.

    pip install transformers open_clip_torch
    PCPO_REWARD_TOKEN=... python docs/rewards/remote_geneval.py [--port 8765] [--device cuda]

Prompts are jsonl as GenEval (Ghosh et al. 2023) publishes them:

    {"prompt": "a photo of two red foxes", "tag": "counting", "include": [{"class": "fox", "count": 2, "color": "red"}]}
    {"prompt": "a dog left of a bench", "include": [{"class": "bench"}, {"class": "dog", "position": ["left of", 0]}]}

The score is the fraction of conditions that hold, so that a group has spread where GenEval itself gives 0 to all.
GenEval uses Mask2Former and CLIP; this example uses an open-vocabulary detector, so its numbers are not GenEval's.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.reward import Reward, RewardSettings, metadata_of
from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions

MODEL, THRESHOLD = "IDEA-Research/grounding-dino-base", 0.35


@dataclass(frozen=True)
class Found:
    """A detected object: its class with its colour if one was asked for, and its box (left, top, right, bottom)."""

    name: str
    box: tuple[float, float, float, float]


Detector = Callable[[Tensor, list[str]], list[Found]]  # uint8 (H, W, 3), names -> objects


def wanted_name(entry: dict[str, Any]) -> str:
    """`red fox` for {"class": "fox", "color": "red"}."""
    return f"{entry['color']} {entry['class']}" if entry.get("color") else entry["class"]


def lies(relation: str, one: Found, other: Found) -> bool:
    """Whether the centre of one box lies left of, right of, above or below that of the other."""
    x = one.box[0] + one.box[2] - other.box[0] - other.box[2]
    y = one.box[1] + one.box[3] - other.box[1] - other.box[3]
    return {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}[relation]


def conditions(metadata: dict[str, Any], found: list[Found]) -> list[bool]:
    """Whether each condition of the metadata holds."""
    include = metadata.get("include", [])
    objects = [[item for item in found if item.name == wanted_name(entry)] for entry in include]
    held = [len(items) == entry.get("count", max(1, len(items))) for entry, items in zip(include, objects, strict=True)]
    for entry, items in zip(include, objects, strict=True):
        if "position" in entry:
            relation, target = entry["position"]
            held.append(any(lies(relation, one, other) for one in items for other in objects[target]))
    names = {item.name for item in found}
    held += [entry["class"] not in names for entry in metadata.get("exclude", [])]
    return held


class GenEval(Reward):
    """The fraction of a prompt's conditions that a detector finds; NaN for a prompt without metadata."""

    name = "geneval"

    def __init__(self, settings: RewardSettings | None = None, detector: Detector | None = None):
        super().__init__(settings)
        self.detect = detector or grounding_dino(self.settings.device)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([self.fraction(image, metadata_of(p)) for image, p in zip(images, prompts, strict=True)])

    def fraction(self, image: Tensor, metadata: dict[str, Any]) -> float:
        entries = [*metadata.get("include", []), *metadata.get("exclude", [])]
        if not entries:
            self.failure = "the prompt has no include or exclude in its metadata"
            return float("nan")
        held = conditions(metadata, self.detect(image, list(dict.fromkeys(map(wanted_name, entries)))))
        return sum(held) / len(held)


def grounding_dino(device: str) -> Detector:
    """A detector of named objects, from the Hugging Face hub."""
    from PIL import Image
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(MODEL)
    model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(MODEL).to(device).eval()

    def detect(image: Tensor, names: list[str]) -> list[Found]:
        picture = Image.fromarray(image.cpu().numpy())
        inputs = processor(images=picture, text=[names], return_tensors="pt").to(device)
        with torch.no_grad():
            outputs = model(**inputs)
        (result,) = processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, threshold=THRESHOLD, target_sizes=[picture.size[::-1]]
        )
        labels = result.get("text_labels", result["labels"])
        return [Found(str(name), tuple(box.tolist())) for name, box in zip(labels, result["boxes"], strict=True)]

    return detect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    with RewardServer(GenEval(RewardSettings(device=options.device)), ServerOptions(port=options.port)) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
