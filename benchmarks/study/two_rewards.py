"""Two rewards at inference: implicit reward guidance (IRG), summed LoRA weights, and training on both rewards."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from comfyui_pcpo.method.guidance import ImplicitReward
from trainer.config.schema import Config
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy
from trainer.evaluation.source import read_pairs
from trainer.policy.base import LoraPairs
from trainer.runs.folder import RunFolder

from .cell_config import cell_config, require_same
from .cells import Say, run_evaluated
from .evaluator import EVALUATION_SEED, make_evaluator, study_evaluation
from .files import commit, read_json, write_json
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
    if file.is_file():
        return
    share(
        lambda: [mix for mix in mixes(study) if evaluated(mix_config(mix, study, out)) is None],
        lambda mix: train_if_free(mix, study, out, say),
    )
    share(
        lambda: [seed for seed in study.seeds[:SEEDS] if not front_file(seed, out).is_file()],
        lambda seed: compose_if_free(seed, study, out),
    )
    share(
        lambda: [] if file.is_file() else [file],
        lambda f: if_free(out / "guidance", lambda: write_front(f, study, out, say)),
    )


def front_file(seed: int, out: Path) -> Path:
    return out / "guidance" / f"front-seed{seed}" / "rows.json"


def compose_if_free(seed: int, study: Study, out: Path) -> bool:
    """Compose one seed's two LoRAs unless another process does, -> whether this process had the lock."""
    ends = [mix_config(Mix(weights, seed), study, out) for weights in (MIXES[0], MIXES[-1])]
    file = front_file(seed, out)

    def job() -> None:
        if not file.is_file():
            write_json(file, compose(ends[0], [run_folder(config).lora_file for config in ends], study, out))

    return if_free(file.parent, job)


def write_front(file: Path, study: Study, out: Path, say: Say) -> None:
    """Write every point of the front, unless another process has done so in the meantime."""
    if file.is_file():
        return
    before, rows = None, []
    for mix in mixes(study):
        trained = evaluated(mix_config(mix, study, out)) or []
        before = before or trained[0]
        rows.append({"way": "both", "weights": mix.weights, "seed": mix.seed, **trained[-1]})
    for seed in study.seeds[:SEEDS]:
        rows += [{"seed": seed, **row} for row in read_json(front_file(seed, out), [])]
    about = {"rewards": [FIRST, SECOND], "setting": asdict(SETTING), "commit": commit()}
    write_json(file, {"before": before, "rows": rows, **about})
    say(f"guidance: {len(rows)} points of the front written to {file}")


def run_folder(config: Config) -> RunFolder:
    return RunFolder(config.run.folder / config.run.name)


def evaluated(config: Config) -> list[Row] | None:
    """Evaluations of a finished mix, None if it is not finished. Raises ConfigError if they belong to another run."""
    folder = run_folder(config)
    rows = read_json(folder.path / "rows.json", None)
    if rows is not None:
        require_same(folder.config(), config, folder.path)
    return rows


def train_if_free(mix: Mix, study: Study, out: Path, say: Say) -> bool:
    """Train PCPO on a mix unless another process does, -> whether this process had the lock."""
    config = mix_config(mix, study, out)
    folder = run_folder(config)

    def job() -> None:
        if evaluated(config) is None:
            write_json(folder.path / "rows.json", run_evaluated(config, folder, study, out))
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
    policy = sampling_policy(config, [])
    loras = [read_pairs(file, policy.module_names()) for file in files]
    evaluation = study_evaluation(study, STUDY_PROMPTS)
    evaluator = make_evaluator(policy, evaluation, out / "reference")
    draw = Draw(EVALUATION_SEED, study.steps, each=evaluation.per_prompt)
    rows = []
    for weights in (*MIXES, *DOUBLE):
        guides = [Guide(pairs, ImplicitReward(w)) for pairs, w in zip(loras, weights, strict=True)]
        ways = {"irg": guides, "sum": [Guide(summed(loras, weights), ImplicitReward(1.0))]}
        for way, composed in ways.items():
            composed_policy = sampling_policy(config, [guide.pairs for guide in composed])
            images = sample(composed_policy, STUDY_PROMPTS, composed, draw)
            rows.append({"way": way, "weights": weights, **evaluator.evaluate_images(images)})
    return rows
