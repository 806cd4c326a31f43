"""Two rewards at inference: implicit reward guidance against summing LoRA weights and against training on both."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from comfyui_pcpo.figure import Line, Panel, figure
from comfyui_pcpo.guidance import ImplicitReward
from trainer.config import Config
from trainer.policy import LoraPairs
from trainer.run import RunFolder
from trainer.sampling import Draw, Guide, sample, sampling_policy
from trainer.source import read_pairs

from .cell import Say, commit, read_json, run_examined, write_json
from .contenders import CONTENDERS, OURS, PROMPTS, RECIPES, Form
from .grid import Cell, Task, cell_config, choose, require_same
from .measure import EXAM, make_examiner
from .tables import number, table
from .work import if_free, share

FIRST, SECOND = "colorfulness", "jpeg_compressibility"
RECIPE = "flow-grpo"
MIXES = ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
TITLES = {"irg": "IRG", "sum": "LoRA weights summed", "both": "trained on both"}


def run(form: Form, out: Path, say: Say) -> None:
    """Train on each reward and on mixes of both, compose the two, examine everything: guidance.json."""
    file = out / "guidance.json"
    if file.is_file():
        return
    share(
        lambda: [mix for mix in MIXES if examined(mix_config(mix, form, out)) is None],
        lambda mix: train_if_free(mix, form, out, say),
    )
    share(
        lambda: [] if file.is_file() else [file], lambda f: if_free(out / "guidance", lambda: join(f, form, out, say))
    )


def join(file: Path, form: Form, out: Path, say: Say) -> None:
    """Write every point of the front, unless another process did in the meantime."""
    if file.is_file():
        return
    configs = [mix_config(mix, form, out) for mix in MIXES]
    trained = [examined(config) or [] for config in configs]
    rows = [{"way": "both", "weights": mix, **found[-1]} for mix, found in zip(MIXES, trained, strict=True)]
    rows += compose(configs[0], [folder_of(config).lora_file for config in (configs[0], configs[-1])], form, out)
    write_json(file, {"before": trained[0][0], "rows": rows, "commit": commit()})
    say(f"guidance: {len(rows)} points of the front in {file}")


def folder_of(config: Config) -> RunFolder:
    return RunFolder(config.run.folder / config.run.name)


def examined(config: Config) -> list[dict[str, Any]] | None:
    """The examinations of a finished mix, None while it is not. Raises ConfigError where it was another run."""
    folder = folder_of(config)
    rows = read_json(folder.path / "rows.json", None)
    if rows is not None:
        require_same(folder.config(), config, folder.path)
    return rows


def train_if_free(mix: tuple[float, float], form: Form, out: Path, say: Say) -> bool:
    """PCPO on a weighted pair of rewards, at the setting that the convergence part chose if it is there."""
    config = mix_config(mix, form, out)
    folder = folder_of(config)

    def job() -> None:
        if examined(config) is None:
            write_json(folder.path / "rows.json", run_examined(config, folder, form, out))
            say(f"guidance: trained on {mix[0]:g} {FIRST} + {mix[1]:g} {SECOND}")

    return if_free(folder.path, job)


def mix_config(mix: tuple[float, float], form: Form, out: Path) -> Config:
    chosen = (
        choose(form, Task(RECIPE, FIRST), out) if Task(RECIPE, FIRST) in map(lambda t: Task(*t), form.tasks) else None
    )
    setting = (chosen or {}).get(OURS, (form.learning_rates[len(form.learning_rates) // 2], form.clip_ranges[-1]))
    config = cell_config(Cell(Task(RECIPE, FIRST), OURS, *setting, form.seeds[0]), form, out)
    weights = {name: weight for name, weight in zip((FIRST, SECOND), mix, strict=True) if weight}
    place = {"folder": out / "guidance", "name": f"mix-{mix[0]:g}-{mix[1]:g}"}
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"weights": weights}),
            "run": config.run.model_copy(update=place),
        }
    )


def summed(loras: list[LoraPairs], weights: tuple[float, float]) -> LoraPairs:
    """One LoRA whose change is the weighted sum of the others': their factors side by side."""
    return {
        name: (
            torch.cat([pairs[name][0] for pairs in loras]),
            torch.cat([w * pairs[name][1] for pairs, w in zip(loras, weights, strict=True)], 1),
        )
        for name in loras[0]
    }


def compose(config: Config, files: list[Path], form: Form, out: Path) -> list[dict[str, Any]]:
    """Every mix and the sum of both, by guidance and by weights, on the examination's noise."""
    policy = sampling_policy(config, [])
    loras = [read_pairs(file, policy.module_names()) for file in files]
    examiner = make_examiner(policy, form, out / "reference")
    rows = []
    for weights in (*MIXES, (1.0, 1.0)):
        guides = [Guide(pairs, ImplicitReward(w)) for pairs, w in zip(loras, weights, strict=True)]
        ways = {"irg": guides, "sum": [Guide(summed(loras, weights), ImplicitReward(1.0))]}
        for way, wanted in ways.items():
            room = sampling_policy(config, [guide.pairs for guide in wanted])
            images = sample(room, PROMPTS, wanted, Draw(EXAM, form.steps, each=form.each))
            rows.append({"way": way, "weights": weights, **examiner.judge(images)})
    return rows


def gain(row: dict[str, Any], before: dict[str, Any], reward: str) -> float:
    return (row[reward] - before[reward]) / before[f"{reward}_std"]


def front(found: dict[str, Any]) -> Image.Image:
    """Reward A against reward B along each way of mixing them."""
    lines, losses = [], []
    for color, (way, title) in enumerate(TITLES.items()):
        rows = [row for row in found["rows"] if row["way"] == way and sum(row["weights"]) == 1]
        x, y = ([gain(row, found["before"], name) for row in rows] for name in (FIRST, SECOND))
        lines.append(Line(title, x, y, style="points", color=color))
        losses.append(Line(title, [row["weights"][0] for row in rows], [r["alignment"] for r in rows], style="points"))
    return figure(
        [
            Panel("Front of two rewards", f"gain in {FIRST}, std", f"gain in {SECOND}, std", lines),
            Panel("Alignment with the prompt", f"weight of {FIRST}", "cosine", losses),
        ],
        size=(560, 420),
    )


def report(out: Path, pictures: Path, where: str) -> str:
    """The front as a picture and a table; empty where it was not run."""
    file = out / "guidance.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    front(found).save(pictures / "guidance.png")
    rows = []
    for row in found["rows"]:
        gains = [number(gain(row, found["before"], name)) for name in (FIRST, SECOND)]
        rest = [number(row["alignment"], 3), number(row["fd_base"], 0), number(row["diversity"], 3)]
        rows.append([TITLES[row["way"]], "{:g}, {:g}".format(*row["weights"]), *gains, *rest])
    head = ["", "weights", f"gain in {FIRST}", f"gain in {SECOND}", "alignment", "FD to base", "diversity"]
    intro = f"Two LoRAs by {CONTENDERS[OURS].title} ({RECIPES[RECIPE].title}), one seed, at commit {found['commit']}."
    return f"## Two rewards at once\n\n{intro}\n\n![Front]({where}/guidance.png)\n\n{table(head, rows)}"
