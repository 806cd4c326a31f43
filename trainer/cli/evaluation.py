"""Commands around rewards: evaluate, score, download, serve-reward."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from tqdm import tqdm

from comfyui_pcpo.reward import RewardFile, RewardSettings

from ..config.schema import ConfigError
from ..runs.folder import finite

Json = Annotated[bool, Parameter(name="--json")]
Several = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]


def evaluate(
    source: str,
    /,
    *,
    prompts: Path | None = None,
    rewards: Several = (),
    reference: Path | None = None,
    seeds: int = 4,
    images: int = 4,
    steps: int = 20,
    cfg: float | None = None,
    first_seed: int = 0,
    checkpoint: str = "latest",
    inception: Path | None = None,
    dino: Path | None = None,
    lpips: Path | None = None,
    folder: Path | None = None,
    out: Path | None = None,
    save_images: bool = False,
    as_json: Json = False,
) -> None:
    """Measure a LoRA against the model without it, on the same noise: rewards, distances, variety, over seeds.

    Parameters
    ----------
    source
        A run's folder, a LoRA file made by this trainer, an embedded model's name or a model's folder.
    prompts
        Text file, one prompt per line; the run's own prompts if left out.
    rewards
        Names of rewards; those of the run, trained and held out, if left out.
    reference
        Folder of real pictures, which Frechet distances are measured from.
    seeds
        Repetitions with other noise; statistics are over these.
    images
        Pictures per prompt and seed.
    steps
        Denoising steps; sampling is deterministic.
    cfg
        Classifier-free guidance scale; the run's own if left out.
    first_seed
        Seed of the first repetition.
    checkpoint
        latest, best, or the number of an update.
    inception
        Inception weights in torch-fidelity's layout: FID and Inception Score.
    dino
        Folder with DINOv2 (facebook/dinov2-large): FD-DINOv2.
    lpips
        torchvision's AlexNet file, the heads alex.pth beside it: mean LPIPS between pictures of a prompt.
    folder
        Folder with reward weights; the run's own, or models/rewards, if left out.
    out
        Folder to write to; RUN/evaluation, or evaluation for other sources, if left out.
    save_images
        Write every picture too, as PNG files.
    as_json
        Print what evaluation.json holds instead of the table.
    """
    from ..evaluation.evaluate import Request, count_images
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.metrics import Files

    out = out or (Path(source) if (Path(source) / "config.toml").is_file() else Path()) / "evaluation"
    pictures = out / "pictures" if save_images else None
    files = Files(inception, dino, lpips)
    request = Request(
        source,
        prompts,
        rewards=rewards,
        seeds=seeds,
        images=images,
        steps=steps,
        cfg=cfg,
        first_seed=first_seed,
        checkpoint=checkpoint,
        folder=folder,
        reference=reference,
        files=files,
        pictures=pictures,
    )
    with tqdm(total=count_images(request), unit="picture", leave=False, dynamic_ncols=True) as bar:
        report = run(request, bar.update)
    written = report.write(out)
    if as_json:
        print(json.dumps(report.tree()))
        return
    print("\n".join(report.table()))
    print("\n".join(f"note: {note}" for note in report.notes))
    print(f"{seeds} seeds x {len(report.prompts)} prompts x {images} pictures; +- is one standard error over seeds")
    print("\n".join(str(path.resolve()) for path in written))


def score(
    images: Path,
    /,
    *,
    prompt: str = "",
    reward: Several = (),
    folder: Path | None = None,
    device: str = "auto",
    precision: Literal["float32", "float16"] = "float32",
    as_json: Json = False,
) -> None:
    """Score pictures with rewards, best first.

    Parameters
    ----------
    images
        A picture, or a folder of pictures.
    prompt
        The prompt that they were made for.
    reward
        Names of rewards, or module:Class; alignment if left out.
    folder
        Folder with reward weights; models/rewards if left out.
    device
        auto, cpu, cuda or cuda:1.
    precision
        Precision of the rewards' networks; float16 halves their memory.
    as_json
        Print one JSON list.
    """
    from .commands import score_images

    rows = score_images(images, prompt, list(reward) or ["alignment"], _settings(folder, device, precision))
    if as_json:
        print(json.dumps(finite(rows)))
        return
    for row in rows:
        print("  ".join(f"{name} {value:9.4f}" for name, value in row["scores"].items()), row["file"])


def download(reward: str, /, *, folder: Path | None = None, endpoint: str | None = None) -> None:
    """Fetch a reward's weight files from the Hugging Face hub, resuming and checking them.

    Parameters
    ----------
    reward
        Name of a reward.
    folder
        Folder with reward weights; models/rewards if left out.
    endpoint
        Address of a mirror of the hub; HF_ENDPOINT, or huggingface.co, if left out.
    """
    from comfyui_pcpo.reward import REWARDS
    from comfyui_pcpo.reward import download as fetch

    from ..runs.rewards import WEIGHTS

    if reward not in REWARDS:
        raise ConfigError(f"{reward!r} is none of {len(REWARDS)} rewards. Use one of {', '.join(sorted(REWARDS))}.")
    files = REWARDS[reward].files
    if not files:
        print(f"{reward} needs no weight files from the hub.")
        return
    for file in files:
        print(f"{file.filename} ({file.bytes / 1e9:.2f} GB, {file.licence}) from {file.hub_id}")
    with tqdm(unit="B", unit_scale=True, leave=False, dynamic_ncols=True) as bar:

        def show(file: RewardFile, done: int, size: int | None) -> None:
            bar.set_description(file.filename, refresh=False)
            bar.total, bar.n = size, done
            bar.update(0)

        paths = fetch(REWARDS[reward], folder or WEIGHTS, endpoint, show)
    print("\n".join(str(path.resolve()) for path in paths))


def serve_reward(
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
    """Serve a reward to other processes and machines until Ctrl-C; the token comes from PCPO_REWARD_TOKEN.

    Parameters
    ----------
    reward
        Name of a reward, or module:Class.
    host
        Address to listen on; only this machine reaches 127.0.0.1, and 0.0.0.0 is all of its addresses.
    port
        Port to listen on; 0 takes a free one.
    folder
        Folder with reward weights; models/rewards if left out.
    device
        auto, cpu, cuda or cuda:1.
    precision
        Precision of the reward's network; float16 halves its memory.
    images_at_once
        Images per call of the network.
    """
    from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions

    from ..runs.rewards import make_reward

    options = ServerOptions(host, port)
    served = make_reward(reward, _settings(folder, device, precision, images_at_once)).load()
    try:
        server = RewardServer(served, options)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} cannot be listened on ({error}). Choose another --host or --port.") from None
    with server:
        print(f"{reward} on {server.url}  (Ctrl-C stops it)", flush=True)
        if server.is_everywhere:
            print("It listens on all addresses; token and pictures travel unencrypted: put TLS in front.", flush=True)
        print(f"elsewhere: PCPO_REWARD_URL={server.url} and the same PCPO_REWARD_TOKEN, reward `remote`", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def _settings(folder: Path | None, device: str, precision: str, images_at_once: int = 16) -> RewardSettings:
    """Settings of a reward that belongs to no run."""
    from ..config.loading import build
    from ..runs.rewards import reward_settings

    given = {"folder": folder, "device": device, "precision": precision, "images_at_once": images_at_once}
    return reward_settings(build({"reward": given}, "options"))


COMMANDS = {"evaluate": evaluate, "score": score, "download": download, "serve-reward": serve_reward}
