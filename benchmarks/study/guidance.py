"""Two rewards at inference: implicit reward guidance against summing LoRA weights and against training on both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.plotting.panels import Line, LineStyle, Panel, draw_panels
from trainer.config.schema import Config, ConfigError
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy
from trainer.evaluation.source import read_pairs
from trainer.policy.base import LoraPairs
from trainer.runs.folder import RunFolder

from ..report.tables import limits, table
from .cells import Say, commit, read_json, run_examined, write_json
from .grid import Cell, Task, cell_config, gain, require_same
from .measure import EXAM, make_evaluator
from .methods import CONTENDERS, OURS, PROMPTS, RECIPES, Form, Setting
from .statistics import spread
from .work import if_free, share

Weights = tuple[float, float]
Row = dict[str, Any]

FIRST, SECOND = "colorfulness", "polish"
RECIPE = "flow-grpo"
MIXES: tuple[Weights, ...] = ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
DOUBLE = tuple((2 * first, 2 * second) for first, second in MIXES)  # composed only: what is trained is trained whole
TITLES = {"irg": "IRG", "sum": "LoRA weights summed", "both": "trained on both"}
SEEDS = 3  # of the form's reported seeds


@dataclass(frozen=True)
class Mix:
    """One run of PCPO on a weighted pair of rewards."""

    weights: Weights
    seed: int


def mixes(form: Form) -> list[Mix]:
    """Seed after seed, so that what was stopped has whole fronts."""
    return [Mix(weights, seed) for seed in form.seeds[:SEEDS] for weights in MIXES]


def run(form: Form, out: Path, say: Say) -> None:
    """Train on each reward and on mixes of both, compose the two, examine everything: guidance.json."""
    file = out / "guidance.json"
    if file.is_file():
        return
    share(
        lambda: [mix for mix in mixes(form) if examined(mix_config(mix, form, out)) is None],
        lambda mix: train_if_free(mix, form, out, say),
    )
    share(
        lambda: [seed for seed in form.seeds[:SEEDS] if not front_file(seed, out).is_file()],
        lambda seed: compose_if_free(seed, form, out),
    )
    share(
        lambda: [] if file.is_file() else [file], lambda f: if_free(out / "guidance", lambda: join(f, form, out, say))
    )


def front_file(seed: int, out: Path) -> Path:
    return out / "guidance" / f"front-seed{seed}" / "rows.json"


def compose_if_free(seed: int, form: Form, out: Path) -> bool:
    """Compose one seed's two LoRAs; whether this process did it."""
    ends = [mix_config(Mix(weights, seed), form, out) for weights in (MIXES[0], MIXES[-1])]
    file = front_file(seed, out)

    def job() -> None:
        if not file.is_file():
            write_json(file, compose(ends[0], [folder_of(config).lora_file for config in ends], form, out))

    return if_free(file.parent, job)


def join(file: Path, form: Form, out: Path, say: Say) -> None:
    """Write every point of the front, unless another process did in the meantime."""
    if file.is_file():
        return
    before, rows = None, []
    for mix in mixes(form):
        trained = examined(mix_config(mix, form, out)) or []
        before = before or trained[0]
        rows.append({"way": "both", "weights": mix.weights, "seed": mix.seed, **trained[-1]})
    for seed in form.seeds[:SEEDS]:
        rows += [{"seed": seed, **row} for row in read_json(front_file(seed, out), [])]
    what = {"rewards": [FIRST, SECOND], "setting": mix_setting(form), "commit": commit()}
    write_json(file, {"before": before, "rows": rows, **what})
    say(f"guidance: {len(rows)} points of the front in {file}")


def folder_of(config: Config) -> RunFolder:
    return RunFolder(config.run.folder / config.run.name)


def examined(config: Config) -> list[Row] | None:
    """The examinations of a finished mix, None while it is not. Raises ConfigError where it was another run."""
    folder = folder_of(config)
    rows = read_json(folder.path / "rows.json", None)
    if rows is not None:
        require_same(folder.config(), config, folder.path)
    return rows


def train_if_free(mix: Mix, form: Form, out: Path, say: Say) -> bool:
    """PCPO on a weighted pair of rewards; whether this process did it."""
    config = mix_config(mix, form, out)
    folder = folder_of(config)

    def job() -> None:
        if examined(config) is None:
            write_json(folder.path / "rows.json", run_examined(config, folder, form, out))
            say(f"guidance: trained on {mix.weights[0]:g} {FIRST} + {mix.weights[1]:g} {SECOND}, seed {mix.seed}")

    return if_free(folder.path, job)


def mix_setting(form: Form) -> Setting:
    """One setting for all mixes: the one that all contenders are compared at, else the first of the sweep."""
    return form.common.get(RECIPE) or form.sweep[RECIPES[RECIPE].kind][0]


def mix_config(mix: Mix, form: Form, out: Path) -> Config:
    cell = Cell(Task(RECIPE, FIRST), OURS, *mix_setting(form), mix.seed)
    config = cell_config(cell, form, out)
    weights = {name: weight for name, weight in zip((FIRST, SECOND), mix.weights, strict=True) if weight}
    name = f"mix-{mix.weights[0]:g}-{mix.weights[1]:g}-seed{mix.seed}"
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"weights": weights}),
            "run": config.run.model_copy(update={"folder": out / "guidance", "name": name}),
        }
    )


