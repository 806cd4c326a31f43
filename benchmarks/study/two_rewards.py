"""Two rewards at inference: implicit reward guidance (IRG), summed LoRA weights, and training on both rewards."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from comfyui_pcpo.method.guidance import ImplicitReward
from trainer.config.loading import build
from trainer.config.schema import Config
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy
from trainer.evaluation.source import read_pairs
from trainer.files import digest_of
from trainer.loop.finite import Diverged
from trainer.policy.base import LoraPairs
from trainer.runs.rows import finite

from .cell_config import cell_config, evaluation_identity, identity, require_same, require_same_evaluation
from .cells import EVALUATION_FILE, Say, lost, rows_to_the_end, run_folder
from .evaluator import EVALUATION_SEED, make_evaluator, study_evaluation
from .files import commit, read_json, source_checksum, with_nan, write_json
from .grid import Cell, StudyTask
from .methods import OURS
from .outcome import Row
from .recipes import STUDY_PROMPTS
from .studies import Setting, Study
from .work import if_free, share

Weights = tuple[float, float]

FIRST, SECOND = "colorfulness", "polish"
RECIPE = "flow-grpo"
MIXES: tuple[Weights, ...] = ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
DOUBLE = tuple((2 * first, 2 * second) for first, second in MIXES)  # at inference only; training ignores the scale
WAYS = ("irg", "sum")  # of composing two LoRAs at inference
SEEDS = 3  # of the study's reported seeds
SETTING = Setting(3e-3)  # the trainer's default for the embedded models, the same for all mixes


@dataclass(frozen=True)
class Mix:
    """One run of PCPO on a weighted pair of rewards."""

    weights: Weights
    seed: int


def mixes(study: Study) -> list[Mix]:
    """Mixes ordered by seed, so that an interrupted experiment has complete fronts."""
    return [Mix(weights, seed) for seed in study.seeds[:SEEDS] for weights in MIXES]


def run_two_rewards(study: Study, out: Path, say: Say) -> None:
    """Train on each reward and on mixes of both, compose the two LoRAs, evaluate everything, -> guidance.json."""
    file = out / "guidance.json"
    if is_current(file, study, out):
        return
    share(
        lambda: [mix for mix in mixes(study) if evaluated(mix_config(mix, study, out), study) is None],
        lambda mix: train_if_free(mix, study, out, say),
    )
    share(
        lambda: [seed for seed in study.seeds[:SEEDS] if read_front(seed, study, out) is None],
        lambda seed: compose_if_free(seed, study, out),
    )
    share(
        lambda: [] if is_current(file, study, out) else [file],
        lambda f: if_free(out / "guidance", lambda: write_front(f, study, out, say)),
    )


def made_with(study: Study, out: Path) -> Row:
    """What guidance.json depends on; its runs differ in weights and seed only."""
    every = mixes(study)
    return {
        "config": identity(mix_config(every[0], study, out)),
        "mixes": [[*mix.weights, mix.seed] for mix in every],
        "evaluation": evaluation_identity(study, False),
    }


def is_current(file: Path, study: Study, out: Path) -> bool:
    """Whether guidance.json was made with the study's settings; one of an older version has no entry of them."""
    front = read_json(file, None)
    if front is None or "made_with" not in front:
        return front is not None
    config = identity(build(front["made_with"]["config"], str(file)))
    return {**front["made_with"], "config": config} == made_with(study, out)


def front_file(seed: int, out: Path) -> Path:
    return out / "guidance" / f"front-seed{seed}" / "rows.json"


def end_configs(seed: int, study: Study, out: Path) -> list[Config]:
    """The configurations of the two runs on one reward each."""
    return [mix_config(Mix(weights, seed), study, out) for weights in (MIXES[0], MIXES[-1])]


def composed_of(seed: int, study: Study, out: Path) -> Row:
    """What one seed's composed front depends on."""
    ends = end_configs(seed, study, out)
    files = [run_folder(config).lora_file for config in ends]
    return {
        "configs": list(map(identity, ends)),
        "loras": [digest_of(file)["sha256"] if file.is_file() else None for file in files],
        "evaluation": evaluation_identity(study, False),
    }


def read_front(seed: int, study: Study, out: Path) -> list[Row] | None:
    """One seed's composed front; None if it is missing or made of other runs."""
    front = read_json(front_file(seed, out), None)
    if not isinstance(front, dict) or front["made_with"] != composed_of(seed, study, out):  # once it was a list
        return None
    return with_nan(front["rows"])


def compose_if_free(seed: int, study: Study, out: Path) -> bool:
    """Compose one seed's two LoRAs unless another process does, -> whether this process had the lock."""
    file = front_file(seed, out)

    def job() -> None:
        if read_front(seed, study, out) is None:
            rows = composed_front(end_configs(seed, study, out), study, out)
            write_json(file, {"made_with": composed_of(seed, study, out), "rows": finite(rows)})

    return if_free(file.parent, job)


