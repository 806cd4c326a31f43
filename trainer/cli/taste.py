"""Commands around a person's taste: learn it, test it, compare two models blind."""

import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from ..config.errors import ConfigError
from ..files import require_writable
from .files import free_name
from .libraries import quiet_libraries, quiet_transformers
from .parameters import Json
from .rewards import make_settings

if TYPE_CHECKING:
    from ..evaluation.taste import TasteSources

EncoderName = Literal["emoji-align", "clip-vit-l-14"]


def train_taste_command(
    *votes: Path,
    liked: Path | None = None,
    disliked: Path | None = None,
    pairs: Path | None = None,
    encoder: EncoderName = "emoji-align",
    out: Path | None = None,
    overwrite: bool = False,
    folder: Path | None = None,
    device: str = "auto",
) -> None:
    """Learn a reward from votes, from liked and disliked images, or from pairs.

    Parameters
    ----------
    votes
        Folders of votes, as Human Vote writes them to output/pcpo_votes.
    liked
        Folder of liked images.
    disliked
        Folder of disliked images.
    pairs
        CSV or jsonl file with the columns better and worse: paths of images, relative to the file.
    encoder
        Image features: emoji-align for images of the embedded models, clip-vit-l-14 for all others.
    out
        File to write; it is a reward wherever a reward is named. Default: taste.safetensors, taste-2.safetensors, ...
    overwrite
        Replace the file if it exists.
    folder
        Folder with reward model weights; default: models/rewards.
    device
        auto, cpu, cuda or cuda:N.
    """
    path = out or Path(free_name(Path(), "taste", ".safetensors"))
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out {path} does not end in .safetensors, by which a taste is recognised. Rename it.")
    require_writable(path, "--out", overwrite)
    quiet_transformers()
    from comfyui_pcpo.taste.encoders import load_encoder

    from ..evaluation.taste import train_taste

    given = sources(votes, liked, disliked, pairs)
    taste = train_taste(given, load_encoder(encoder, make_settings(folder, device, "float32")))
    taste.save(path)
    print(taste.report.sentence())
    print(path.resolve())


def test_taste_command(
    taste: Path,
    /,
    *votes: Path,
    liked: Path | None = None,
    disliked: Path | None = None,
    pairs: Path | None = None,
    folder: Path | None = None,
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Test a learned taste on votes, images or pairs that it was not trained on.

    Parameters
    ----------
    taste
        File of a taste.
    votes
        Folders of votes.
    liked
        Folder of liked images.
    disliked
        Folder of disliked images.
    pairs
        CSV or jsonl file with the columns better and worse: paths of images, relative to the file.
    folder
        Folder with reward model weights; default: models/rewards.
    device
        auto, cpu, cuda or cuda:N.
    """
    quiet_transformers()
    from comfyui_pcpo.taste.learned import encoder_of, load_taste

    from ..evaluation.taste import agreement

    learned = load_taste(taste)
    encoder = encoder_of(learned, make_settings(folder, device, "float32"))
    share, error, count = agreement(learned, sources(votes, liked, disliked, pairs), encoder)
    if as_json:
        print(json.dumps({"agreement": share, "error": error, "votes": count}))
        return
    print(f"agrees with {100 * share:.1f} +- {100 * error:.1f} % of {count} votes")


def sources(votes: tuple[Path, ...], liked: Path | None, disliked: Path | None, pairs: Path | None) -> "TasteSources":
    from ..evaluation.taste import TasteSources

    for path in votes:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder of votes. Give a folder that Human Vote has written.")
    return TasteSources(votes, liked, disliked, pairs)


def ab_command(
    a: str,
    b: str,
    /,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative=())] = None,
    images: int = 4,
    steps: int = 20,
    pairs: int = 0,
    question: str = "Which image is better?",
    seed: int = 0,
    port: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
    open_browser: bool = False,
) -> None:
    """Compare two sides blind in the browser: pairs, sides swapped at random, and the win rate with its interval.

    Parameters
    ----------
    a
        Folder of images, or a run, LoRA file or model to sample.
    b
        The other side, with as many images.
    prompt
        Prompt of sides that are sampled; may be given several times.
    images
        Images per prompt.
    steps
        Denoising steps.
    pairs
        Number of pairs to ask about; 0 is all.
    question
        The question that is asked.
    seed
        Seed of the noise, the order and the sides.
    port
        Port of the page on 127.0.0.1; 0 selects a free one.
    out
        File for the votes and the result, written after every vote; default: ab.json, ab-2.json, ...
    overwrite
        Replace the file if it exists.
    open_browser
        Open the page.
    """
    path = out or Path(free_name(Path(), "ab", ".json"))
    if path.suffix != ".json":
        raise ConfigError(f"--out {path} must be a file that ends in .json.")
    require_writable(path, "--out", overwrite)
    from ..evaluation.options import check_ranges

    check_ranges({"images": images, "steps": steps, "seed": seed})
    if pairs < 0 or not 0 <= port < 65536:
        raise ConfigError(f"--pairs is {pairs} and --port {port}. Give 0 or more pairs, and a port below 65536.")
    quiet_libraries()
    from comfyui_pcpo.durable import write_durably
    from comfyui_pcpo.taste.blind import WinRate, sentence

    from ..evaluation.ballot_page import BallotServer
    from ..evaluation.blind import BlindTest, compare_blind, pairs_of_sides
    from ..evaluation.sampling import Draw, untrained_seed

    test = BlindTest(tuple(prompt or ()), Draw(untrained_seed(seed), steps, each=images), question, pairs, seed)
    compared = pairs_of_sides(a, b, test)

    def keep(result: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, (json.dumps({"a": a, "b": b, **result}, indent=1) + "\n").encode())

    try:
        server = BallotServer(port)
    except OSError as error:
        raise ConfigError(f"Cannot listen on port {port} ({error}). Choose another --port, or 0.") from None
    with server.serving():
        print(f"Vote at {server.url}  (Ctrl-C stops)", flush=True)
        if open_browser:
            webbrowser.open(server.url)
        result = compare_blind(compared, question, server.ask, keep)
    print(sentence(WinRate(**{name: result[name] for name in ("rate", "low", "high", "votes", "ties")})))
    print(path.resolve())


TASTE = App(name="taste", help="Learn a reward from a person's votes, and test it.")
TASTE.command(train_taste_command, name="train")
TASTE.command(test_taste_command, name="test")
