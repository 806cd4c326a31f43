"""Any number of processes share a grid: cells resume, are run once and never reuse the result of another run."""

import contextlib
import dataclasses
import json
import math
import shutil
import tarfile

import pytest
import torch
from benchmark_grids import SETTING, TASK, fill, interrupted, reported, small, write

from benchmarks.report.collect import collect
from benchmarks.report.proportionality_page import health_table
from benchmarks.report.two_rewards_page import two_rewards_page
from benchmarks.speed import loop_speed
from benchmarks.study import cells, two_rewards
from benchmarks.study import evaluator as evaluating
from benchmarks.study import work as working
from benchmarks.study.archive import write_archive
from benchmarks.study.cell_config import cell_config, require_same
from benchmarks.study.evaluator import EVALUATION_SEED, Evaluation, make_evaluator
from benchmarks.study.files import source_checksum
from benchmarks.study.grid import Cell
from benchmarks.study.guarded import guard_outcome
from benchmarks.study.outcome import gain_within_limits
from benchmarks.study.recipes import STUDY_PROMPTS, STUDY_REWARDS
from benchmarks.study.studies import Rung
from benchmarks.study.tuning import read_result, tune
from benchmarks.study.work import if_free, progress, run_if_free, share, work
from comfyui_pcpo.tiny.tinyeval import HARD
from trainer.config.guard_section import GuardConfig
from trainer.config.loading import with_options
from trainer.config.schema import ConfigError
from trainer.evaluation.sampling import Draw, sample, sampling_policy
from trainer.loop.finite import Diverged
from trainer.loop.state import TrainingState
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

STUDY_EVALUATION = Evaluation(16, 16, 3, STUDY_PROMPTS)  # that of the small study


