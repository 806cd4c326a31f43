"""Commands around rewards: evaluate, score, download, serve-reward."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from tqdm import tqdm

from ..config.errors import ConfigError
from ..evaluation.options import EvaluationOptions
from ..files import require_writable
from .files import free_name
from .libraries import quiet_libraries, quiet_transformers
from .parameters import Json

if TYPE_CHECKING:
    from comfyui_pcpo.reward import RewardFile, RewardSettings

Flattened = Parameter(name="*", consume_multiple=True)
SaveImages = Annotated[bool, Parameter(name=("--save-images", "--save-pictures"), show_default=False)]


def evaluate_command(
    source: str,
    /,
    *,
    options: Annotated[EvaluationOptions, Flattened] = EvaluationOptions(),  # noqa: B008  frozen
    out: Path | None = None,
    overwrite: bool = False,
    save_images: SaveImages = False,
    as_json: Json = False,
) -> None:
    """Compare a LoRA with its base model on the same noise: rewards, distances, diversity, over several seeds.

    Parameters
    ----------
    source
        Folder of a run, a LoRA file of this trainer, the name of an embedded model, or the folder of a model.
    out
        Folder to write to; default: RUN/evaluation, which is replaced, or evaluation, evaluation-2, ... for other
        sources.
    overwrite
        Replace files of an earlier evaluation in the folder.
    save_images
        Also save every image as a PNG file.
    """
    quiet_libraries()
    from ..evaluation.evaluate import count_images, evaluate
    from ..evaluation.report import FILES

    own = Path(source) / "evaluation" if (Path(source) / "config.toml").is_file() else None
    out = out or own or Path(free_name(Path(), "evaluation"))
    for name in FILES:
        require_writable(out / name, "--out", overwrite or out == own)
    pictures = out / "pictures" if save_images else None
    if pictures is not None and pictures.exists() and not (overwrite or out == own):
        raise ConfigError(f"--out {pictures} exists and is not overwritten. Give another folder, or add --overwrite.")
    with tqdm(total=count_images(source, options), unit="image", leave=False, disable=None, dynamic_ncols=True) as bar:
        report = evaluate(source, options, pictures, bar.update)
    files = report.write(out)
    if as_json:
        print(json.dumps(report.tree()))
        return
    print("\n".join(report.table()))
    print("\n".join(f"note: {note}" for note in report.notes))
    counts = f"{options.seeds} seeds x {len(report.prompts)} prompts x {options.images} images"
    print(f"{counts}; +- is one standard error over seeds")
    print("\n".join(str(path.resolve()) for path in files))


def score_command(
    images: Path,
    /,
    *,
    prompt: str = "",
    reward: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("alignment",),
    folder: Path | None = None,
    device: str = "auto",
    precision: Literal["float32", "float16"] = "float32",
    as_json: Json = False,
) -> None:
    """Score images with rewards, best first.

    Parameters
    ----------
    images
        An image file, or a folder of images.
    prompt
        The prompt of the images.
    reward
        Names of rewards, or module:Class; the first one sorts.
    folder
        Folder with reward model weights; default: models/rewards.
    device
        auto, cpu, cuda or cuda:N.
    precision
        Precision of the reward models; float16 halves their memory.
    """
    quiet_transformers()
    from ..evaluation.images import score_images
    from ..runs.rows import finite

    rows = score_images(images, prompt, list(reward), make_settings(folder, device, precision))
    if as_json:
        print(json.dumps(finite(rows)))
        return
    for row in rows:
        print("  ".join(f"{name} {value:9.4f}" for name, value in row["scores"].items()), row["file"])


def download_command(reward: str, /, *, folder: Path | None = None, endpoint: str | None = None) -> None:
    """Download a reward's weights from the Hugging Face Hub; resumes, and verifies the files.

    Parameters
    ----------
    reward
        Name of a reward.
    folder
        Folder with reward model weights; default: models/rewards.
    endpoint
        URL of a mirror of the hub; default: HF_ENDPOINT, or huggingface.co.
    """
    from comfyui_pcpo.reward import REWARDS, download

    from ..runs.rewards import WEIGHTS

    if reward not in REWARDS:
        raise ConfigError(f"{reward!r} is not a known reward. Use one of {', '.join(sorted(REWARDS))}.")
    files = REWARDS[reward].files
    if not files:
        print(f"{reward} needs no weights from the hub.")
        return
    for file in files:
        print(f"{file.filename} ({file.bytes / 1e9:.2f} GB, {file.licence}) from {file.hub_id}", flush=True)
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:

        def show(file: "RewardFile", done: int, size: int | None) -> None:
            bar.set_description(file.filename, refresh=False)
            bar.total, bar.n = size, done
            bar.update(0)

        paths = download(REWARDS[reward], folder or WEIGHTS, endpoint, show)
    print("\n".join(str(path.resolve()) for path in paths))


def serve_reward_command(
    reward: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    folder: Path | None = None,
    device: str = "auto",
    precision: Literal["float32", "float16"] = "float32",
    images_at_once: int = 16,
) -> None:
    """Serve a reward to other processes and machines; the token is read from PCPO_REWARD_TOKEN.

    Parameters
    ----------
    reward
        Name of a reward, or module:Class.
    host
        Address to listen on; 127.0.0.1 accepts local connections only, 0.0.0.0 all.
    port
        Port to listen on; 0 selects a free one.
    folder
        Folder with reward model weights; default: models/rewards.
    device
        auto, cpu, cuda or cuda:N.
    precision
        Precision of the reward model; float16 halves its memory.
    images_at_once
        Images per call of the reward model.
    """
    quiet_transformers()
    from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions

    from ..runs.rewards import make_reward

    options = ServerOptions(host, port)
    served = make_reward(reward, make_settings(folder, device, precision, images_at_once)).load()
    try:
        server = RewardServer(served, options)
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last two: a name that no host can have
        raise ConfigError(f"Cannot listen on {host}:{port} ({error}). Choose another --host or --port.") from None
    with server:
        print(f"{reward} on {server.url}  (Ctrl-C stops it)", flush=True)
        if server.is_everywhere:
            print("Listening on all addresses; token and images are sent unencrypted: put TLS in front.", flush=True)
        print(
            f"clients: set PCPO_REWARD_URL={server.url} and PCPO_REWARD_TOKEN, and use the reward `remote`", flush=True
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def make_settings(folder: Path | None, device: str, precision: str, images_at_once: int = 16) -> "RewardSettings":
    """Settings of a reward that does not belong to a run."""
    from ..config.loading import build
    from ..runs.rewards import reward_settings

    tree = {"folder": folder, "device": device, "precision": precision, "images_at_once": images_at_once}
    return reward_settings(build({"reward": tree}, "options"))
