"""The command line: thin commands over the library; every error is a sentence, exit status 2."""

import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from comfyui_pcpo.plotting.run_curves import compare_runs, curves
from comfyui_pcpo.reward.base import RewardError, RewardSettings

from ..config.loading import describe, dump, load, parse_overrides, tomllib, unknown_words, without_effect
from ..config.schema import Config, ConfigError
from ..loop.scoring import RunError
from ..runs.folder import RunFolder
from ..runs.launch import Run
from .evaluation import COMMANDS
from .progress import Bar, Stopped, outcome


def version() -> str:
    """The installed package's, or that of the pyproject.toml above this folder."""
    try:
        return metadata.version("comfyui-pcpo")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


app = App(
    name="python -m trainer",
    version=version,
    default_parameter=Parameter(negative=()),  # no --no-json, no --empty-prompt
    suppress_keyboard_interrupt=False,  # `main` answers it
    help="Align text-to-image models to a reward with proportionate credit (PCPO).",
)
Tokens = Annotated[
    str,
    Parameter(
        name="CONFIG.toml --section.field value",
        allow_leading_hyphen=True,
        help="A TOML file (configs/ holds ready ones), then options laid on it; `python -m trainer options` lists all. "
        "Without a file the embedded model is trained on its defaults.",
    ),
]
ERRORS = (ConfigError, RunError, RewardError, FloatingPointError)


