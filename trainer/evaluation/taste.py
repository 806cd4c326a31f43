"""Learn a taste from votes, folders of liked and disliked images, and files of pairs; test it on others."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.reward.base import eight_bit
from comfyui_pcpo.taste.comparisons import Comparisons, from_liked, from_pairs, from_rankings, joined, mean_per_vote
from comfyui_pcpo.taste.encoders import Encoder
from comfyui_pcpo.taste.learned import Taste, learn
from comfyui_pcpo.taste.votes import VoteFolder

from ..config.errors import ConfigError
from ..config.text_files import parse_csv, read_text
from .image_files import IMAGE_SUFFIXES, images_in, read_image

PAIR_COLUMNS = ("better", "worse")


@dataclass(frozen=True)
class TasteSources:
    """Where preferences come from: folders of votes, two folders of images, a CSV or jsonl file of pairs."""

    votes: tuple[Path, ...] = ()
    liked: Path | None = None
    disliked: Path | None = None
    pairs: Path | None = None


class Gallery:
    """Image files, each numbered once."""

    def __init__(self) -> None:
        self.rows: dict[Path, int] = {}

    def add(self, files: Iterable[Path]) -> list[int]:
        """The rows of files, new ones at the end."""
        return [self.rows.setdefault(file.resolve(), len(self.rows)) for file in files]

    def features(self, encoder: Encoder) -> Tensor:
        """(N, D), one image at a time: sizes differ."""
        return torch.cat([encoder(eight_bit(read_image(file))) for file in self.rows])


def read_comparisons(sources: TasteSources) -> tuple[Comparisons, Gallery]:
    """All comparisons of the sources and the images that they name. Raises ConfigError where there are none."""
    gallery, parts = Gallery(), []
    for folder in sources.votes:
        votes = VoteFolder(folder).ranked()
        rows = [gallery.add(folder / "images" / name for name in vote.images) for vote in votes]
        parts.append(from_rankings([(row, vote.ranks) for row, vote in zip(rows, votes, strict=True)]))
    if sources.liked is not None or sources.disliked is not None:
        liked, disliked = (image_rows(gallery, folder) for folder in (sources.liked, sources.disliked))
        if both := set(liked) & set(disliked):
            raise ConfigError(f"{len(both)} images are both liked and disliked. Give two folders that share no image.")
        parts.append(from_liked(liked, disliked))
    if sources.pairs is not None:
        pairs = [gallery.add(pair) for pair in read_pairs_file(sources.pairs)]
        parts.append(from_pairs([(better, worse) for better, worse in pairs]))
    if not any(len(part.better) for part in parts):
        where = ", ".join(str(folder) for folder in sources.votes)
        raise ConfigError(
            f"There is no preference to learn from{f' in {where}' if where else ''}. Vote with Human Vote, or give "
            "folders of liked and disliked images, or a file of pairs."
        )
    return joined(parts), gallery


def image_rows(gallery: Gallery, folder: Path | None) -> list[int]:
    files = images_in(folder) if folder is not None and folder.is_dir() else []
    if not files:
        name = "is not given" if folder is None else f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)})"
        raise ConfigError(
            f"Liked and disliked images are compared with each other, but one of the folders {name}. Give both."
        )
    return gallery.add(files)


def read_pairs_file(path: Path) -> list[tuple[Path, Path]]:
    """(better, worse) of each line; relative paths start at the file's folder. Raises ConfigError."""
    text = read_text(path)
    if path.suffix.lower() in (".jsonl", ".json"):
        rows = [_json_row(line, path, n) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        rows = parse_csv(text, path)
    pairs = []
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(column), str) for column in PAIR_COLUMNS)):
            raise ConfigError(
                f"{path}, pair {number} does not name two images. Give the columns better and worse, each the path of "
                "an image."
            )
        if row["better"] == row["worse"]:
            raise ConfigError(f"{path}, pair {number} compares {row['better']} with itself. Name two images.")
        pairs.append((path.parent / row["better"], path.parent / row["worse"]))
    return pairs


def _json_row(line: str, path: Path, number: int) -> object:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ConfigError(
            f'{path}, line {number} is not JSON ({error}). Write {{"better": "a.png", "worse": "b.png"}} in each line.'
        ) from None


def train_taste(sources: TasteSources, encoder: Encoder) -> Taste:
    """The taste that orders the sources' images as they do. Raises VoteError for too few votes."""
    pairs, gallery = read_comparisons(sources)
    return learn(gallery.features(encoder), pairs, encoder).taste


def agreement(taste: Taste, sources: TasteSources, encoder: Encoder) -> tuple[float, float, int]:
    """Share of the sources' comparisons that the taste orders alike, its standard error over votes, and the votes."""
    pairs, gallery = read_comparisons(sources)
    utility = taste(gallery.features(encoder))
    right = (utility[pairs.better] - utility[pairs.worse]).sign().double() / 2 + 0.5
    each = mean_per_vote(right, pairs)
    return float(each.mean()), float(each.std(correction=0)) / len(each) ** 0.5, len(each)