def summed(loras: list[LoraPairs], weights: Weights) -> LoraPairs:
    """One LoRA whose change is the weighted sum of the others': their factors side by side."""
    return {
        name: (
            torch.cat([pairs[name][0] for pairs in loras]),
            torch.cat([w * pairs[name][1] for pairs, w in zip(loras, weights, strict=True)], 1),
        )
        for name in loras[0]
    }


def compose(config: Config, files: list[Path], form: Form, out: Path) -> list[Row]:
    """Every mix and what lies beyond, by guidance and by weights, on the examination's noise."""
    policy = sampling_policy(config, [])
    loras = [read_pairs(file, policy.module_names()) for file in files]
    examiner = make_evaluator(policy, form, out / "reference")
    rows = []
    for weights in (*MIXES, *DOUBLE):
        guides = [Guide(pairs, ImplicitReward(w)) for pairs, w in zip(loras, weights, strict=True)]
        ways = {"irg": guides, "sum": [Guide(summed(loras, weights), ImplicitReward(1.0))]}
        for way, wanted in ways.items():
            room = sampling_policy(config, [guide.pairs for guide in wanted])
            images = sample(room, PROMPTS, wanted, Draw(EXAM, form.steps, each=form.each))
            rows.append({"way": way, "weights": weights, **examiner.judge(images)})
    return rows


def asked(row: Row, before: Row) -> float:
    """What the weights asked for: the weighted mean of both gains."""
    gains = [gain(row, before, reward) for reward in (FIRST, SECOND)]
    return sum(w * g for w, g in zip(row["weights"], gains, strict=True)) / sum(row["weights"])


def points(rows: list[Row], way: str) -> dict[Weights, list[Row]]:
    """A way's rows by weights, one for each seed."""
    found: dict[Weights, list[Row]] = {}
    for row in rows:
        if row["way"] == way:
            first, second = row["weights"]
            found.setdefault((first, second), []).append(row)
    return found


def front(found: Row) -> Image.Image:
    """Reward A against reward B along each way of mixing them, and the price; means over seeds."""
    before, lines, prices = found["before"], [], []
    looks: tuple[tuple[str, tuple[Weights, ...], str, LineStyle], ...] = (
        ("both", MIXES, "", "points"),
        ("irg", MIXES, "", "points"),
        ("sum", MIXES, "", "points"),
        ("irg", DOUBLE, ", double weights", "dashed"),
        ("sum", DOUBLE, ", double weights", "dashed"),
    )
    for way, weights, more, style in looks:
        groups = [rows for w, rows in points(found["rows"], way).items() if w in weights]
        color, title = list(TITLES).index(way), TITLES[way] + more
        x, y, kept = (
            [float(np.mean([of(row) for row in rows])) for rows in groups]
            for of in (
                lambda row: gain(row, before, FIRST),
                lambda row: gain(row, before, SECOND),
                lambda row: row["object"],
            )
        )
        lines.append(Line(title, x, y, style=style, color=color))
        prices.append(Line(title, [w[0] / sum(w) for w in weights], kept, style=style, color=color))
    seeds = f"{len({row['seed'] for row in found['rows']})} seeds, means"
    return draw_panels(
        [
            Panel("Front of two rewards", f"gain in {FIRST}, std", f"gain in {SECOND}, std", lines, note=seeds),
            Panel("Right object", f"share of {FIRST}", "share of pictures", prices, hlines=(before["object"],)),
        ],
        size=(560, 420),
    )


def report(out: Path, pictures: Path, where: str) -> str:
    """The front as a picture and a table; empty where it was not run. Raises ConfigError for another experiment's."""
    file = out / "guidance.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("rewards") != [FIRST, SECOND]:
        raise ConfigError(
            f"{file} is not about {FIRST} and {SECOND}. Remove it and {out / 'guidance'}; it is run again."
        )
    front(found).save(pictures / "guidance.png")
    before, rows = found["before"], []
    for way, title in TITLES.items():
        for weights, group in points(found["rows"], way).items():
            if way != "both" and weights in (MIXES[0], MIXES[-1]):
                continue  # one LoRA at its full strength, which is the run trained on one reward
            gains = [limits(spread([gain(row, before, name) for row in group])) for name in (FIRST, SECOND)]
            whole = limits(spread([asked(row, before) for row in group]))
            rest = [
                limits(spread([row[key] for row in group]), digits)
                for key, digits in (("object", 3), ("alignment", 3), ("fd_base", 0), ("diversity", 3))
            ]
            rows.append([title, "{:g}, {:g}".format(*weights), *gains, whole, *rest])
    head = ["", "weights", f"gain in {FIRST}", f"gain in {SECOND}", "weighted mean", "right object", "alignment"]
    rate, clip = found["setting"]
    how = f"{RECIPES[RECIPE].title}; learning rate {rate:g}, clip range {clip:g}"
    seeds = len({row["seed"] for row in found["rows"]})
    intro = f"""Two LoRAs by {CONTENDERS[OURS].title} ({how}) are composed; others are trained on both rewards at
once, which is a whole training whatever the weights, so compare fronts, not rows. IRG asks the model once more for each
LoRA at every step; summed weights and a LoRA trained on both cost nothing. {seeds} seeds, brackets
are their range. At commit {found["commit"]}."""
    return f"## Two rewards at once\n\n{intro}\n\n![Front]({where}/guidance.png)\n\n" + table(
        [*head, "FD to base", "diversity"], rows
    )
