"""Votes on groups of images: a folder with votes.jsonl and the images that were voted on."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.reward.base import RewardError

Choose = Literal["best", "best and worst", "ranking"]
CHOICES: tuple[Choose, ...] = ("best", "best and worst", "ranking")


class VoteError(RewardError):
    """A vote, or a file of votes, that cannot be used; the message has the value, the rule and the fix."""


@dataclass(frozen=True)
class Vote:
    """One group of G images as a person ranked it: `ranks` (G,), 0 is best, equal ranks are ties.

    A skipped group has no ranks, and a vote that was taken back is `undone`.
    """

    group: str
    prompt: str
    images: tuple[str, ...]  # file names in the folder `images`
    ranks: tuple[int, ...]
    seconds: float = 0.0
    undone: bool = False


def check_ranks(ranks: Sequence[int], count: int) -> tuple[int, ...]:
    """Ranks of a group of `count` images, or none for a skipped group. Raises VoteError."""
    whole = all(isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < count for rank in ranks)
    if ranks and (len(ranks) != count or not whole):
        raise VoteError(
            f"ranks are {list(ranks)}, but a group of {count} images needs {count} whole numbers from 0 (best) to "
            f"{count - 1}; equal numbers are ties. Send one number per image, or none to skip the group."
        )
    return tuple(ranks)


def rank_scores(ranks: Sequence[int]) -> Tensor:
    """Share of the other images that an image beats minus the share that beats it, (G,) -> (G,) in [-1, 1].

    A skipped group (no ranks) scores nothing. Borda's count, centred.
    """
    order = torch.tensor(ranks, dtype=torch.float32)
    return (order[None] - order[:, None]).sign().sum(1) / max(len(ranks) - 1, 1)


def group_key(images: Tensor, prompt: str) -> str:
    """Identifies a group by its pixels, uint8 (G, H, W, 3), and its prompt."""
    digest = hashlib.sha256(f"{prompt}\0{tuple(images.shape)}\0".encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]


class VoteFolder:
    """Votes in a folder. Rows are appended, none is changed; the last row of a group counts."""

    def __init__(self, path: Path):
        self.path, self.file, self.images = path, path / "votes.jsonl", path / "images"

    def rows(self) -> list[Vote]:
        """Every row, oldest first. Raises VoteError for a row that is not a vote; an unfinished last row is ignored."""
        if not self.file.is_file():
            return []
        lines = self.file.read_bytes().split(b"\n")  # each is decoded where it can be named
        if not self._is_row(lines[-1]):
            del lines[-1]
        return [self._row(line, number) for number, line in enumerate(lines, 1) if line.strip()]

    def _row(self, line: bytes, number: int) -> Vote:
        try:
            row = parse_json(line)
            vote = Vote(**{**row, "images": tuple(row["images"]), "ranks": tuple(row["ranks"])})
            check_ranks(vote.ranks, len(vote.images))
            if not all(isinstance(text, str) for text in (vote.group, vote.prompt, *vote.images)):
                raise ValueError("its group, prompt and images must be texts")
        except (ValueError, TypeError, KeyError) as error:
            raise VoteError(
                f"{self.file}, line {number} is not a vote ({error}). Remove the line, or the file to start over."
            ) from None
        return vote

    def votes(self) -> list[Vote]:
        """The votes that count, with ranks or skipped, in the order in which their groups were first shown."""
        latest = {vote.group: vote for vote in self.rows()}
        return [vote for vote in latest.values() if not vote.undone]

    def ranked(self) -> list[Vote]:
        """The votes that prefer an image to another: not skipped, and not all ties."""
        return [vote for vote in self.votes() if len(set(vote.ranks)) > 1]

    def add(self, images: Tensor, prompt: str, ranks: Sequence[int], seconds: float = 0.0) -> Vote:
        """Store a vote with its images, uint8 (G, H, W, 3)."""
        ranks, files = check_ranks(ranks, len(images)), tuple(self._store(image) for image in images)
        vote = Vote(group_key(images, prompt), prompt, files, ranks, round(seconds, 2))
        self._append(vote)
        return vote

    def undo(self, vote: Vote) -> None:
        """Take a vote back."""
        self._append(Vote(vote.group, vote.prompt, vote.images, vote.ranks, vote.seconds, undone=True))

    def pixels(self, files: Iterable[str]) -> list[Tensor]:
        """Images by their file names, uint8 (H, W, 3) each. Raises VoteError for a missing one."""
        return [self._read(self.images / file) for file in files]

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError) as error:  # as Pillow raises for a damaged file
            raise VoteError(
                f"{path}, an image of a vote, cannot be read ({error}). Restore the file, or vote in a new folder."
            ) from None

    def _store(self, image: Tensor) -> str:
        self.images.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:20] + ".png"
        path = self.images / name
        if not path.exists():
            part = path.with_suffix(".part")
            Image.fromarray(image.numpy()).save(part, "png")
            part.replace(path)
        return name

    def _append(self, vote: Vote) -> None:
        """Add a row, in place of one that a crash cut short."""
        with self.file.open("ab+") as file:
            file.seek(0)
            kept, line_end, last = file.read().rpartition(b"\n")
            if last and self._is_row(last):  # only its line end is missing
                file.write(b"\n")
            else:
                file.truncate(len(kept + line_end))
            file.write(json.dumps(asdict(vote)).encode() + b"\n")

    def _is_row(self, line: bytes) -> bool:
        try:
            self._row(line, 0)
        except VoteError:
            return False
        return True