def composed_front(ends: list[Config], study: Study, out: Path) -> list[Row]:
    """The points of one seed's composed front; all are lost where one of its runs diverged."""
    runs = [evaluated(config, study) or [] for config in ends]
    if any(rows[-1].get("diverged") for rows in runs):
        before = runs[0][0]
        return [{"way": way, "weights": weights, **lost(before)} for weights in (*MIXES, *DOUBLE) for way in WAYS]
    return compose(ends[0], [run_folder(config).lora_file for config in ends], study, out)


def write_front(file: Path, study: Study, out: Path, say: Say) -> None:
    """Write every point of the front, unless another process has done so in the meantime."""
    if is_current(file, study, out):
        return
    before, rows = None, []
    for mix in mixes(study):
        trained = evaluated(mix_config(mix, study, out), study) or []
        before = before or trained[0]
        rows.append({"way": "both", "weights": mix.weights, "seed": mix.seed, **trained[-1]})
    for seed in study.seeds[:SEEDS]:
        rows += [{"seed": seed, **row} for row in read_front(seed, study, out) or []]
    about = {"rewards": [FIRST, SECOND], "setting": asdict(SETTING), "commit": commit(), "sources": source_checksum()}
    write_json(file, {"before": before, "rows": finite(rows), **about, "made_with": made_with(study, out)})
    say(f"guidance: {len(rows)} points of the front written to {file}")


def evaluated(config: Config, study: Study) -> list[Row] | None:
    """Evaluations of a finished mix, None if it is not finished. Raises ConfigError if they belong to another run."""
    folder = run_folder(config)
    rows = read_json(folder.path / "rows.json", None)
    if rows is None:
        return None
    require_same(folder.config(), config, folder.path)
    evaluation = read_json(folder.path / EVALUATION_FILE, None)
    require_same_evaluation(evaluation, evaluation_identity(study, False), folder.path)
    return with_nan(rows)


def train_if_free(mix: Mix, study: Study, out: Path, say: Say) -> bool:
    """Train PCPO on a mix unless another process does, -> whether this process had the lock."""
    config = mix_config(mix, study, out)
    folder = run_folder(config)

    def job() -> None:
        if evaluated(config, study) is None:
            rows = rows_to_the_end(config, study, out, lambda why: say(f"guidance, {config.run.name}: {why}"))
            write_json(folder.path / "rows.json", finite(rows))
            say(f"guidance: trained on {mix.weights[0]:g} {FIRST} + {mix.weights[1]:g} {SECOND}, seed {mix.seed}")

    return if_free(folder.path, job)


def mix_config(mix: Mix, study: Study, out: Path) -> Config:
    cell = Cell(StudyTask(RECIPE, FIRST), OURS, SETTING, mix.seed)
    config = cell_config(cell, study, out)
    weights = {name: weight for name, weight in zip((FIRST, SECOND), mix.weights, strict=True) if weight}
    name = f"mix-{mix.weights[0]:g}-{mix.weights[1]:g}-seed{mix.seed}"
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"weights": weights}),
            "run": config.run.model_copy(update={"folder": out / "guidance", "name": name}),
        }
    )


def summed(loras: list[LoraPairs], weights: Weights) -> LoraPairs:
    """One LoRA equal to the weighted sum of several: their factors are concatenated along the rank."""
    return {
        name: (
            torch.cat([pairs[name][0] for pairs in loras]),
            torch.cat([w * pairs[name][1] for pairs, w in zip(loras, weights, strict=True)], 1),
        )
        for name in loras[0]
    }


def compose(config: Config, files: list[Path], study: Study, out: Path) -> list[Row]:
    """Evaluate both LoRAs composed at every mix and at double weights, by guidance and by summed weights."""
    torch.set_num_threads(1)
    policy = sampling_policy(config, [])
    loras = [read_pairs(file, policy.module_names()) for file in files]
    evaluation = study_evaluation(study, STUDY_PROMPTS)
    evaluator = make_evaluator(policy, evaluation, out / "reference")
    draw = Draw(EVALUATION_SEED, study.steps, each=evaluation.per_prompt)
    rows = []
    for weights in (*MIXES, *DOUBLE):
        for way in WAYS:
            guides = guides_of(loras, weights, way)
            images = sample(sampling_policy(config, [guide.pairs for guide in guides]), STUDY_PROMPTS, guides, draw)
            try:
                row = evaluator.evaluate_images(images)
            except Diverged:
                row = lost(evaluator.evaluate_base(policy))
            rows.append({"way": way, "weights": weights, **row})
    return rows


def guides_of(loras: list[LoraPairs], weights: Weights, way: str) -> list[Guide]:
    """Two LoRAs combined at these weights in one of the WAYS."""
    if way == "sum":
        return [Guide(summed(loras, weights), ImplicitReward(1.0))]
    return [Guide(pairs, ImplicitReward(weight)) for pairs, weight in zip(loras, weights, strict=True)]
