"""What tests of bad inputs share: a place with files to get wrong, and what every refusal has to be."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trainer.cli.main import main

SECONDS = 30.0
SMALL = [
    *("--model.device", "cpu", "--prompts.lines", "a fox", "--reward.weights", "colorfulness", "--lora.rank", "2"),
    *("--rollout.prompts-per-update", "1", "--rollout.group-size", "2", "--rollout.steps", "2", "--run.updates", "1"),
]


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file and its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(arguments: list[str], words: str, folder: Path, capsys) -> None:
    """The command ends with 2 and a message with `words`, in time; what is in `folder` stays as it is."""
    before, start = snapshot(folder), time.monotonic()
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    said = " ".join((shown.err + shown.out).replace("\u2502", " ").split())
    assert status == 2, f"exit status {status}: {said}"
    assert "Traceback" not in said
    assert re.search(words, said), said
    assert len(shown.err) < 2000, shown.err[:3000]
    assert time.monotonic() - start < SECONDS
    assert snapshot(folder) == before


@dataclass
class Place:
    """Where a case happens: an empty folder, and a finished run to copy."""

    folder: Path
    finished: Path

    def run(self, **changes: bytes | None) -> Path:
        """A copy of the finished run; `config_toml=b"..."` replaces a file, None removes it."""
        copy = Path(shutil.copytree(self.finished, self.folder / "run"))
        for name, content in changes.items():
            path = copy / name.replace("__", "/").replace("_toml", ".toml").replace("_jsonl", ".jsonl")
            path = path.with_name(path.name.replace("_safetensors", ".safetensors"))
            path.unlink() if content is None else path.write_bytes(content)
        return copy

    def file(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def image(self, name: str = "image.png") -> Path:
        Image.effect_noise((16, 16), 50).convert("RGB").save(self.folder / name)
        return self.folder / name

    def album(self) -> Path:
        """A folder with one image."""
        (self.folder / "album").mkdir()
        return self.image("album/one.png").parent

    def lora(self, name: str = "lora.safetensors", **tensors: torch.Tensor) -> Path:
        save_file(tensors, self.folder / name)
        return self.folder / name

    def train(self, *options: Any, command: str = "train") -> list[Any]:
        return [command, *SMALL, "--run.folder", self.folder / "runs", *options]

    def sample(self, *options: Any, source: Any = "emoji-flow") -> list[Any]:
        small = {"--prompt": "a fox", "--steps": 2, "--images": 1, "--out": self.folder / "o.png"}
        return ["sample", source, *joined(small, options)]

    def evaluate(self, *options: Any, source: Any = None) -> list[Any]:
        small = {"--seeds": 1, "--images": 2, "--steps": 1, "--out": self.folder / "evaluation"}
        return ["evaluate", source or self.run(), *joined(small, options)]


def joined(small: dict[str, Any], options: tuple[Any, ...]) -> list[Any]:
    """Both, where options replace."""
    return [text for pair in (small | dict(zip(options[::2], options[1::2], strict=True))).items() for text in pair]


def table(cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]