def timeless(result):
    """A result's evaluations without the time they took."""
    return [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in result["rows"]]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A complete small grid, run once."""
    out, said = tmp_path_factory.mktemp("grid"), []
    study = small()
    work(study, out, said.append)
    return study, out, said


def test_a_grid_leaves_one_result_per_cell_and_is_not_run_again(done):
    study, out, said = done
    assert len(said) == 2
    assert progress(study, out) == (2, 2)
    work(study, out, said.append)
    assert len(said) == 2


def test_a_cell_is_evaluated_before_and_at_every_interval_with_what_it_has_spent(done):
    study, out, _ = done
    for method in study.methods:
        (cell,) = reported(study, out, method=method)
        rows, records = read_result(cell, study, out)["rows"], RunFolder(cell.folder(out)).records()
        assert [row["update"] for row in rows] == [0, 1, 2]
        assert [row["images"] for row in rows] == [0, 2, 4]
        each = [sum(record["model_evaluations"].values()) for record in records]
        assert [row["model_evaluations"] for row in rows] == [0, each[0], sum(each)]
        assert 0 == rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"] < rows[2]["cpu_seconds"]
        assert all(set(row["tinyeval_shares"]) == {*HARD, "hard tasks"} for row in rows)


def test_tuning_runs_are_not_evaluated_on_tinyeval(tmp_path):
    study = small(updates=1, tuning=(Rung(100, 1),))
    cell = Cell(TASK, "ppo", SETTING, 100)
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    assert not any("tinyeval_shares" in row for row in read_result(cell, study, tmp_path)["rows"])


def test_a_guarded_run_goes_on_and_records_what_the_guard_keeps(tmp_path, monkeypatch):
    """Interrupted and continued, so that the guard is restored on the way."""
    study = small(guard={"every": 1, "action": "warn", "prompts": 2, "images": 2}, held_out=("polish",))
    cell = Cell(TASK, "ppo", SETTING, 0)
    interrupted(cell, study, tmp_path, monkeypatch)
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    result = read_result(cell, study, tmp_path)
    records = RunFolder(cell.folder(tmp_path)).records()
    rewards = [record["guard"]["reward"] for record in records]
    outcome = guard_outcome(records, GuardConfig(every=1, tolerance=1e6, diversity_tolerance=1.0))
    assert outcome.kept == 1 + rewards.index(max(rewards))
    assert outcome.model_evaluations == 3 * 4 * study.steps  # with the base model's images
    assert result["config"]["reward"]["held_out"] == ["polish"]


def test_methods_start_from_the_same_evaluation_that_of_the_base_model(tmp_path):
    study, first = small(updates=1), []
    for name in ("ppo", "pcpo"):
        evaluating._evaluators.clear()  # each evaluates the base model itself
        cell = Cell(TASK, name, SETTING, 0)
        assert run_if_free(cell, study, tmp_path, lambda text: None)
        first.append(read_result(cell, study, tmp_path)["rows"][0])
    assert first[0] == first[1]
    base_policy = sampling_policy(cell_config(cell, study, tmp_path), [])  # a model that never had a LoRA
    images = sample(base_policy, STUDY_PROMPTS, [], Draw(EVALUATION_SEED, study.steps, each=2))
    base = make_evaluator(base_policy, STUDY_EVALUATION, tmp_path / "reference").evaluate_images(images)
    assert {key: first[0][key] for key in base} == pytest.approx(base, rel=1e-3)


def test_the_base_evaluation_of_a_trained_policy_is_that_of_the_fresh_one(tmp_path):
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    fresh = make_evaluator(policy, STUDY_EVALUATION, tmp_path).evaluate_policy(policy)
    policy.load_lora({n: (a, b + 0.1) for n, (a, b) in policy.lora().items()})
    evaluator = make_evaluator(policy, STUDY_EVALUATION, tmp_path)
    assert evaluator.evaluate_policy(policy) != fresh
    assert evaluator.evaluate_base(policy) == fresh


def test_a_run_with_an_average_is_evaluated_with_it(tmp_path):
    """It is what the run delivers: the LoRA of its checkpoints."""
    study = small(methods=("nft-options",), steps=6, updates=3, evaluate_every=3)
    config = cell_config(Cell(TASK, "nft-options", SETTING, 0), study, tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    row = cells.run_evaluated(config, folder, study, tmp_path)[-1]
    policy = make_policy(config)
    evaluator = make_evaluator(policy, dataclasses.replace(STUDY_EVALUATION, steps=6), tmp_path / "reference")
    policy.load_lora(folder.lora("latest"))
    averaged = evaluator.evaluate_policy(policy)
    assert {key: row[key] for key in averaged} == averaged
    assert averaged != evaluator.evaluate_base(policy)


def test_a_cell_with_a_truncated_journal_restarts_from_the_base_model(done, tmp_path, monkeypatch):
    study, out, _ = done
    cell = Cell(TASK, "pcpo", SETTING, 0)
    folder = interrupted(cell, study, tmp_path, monkeypatch)
    assert folder.checkpoints.numbers() == [1]
    journal = folder.path / cells.JOURNAL
    journal.write_text(journal.read_text()[:-20])
    evaluating._evaluators.clear()
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    assert timeless(read_result(cell, study, tmp_path)) == timeless(read_result(cell, study, out))
    assert [record["update"] for record in folder.records()] == [1, 2]


def test_a_run_whose_gradient_overflows_ends_without_diversity(tmp_path, monkeypatch):
    def overflow(self, state, config):
        raise FloatingPointError("the gradient norm is inf in minibatch 1.")

    study, said = small(updates=4), []
    cell = Cell(TASK, "ppo", SETTING, 0)
    monkeypatch.setattr(RunFolder, "save", overflow)  # after the first update and its evaluation
    assert run_if_free(cell, study, tmp_path, said.append)
    assert "the gradient norm is inf" in said[0]
    rows = read_result(cell, study, tmp_path)["rows"]
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["diversity"] for row in rows[2:]] == [0, 0, 0]
    assert all(math.isnan(row["fd_base"]) and math.isnan(row["tinyeval_shares"]["counting"]) for row in rows[2:])
    assert "NaN" not in (cell.folder(tmp_path) / "result.json").read_text()
    assert [row.get("diverged", False) for row in rows] == [False, False, True, True, True]
    assert gain_within_limits(rows, TASK.reward) == pytest.approx(gain_within_limits(rows[:2], TASK.reward))


def test_a_run_whose_evaluated_images_are_not_finite_has_diverged(tmp_path, monkeypatch):
    def sampling(state, which):
        if which == "ema" and state.done == 2:  # in the evaluation after the last update
            state.policy.load_lora({name: (a, b + math.inf) for name, (a, b) in state.policy.lora().items()})
        return contextlib.nullcontext()

    study, said = small(), []
    cell = Cell(TASK, "ppo", SETTING, 0)
    monkeypatch.setattr(TrainingState, "sampling", sampling)
    assert run_if_free(cell, study, tmp_path, said.append)
    assert "evaluated images are NaN or infinite" in said[0]
    rows = read_result(cell, study, tmp_path)["rows"]
    assert [row.get("diverged", False) for row in rows] == [False, False, True]
    assert math.isfinite(tune(study, TASK, "ppo", tmp_path).planned + gain_within_limits(rows, TASK.reward))


def test_a_base_model_that_fails_is_no_diverged_run(tmp_path, monkeypatch):
    def fail(*_):
        raise Diverged("the latents are NaN.")

    monkeypatch.setattr(cells, "run_evaluated", fail)
    with pytest.raises(ConfigError, match=r"emoji-flow, before any update: the latents are NaN\. Check the model's"):
        run_if_free(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path, print)


def test_cells_run_with_one_thread_on_the_cpu(tmp_path, monkeypatch):
    class Started(Exception):
        pass

    def start(*_):
        raise Started

    monkeypatch.setattr(cells, "shared_evaluator", start)
    torch.set_num_threads(2)
    try:
        with pytest.raises(Started):
            run_if_free(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path, print)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    config = cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path)
    assert config.model.device == "cpu"
    require_same(with_options(config, {"model": {"device": "auto"}}), config, tmp_path)  # as in older results


CHANGED = {"images": 32, "reference_images": 32, "tinyeval_prompts": 2}


@pytest.mark.parametrize("name", CHANGED)
def test_a_result_of_another_evaluation_is_refused(name, tmp_path):
    study, cell = small(), Cell(TASK, "ppo", SETTING, 0)
    write(cell, study, tmp_path, 0.5)
    other = dataclasses.replace(study, **{name: CHANGED[name]})
    with pytest.raises(ConfigError, match=rf"another evaluation \({name} is \d+, requested {CHANGED[name]}\)"):
        read_result(cell, other, tmp_path)


def test_a_result_without_an_evaluation_is_of_the_present_one_and_tuning_runs_do_not_depend_on_tinyeval(tmp_path):
    study = small(tuning=(Rung(100),))
    reported_one, tuned = (Cell(TASK, "ppo", SETTING, seed) for seed in (0, 100))
    for cell in (reported_one, tuned):
        write(cell, study, tmp_path, 0.5)
    other = dataclasses.replace(study, tinyeval_prompts=2)
    assert read_result(tuned, other, tmp_path)
    file = reported_one.folder(tmp_path) / "result.json"
    result = json.loads(file.read_text())
    del result["evaluation"]
    file.write_text(json.dumps(result))
    assert read_result(reported_one, other, tmp_path)


def test_an_unfinished_cell_of_another_evaluation_is_not_continued(tmp_path, monkeypatch):
    study, cell = small(), Cell(TASK, "ppo", SETTING, 0)
    folder = interrupted(cell, study, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"another evaluation \(images is 16, requested 32\)"):
        run_if_free(cell, small(images=32), tmp_path, print)
    (folder.path / cells.EVALUATION_FILE).unlink()  # as an older run
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    result = json.loads((folder.path / "result.json").read_text())
    assert result["evaluation"]["rewards"] == list(STUDY_REWARDS) and result["sources"] == source_checksum()


def test_a_result_of_another_configuration_is_refused_with_the_difference(tmp_path):
    study = small()
    cell = Cell(TASK, "ppo", SETTING, 0)
    write(cell, study, tmp_path, 0.5)
    other = small(updates=3, group_size=4)
    with pytest.raises(ConfigError, match=r"rollout.group_size is 2, requested 4; run.updates is 2, .*--out"):
        read_result(cell, other, tmp_path)
    with pytest.raises(ConfigError, match=r"run\.updates"):
        run_if_free(cell, other, tmp_path, print)


def test_an_unfinished_cell_of_another_configuration_is_not_continued(tmp_path, monkeypatch):
    study = small()
    cell = Cell(TASK, "ppo", SETTING, 0)
    interrupted(cell, study, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"rollout\.steps is 3, requested 4"):
        run_if_free(cell, small(steps=4), tmp_path, print)


def test_a_process_skips_locked_cells_and_waits_for_the_last_of_them(tmp_path, monkeypatch):
    held, done = RunFolder(tmp_path / "a").locked(), []
    held.__enter__()
    monkeypatch.setattr(working.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    share(
        lambda: [name for name in "ab" if name not in done],
        lambda name: if_free(tmp_path / name, lambda: done.append(name)),
    )
    assert done == ["b", "a"]


def test_guidance_trains_other_mixes_while_one_is_locked_and_ends_when_all_exist(tmp_path, monkeypatch):
    study = small(updates=1)
    taken = two_rewards.run_folder(two_rewards.mix_config(two_rewards.mixes(study)[0], study, tmp_path)).locked()
    taken.__enter__()
    said, waits = [], []

    def sleep(seconds):
        waits.append(len(said))
        taken.__exit__(None, None, None)

    monkeypatch.setattr(working.time, "sleep", sleep)
    two_rewards.run_two_rewards(study, tmp_path, said.append)
    assert waits == [4]
    assert len(said) == 6
    front = json.loads((tmp_path / "guidance.json").read_text())
    assert len(front["rows"]) == 5 + 2 * 10
    (tmp_path / "images").mkdir()
    text = two_rewards_page(tmp_path, tmp_path / "images", "images")
    assert "| IRG | 2, 0 |" in text and "| IRG | 1, 0 |" not in text and "| trained on both | 0.5, 0.5 |" in text
    assert (tmp_path / "images" / "guidance.png").is_file()
    two_rewards.run_two_rewards(study, tmp_path, said.append)
    assert len(said) == 6
    assert not two_rewards.is_current(tmp_path / "guidance.json", small(updates=1, images=32), tmp_path)
    del front["made_with"]
    (tmp_path / "guidance.json").write_text(json.dumps(front))
    assert two_rewards.is_current(tmp_path / "guidance.json", study, tmp_path)


def test_a_composed_front_is_composed_again_for_another_lora_and_is_lost_where_a_run_diverged(tmp_path, monkeypatch):
    study, composed, ends = small(), [], [[{"update": 0, "right": 1.0, "diversity": 0.2}] for _ in range(2)]
    monkeypatch.setattr(two_rewards, "evaluated", lambda config, study: ends[config.reward.weights == {"polish": 1.0}])
    monkeypatch.setattr(two_rewards, "compose", lambda *_: composed.append(0) or [{"right": 0.5}])
    configs = two_rewards.end_configs(0, study, tmp_path)
    files = [two_rewards.run_folder(config).lora_file for config in configs]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"a LoRA")
    for count in (1, 1):
        two_rewards.compose_if_free(0, study, tmp_path)
        assert len(composed) == count
    files[1].write_bytes(b"another one")
    assert two_rewards.read_front(0, study, tmp_path) is None
    two_rewards.compose_if_free(0, study, tmp_path)
    assert len(composed) == 2 and two_rewards.read_front(0, study, tmp_path) == [{"right": 0.5}]
    assert two_rewards.read_front(0, small(images=32), tmp_path) is None
    ends[1].append({**ends[1][0], "diverged": True})
    files[1].unlink()
    two_rewards.compose_if_free(0, study, tmp_path)
    rows = two_rewards.read_front(0, study, tmp_path)
    assert len(composed) == 2 and len(rows) == 20
    assert all(row["diversity"] == 0 and math.isnan(row["right"]) for row in rows)


def test_a_mix_that_diverges_is_finished(tmp_path, monkeypatch):
    def overflow(self, state, config):
        raise FloatingPointError("the gradient norm is inf in minibatch 1.")

    monkeypatch.setattr(RunFolder, "save", overflow)
    study, said = small(), []
    mix = two_rewards.mixes(study)[0]
    assert two_rewards.train_if_free(mix, study, tmp_path, said.append)
    assert said[0] == "guidance, mix-1-0-seed0: the gradient norm is inf in minibatch 1."
    rows = two_rewards.evaluated(two_rewards.mix_config(mix, study, tmp_path), study)
    assert rows[-1]["diverged"] and math.isnan(rows[-1]["polish"])


def test_speed_is_measured_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_speed, "AXES", {"steps": (4,)})
    other, point = RunFolder(tmp_path / "speed").locked(), ("emoji-flow", "steps", 4)
    other.__enter__()

    def finish(seconds):  # the other process measures it while this one waits
        loop_speed.point_file(tmp_path / "speed", point).write_text("{}")
        other.__exit__(None, None, None)

    monkeypatch.setattr(working.time, "sleep", finish)
    said = []
    loop_speed.run_speed(tmp_path, said.append, ("emoji-flow",))
    assert said == []
    assert loop_speed.point_file(tmp_path / "speed", point).read_text() == "{}"


def test_an_archive_holds_what_is_finished_and_a_study_continues_from_it(done, tmp_path):
    study, out, _ = done
    file, again = tmp_path / "grid.tar.xz", tmp_path / "again.tar.xz"
    assert write_archive(study, out, file) == write_archive(study, out, again) == 2
    assert file.read_bytes() == again.read_bytes()
    shutil.unpack_archive(file, tmp_path)
    unpacked = tmp_path / out.name
    assert {path.name for path in unpacked.rglob("*") if path.is_file()} == {"result.json", "metrics.jsonl"}
    more = dataclasses.replace(study, later=("pcpo-branch-1",))
    assert progress(more, unpacked) == (2, 3)
    (cell,) = reported(study, unpacked, method="pcpo")
    assert read_result(cell, study, unpacked) == read_result(cell, study, out)
    with pytest.raises(ConfigError, match="has no finished runs"):
        write_archive(study, tmp_path / "nothing", file)


def test_an_archive_has_the_metrics_of_reported_runs_only_and_everything_that_is_measured_once(tmp_path):
    study, out = small(methods=("ppo",), tuning=(Rung(100),)), tmp_path / "out"
    fill(study, out, lambda cell: 0.5)
    once = ["guidance.json", "peers.json", "speed/a-point.json", "speed/commit.txt"]
    for name in (*once, "guidance/front-seed0/rows.json", "reference/features.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("[]")
    cell = "cells/flow-grpo/colorfulness/ppo/lr0.006-kl0-seed"
    files = [f"{cell}0/metrics.jsonl", f"{cell}0/result.json", f"{cell}100/result.json", *once]
    assert write_archive(study, out, tmp_path / "a.tar.xz") == 2
    with tarfile.open(tmp_path / "a.tar.xz") as tar:
        assert sorted(tar.getnames()) == sorted(f"out/{name}" for name in files)
    (out / "peers.json").chmod(0o600)
    write_archive(study, out, tmp_path / "b.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()


def test_a_run_that_overflowed_in_its_first_update_is_archived_and_reported(tmp_path):
    study = small(tasks=(("flow-grpo", "colorfulness"),), methods=("native", "uniform"), seeds=(0, 1, 2))
    fill(study, tmp_path / "out", lambda cell: 0.5)
    cells_of = reported(study, tmp_path / "out", method="uniform")
    for cell in cells_of:
        (cell.folder(tmp_path / "out") / "metrics.jsonl").unlink()
    assert write_archive(study, tmp_path / "out", tmp_path / "a.tar.xz") == 6
    (task,) = collect("proportionality", study, tmp_path / "out").tasks
    assert "| uniform | - | - |" in health_table(task)


def test_an_interrupted_cell_ends_like_an_uninterrupted_one(done, tmp_path, monkeypatch):
    study, out, _ = done
    cell = Cell(TASK, "pcpo", SETTING, 0)
    journal = interrupted(cell, study, tmp_path, monkeypatch).path / cells.JOURNAL
    rows = json.loads(journal.read_text())
    rows[-1]["cpu_seconds"] += 1000  # more than the second update takes
    journal.write_text(json.dumps(rows))
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    result = read_result(cell, study, tmp_path)
    assert timeless(result) == timeless(read_result(cell, study, out))
    assert result["rows"][-1]["cpu_seconds"] > rows[-1]["cpu_seconds"]


WORKER = """
import sys, dataclasses
from pathlib import Path
import torch
torch.set_num_threads(1)
from benchmarks.study.studies import STUDIES
from benchmarks.study.work import work
import benchmarks.study.work
benchmarks.study.work.WAIT = 0.1
study = dataclasses.replace(STUDIES["quick"], methods=("ppo", "pcpo", "pcpo-branch-1"), seeds=(0, 1),
    tasks=(("flow-grpo", "colorfulness"),), group_size=2, prompts_per_update=1, steps=2, updates=1, evaluate_every=1,
    images=16, reference_images=16, tinyeval_prompts=1)
work(study, Path(sys.argv[1]), lambda text: print(text, flush=True))
"""


def test_two_processes_share_a_grid_and_run_each_cell_once(script, tmp_path):
    workers = [script(WORKER, tmp_path) for _ in range(2)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    lines = [line.split(":")[0] for text, _ in outputs for line in text.splitlines()]
    assert len(lines) == len(set(lines)) == 6
