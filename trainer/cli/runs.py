"""Commands that make runs: demo, train, resume, check, options."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..config.diagnostics import unknown_words, without_effect
from ..config.errors import ConfigError
from ..config.loading import dump, load_described, parse_overrides
from ..config.options import option_lines
from ..config.schema import Config
from ..evaluation.options import DemoReward
from .files import free_name
from .libraries import quiet_libraries
from .parameters import Json
from .progress import Bar, is_main_process, outcome

if TYPE_CHECKING:
    from ..evaluation.demo import Comparison
    from ..runs.check import RunCheck
    from ..runs.launch import Run

Tokens = Annotated[
    str,
    Parameter(
        name="CONFIG.toml --section.field value",
        allow_leading_hyphen=True,
        help="A TOML file (see configs/), then options that override its values; `options` lists all. Without a "
        "file, the options alone configure a run of the embedded model; they must give `--prompts.lines`.",
    ),
]


def train_command(*tokens: Tokens) -> None:
    """Train a LoRA, for example: train configs/tiny-flow.toml --rollout.group-size 16 --run.name pairs

    Writes to output/pcpo/NAME (--run.folder, --run.name). Ctrl-C saves a checkpoint, and resume continues from it.
    """
    config = read_config(list(tokens))
    quiet_libraries()
    from ..runs import launch

    with Bar() as bar:
        follow(launch.start_run(config, bar.tick), bar)


def follow(run: "Run", bar: Bar, quiet: bool = False) -> None:
    """Do a run: print a line per update, and at the end its files, or how to continue."""
    from ..loop.align import align
    from ..loop.distributed import leave, together
    from ..runs.failures import explained

    with outcome(run.folder, bar, quiet), explained(run.config, run.folder), together(), run:
        run.job = replace(run.job, encoding=bar.encoding)
        bar.begin(run.state.done, run.config.run.updates)
        for update in align(run.state, run.job):
            run.keep(update)
            bar.show(update, run.folder)
    leave()


def resume_command(
    run: Path, /, *, checkpoint: str = "latest", updates: int | None = None, accept_changes: bool = False
) -> None:
    """Resume a run; the result equals that of an uninterrupted run.

    Parameters
    ----------
    run
        Folder of the run.
    checkpoint
        latest, best, kept (by the guard), or the number of an update; final: kept if any is, else latest.
    updates
        New total number of updates, to extend a finished run.
    accept_changes
        Continue although settings, prompts or the model differ from those of the run, and record it.
    """
    quiet_libraries()
    from ..runs import launch

    with Bar() as bar:
        options = launch.ResumeOptions(checkpoint, updates, accept_changes)
        follow(launch.resume_run(run, options, bar.tick), bar)


def options_command() -> None:
    """List every option of `train` and `check` with its default and description."""
    print("\n".join(option_lines()))


def check_command(*tokens: Tokens, as_json: Json = False) -> None:
    """Show the resolved configuration, its arithmetic and memory, and all problems; exit status 2 if there are any."""
    config = read_config(list(tokens))
    quiet_libraries()
    from ..memory.estimate import arithmetic
    from ..runs.check import check_run

    if not as_json:
        print(dump(config))
        print("\n".join(arithmetic(config)), flush=True)
    check = check_run(config)
    for note in check.notes:
        print(f"note: {note}.", file=sys.stderr)
    print_check(check, config, as_json)
    if check.problems:
        sys.stdout.flush()  # problems come last, even where both streams go to one file
        raise ConfigError("\nerror: ".join(check.problems))


def print_check(check: "RunCheck", config: Config, as_json: bool) -> None:
    """What was determined of the run, without the problems in the text form."""
    if as_json:
        costs = None if check.budget is None else asdict(check.budget)
        tree = {"config": config.model_dump(mode="json"), "prompts": len(check.prompts), "problems": check.problems}
        print(json.dumps(tree | {"budget": costs}))
        return
    if check.prompts:
        print(f"training prompts: {len(check.prompts)}")
    if check.budget is not None:
        print("\n".join(check.budget.lines(config)))


def demo_command(
    *,
    reward: DemoReward = "tinyeval",
    updates: int | None = None,
    name: str | None = None,
    folder: Path = Path("output/pcpo"),
    seed: int = 0,
) -> None:
    """Align the embedded model, about a minute on two idle CPU cores (tinyeval), and compare it with the base model.

    Parameters
    ----------
    reward
        tinyeval: whether images show what their prompts ask for. colorfulness: easily hacked, to see the guard at work.
    updates
        Number of updates; default: 20 for tinyeval, 30 for colorfulness.
    name
        Name of the run; default: demo, demo-2, ...
    folder
        Parent folder of all runs.
    seed
        Seed of the run.
    """
    quiet_libraries()
    from ..evaluation.demo import DEMO_RECIPES, compare_with_base, demo_config, save_comparison
    from ..runs import launch

    start = time.perf_counter()
    config = demo_config(reward, name or free_name(folder, "demo"), folder, updates, seed)
    parts = [name if weight == 1 else f"{weight:g} {name}" for name, weight in config.reward.weights.items()]
    size = f"{config.run.updates} updates of {config.images_per_update} images"
    print(f"Aligning emoji-flow to {' + '.join(parts)} by {DEMO_RECIPES[reward].method}: {size}.", flush=True)
    with Bar() as bar:
        run = launch.start_run(config, bar.tick)
        follow(run, bar, quiet=True)
    files = run.folder
    print("Comparing with the base model on held-out prompts ...", flush=True)
    comparison = compare_with_base(config, files, seed=seed + 1)
    image = files.path / "before_after.png"
    save_comparison(comparison, image)
    print_comparison(comparison, config)
    print(f"time          {time.perf_counter() - start:.0f} s")
    print(f"before/after  {image.resolve()}")
    print(f"curves        {files.curves_file.resolve()}")
    print(f"kept update   {comparison.update}")
    print(f"LoRA          {files.lora_file.resolve()}")


def print_comparison(comparison: "Comparison", config: Config) -> None:
    """One line per task, then rewards, diversity and distance, before and after."""
    before, after = comparison.before, comparison.after
    count = f"{len(set(comparison.prompts))} prompts, {len(comparison.prompts)} images"
    print(f"TinyEval: correct images before -> after ({count})")
    for task, share in before.shares.items():
        change = after.shares[task] - share
        print(f"  {task:<24} {100 * share:6.0f} % -> {100 * after.shares[task]:3.0f} %   {100 * change:+.0f} points")
    for reward, value in before.rewards.items():
        if reward == "tiny_diversity":  # the diversity below, seen as a reward
            continue
        role = "held out" if reward in config.reward.held_out else "trained"
        print(f"  {reward:<24} {value:8.3f} -> {after.rewards[reward]:8.3f}   ({role})")
    for label, old, new, digits, better in (
        ("diversity", before.diversity, after.diversity, 3, "higher"),
        ("distance to drawings", before.distance, after.distance, 1, "lower"),
    ):
        print(f"  {label:<24} {old:8.{digits}f} -> {new:8.{digits}f}   {new / old:.2f} x ({better} is better)")


def read_config(tokens: list[str]) -> Config:
    """The configuration of `[FILE] --section.field value ...`, with notes on it on stderr."""
    path = Path(tokens.pop(0)) if tokens and not tokens[0].startswith("--") else None
    config, resolved = load_described(path, parse_overrides(tokens))
    if is_main_process():
        if resolved:
            print(resolved, file=sys.stderr)
        for note in (*without_effect(config), *unknown_words(config)):
            print(f"note: {note}", file=sys.stderr)
    return config