def main(tokens: list[str] | None = None) -> int:
    """Run one command, -> exit status: 0 done, 2 refused, 130 stopped by Ctrl-C."""
    quieten()
    try:
        app(tokens, result_action="return_value", exit_on_error=False)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Check the path and the free space; finished checkpoints are whole.", file=sys.stderr)
        return 2
    except CycloptsError:  # printed already, with the nearest name
        return 2
    except Stopped:
        return 130
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def quieten() -> None:
    """Keep the libraries' chatter out of the progress bar."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@app.command
def train(*tokens: Tokens) -> None:
    """Train a LoRA: `train configs/tiny-flow.toml --rollout.group-size 16 --run.name foxes`."""
    from ..runs import launch

    config = _config(list(tokens))
    with Bar() as bar:
        follow(launch.start_run(config, bar.tick), bar)


def follow(run: Run, bar: Bar, quiet: bool = False) -> None:
    """Do a run, with a line per update and the files, or the way to continue, at the end."""
    from ..loop.align import align

    with outcome(run.folder, bar, quiet), run:
        bar.begin(run.state.done, run.config.run.updates)
        for update in align(run.state, run.job):
            run.keep(update)
            bar.show(update, run.folder)


@app.command
def resume(run: Path, /, *, checkpoint: str = "latest", updates: int | None = None) -> None:
    """Continue a run where it stopped, to the same numbers as if it had not.

    Parameters
    ----------
    run
        The run's folder.
    checkpoint
        latest, best, or the number of an update.
    updates
        New number of updates, to go on with a finished run.
    """
    from ..runs import launch

    with Bar() as bar:
        follow(launch.resume_run(run, checkpoint, updates, bar.tick), bar)


@app.command
def options() -> None:
    """List every option of `train` and `check` with its default and what it does."""
    print("\n".join(describe()))


@app.command
def check(*tokens: Tokens) -> None:
    """Show the resolved configuration, its arithmetic and its memory; exit status 2 where something is missing."""
    from ..memory.estimate import arithmetic, budget
    from ..policy.loading import make_policy

    resolved = _config([token for token in tokens if token != "--json"])
    as_json, found, prompts = "--json" in tokens, None, []
    missing = [str(error) for error in without(resolved)]
    if not as_json:
        print(dump(resolved))
        print("\n".join(arithmetic(resolved)))
    try:
        prompts = resolved.prompts.read()
        # sizes are the same on every device, and on the CPU checking cannot run out of a GPU's memory
        there = resolved.model_copy(update={"model": resolved.model.model_copy(update={"device": "cpu"})})
        found = budget(make_policy(there), resolved)
    except ConfigError as error:
        missing.append(str(error))
    if as_json:
        tree = {"config": resolved.model_dump(mode="json"), "prompts": len(prompts), "missing": missing}
        print(json.dumps(tree | {"budget": None if found is None else asdict(found)}))
    elif found is not None:
        print(f"{len(prompts)} prompts to draw from")
        print("\n".join(found.lines(resolved)))
    if missing:
        raise ConfigError("\nerror: ".join(dict.fromkeys(missing)))


def without(config: Config) -> Iterator[ConfigError]:
    """What this computer lacks for a run: files of rewards, a GPU."""
    from ..policy.device import pick_device
    from ..runs.rewards import WEIGHTS, make_reward, reward_settings

    try:
        pick_device(config.model.device)
        settings = reward_settings(config)
    except ConfigError as error:
        yield error
        settings = RewardSettings(config.reward.folder or WEIGHTS)
    for name in (*config.reward.weights, *config.reward.held_out):
        try:
            make_reward(name, settings).to("cpu").load()
        except (ConfigError, RewardError) as error:
            yield ConfigError(str(error))


@app.command
def demo(*, updates: int = 30, name: str | None = None, folder: Path = Path("output/pcpo"), seed: int = 0) -> None:
    """Align the embedded model in a minute or two: no download, before and after pictures at the end.

    Parameters
    ----------
    updates
        Updates to do; more go further.
    name
        Name of the run; demo, demo-2, ... if left out.
    folder
        Folder that holds the runs.
    seed
        Seed of the run.
    """
    from ..runs import launch
    from .demo_run import compare, demo_config, draw

    start = time.perf_counter()
    config = demo_config(name or _free_name(folder, "demo"), folder, updates, seed)
    print(f"Aligning emoji-flow to {_plus(config)} for {updates} updates of {config.images_per_update} images.")
    with Bar() as bar:
        run = launch.start_run(config, bar.tick)
        follow(run, bar, quiet=True)
    print("Comparing with the model before, on noise it has not been trained on ...")
    found = compare(config, run.folder, list(config.prompts.lines), seed=seed + 1, each=4)
    first = next(iter(config.reward.weights))
    draw(found, first, run.folder.path / "before_after.png")
    for reward in found.scores:
        before, after, deviations = found.gain(reward)
        role = "held out" if reward in config.reward.held_out else "trained"
        print(f"  {reward:<24} {before:8.3f} -> {after:8.3f}   {deviations:+.2f} standard deviations  ({role})")
    print(f"time          {time.perf_counter() - start:.0f} s")
    print(f"before/after  {(run.folder.path / 'before_after.png').resolve()}")
    print(f"curves        {run.folder.curves_file.resolve()}")
    print(f"LoRA          {run.folder.lora_file.resolve()}")


@app.command
def sample(
    run: str,
    /,
    *,
    prompt: list[str],
    compare: bool = False,
    guide: list[str] | None = None,
    negative: str | None = None,
    seed: int = 0,
    steps: int = 20,
    cfg: float | None = None,
    noise_level: float = 0.0,
    images: int = 4,
    out: Path | None = None,
) -> None:
    """Make pictures with a run's LoRA, beside those without it, or with several LoRAs composed.

    Parameters
    ----------
    run
        A run's folder, a LoRA file made by this trainer, or an embedded model's name.
    prompt
        What to show; may be given several times.
    compare
        Also show the model without the LoRA, on the same noise.
    guide
        LORA=WEIGHT, several times: implicit reward guidance over the base model. Weight 1 is that LoRA alone,
        2 goes beyond it, -1 away from it.
    negative
        Negative prompt; the run's own if left out.
    seed
        Seed of the noise.
    steps
        Denoising steps.
    cfg
        Classifier-free guidance scale; the run's own if left out.
    noise_level
        0 samples deterministically; -1 as the run trained.
    images
        Pictures per prompt.
    out
        Picture file to write; samples.png, samples-2.png, ... if left out.
    """
    from ..evaluation.sampling import Draw
    from .commands import SampleRequest, sample_images

    wish = SampleRequest(prompt, guide or [], compare, negative, cfg)
    picture = sample_images(run, wish, Draw(seed, steps, noise_level, images))
    out = out or Path(_free_name(Path(), "samples", ".png"))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(out.resolve())


for name, command in COMMANDS.items():
    app.command(command, name=name)


@app.command(name="plot")
def plot_(*runs: Path, out: Path | None = None) -> None:
    """Draw a run's curves, or several runs over one another.

    Parameters
    ----------
    runs
        Folders of runs.
    out
        Picture file; the run's curves.png, or compare.png for several, if left out.
    """
    if not runs:
        raise ConfigError("0 runs were named. Give one or more run folders.")
    records = {}
    for run in runs:
        RunFolder(run).config()
        found = RunFolder(run).records()
        records[run.name if run.name not in records else str(run)] = found
        if not found:
            raise ConfigError(f"{run} has 0 finished updates, so there is nothing to draw. Train it first.")
    one = len(runs) == 1
    path = out or (RunFolder(runs[0]).curves_file if one else Path("compare.png"))
    image = curves(next(iter(records.values()))) if one else compare_runs(records)
    image.save(path)
    print(path.resolve())


@app.command
def export(run: Path, /, *, format: str = "comfyui", checkpoint: str = "latest", out: Path | None = None) -> None:
    """Write a run's LoRA under the names that a program reads.

    Parameters
    ----------
    run
        A run's folder.
    format
        comfyui, diffusers or kohya.
    checkpoint
        latest, best, or the number of an update.
    out
        File to write; RUN/lora-FORMAT.safetensors if left out.
    """
    from .commands import export_lora

    print(export_lora(run, format, checkpoint, out).resolve())


def _config(tokens: list[str]) -> Config:
    """The configuration that `[FILE] --section.field value ...` asks for."""
    path = Path(tokens.pop(0)) if tokens and not tokens[0].startswith("--") else None
    config = load(path, parse_overrides(tokens))
    for sentence in (*without_effect(config), *unknown_words(config)):
        print(f"note: {sentence}", file=sys.stderr)
    return config


def _free_name(folder: Path, name: str, end: str = "") -> str:
    """NAME, NAME-2, ...: the first that is not there yet."""
    names = itertools.chain([name + end], (f"{name}-{n}{end}" for n in itertools.count(2)))
    return next(found for found in names if not (folder / found).exists())


def _plus(config: Config) -> str:
    return " + ".join(f"{w:g} x {name}" for name, w in config.reward.weights.items())
