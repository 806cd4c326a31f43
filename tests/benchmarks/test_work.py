"""Any number of processes share a grid: cells resume, are run once and never reuse the result of another run."""

import dataclasses
import json
import shutil

import pytest
from benchmark_grids import SETTING, TASK, fill, interrupted, reported, small, write

from benchmarks.report.collect import collect
from benchmarks.report.proportionality_page import health_table
from benchmarks.report.two_rewards_page import two_rewards_page
from benchmarks.speed import loop_speed
from benchmarks.study import cells, two_rewards
from benchmarks.study import evaluator as evaluating
from benchmarks.study import work as working
from benchmarks.study.archive import write_archive
from benchmarks.study.cell_config import cell_config
from benchmarks.study.evaluator import EVALUATION_SEED, Evaluation, make_evaluator
from benchmarks.study.grid import Cell
from benchmarks.study.guarded import guard_outcome
from benchmarks.study.outcome import gain_within_limits
from benchmarks.study.recipes import STUDY_PROMPTS
from benchmarks.study.studies import Rung
from benchmarks.study.tuning import read_result
from benchmarks.study.work import if_free, progress, run_if_free, share, work
from comfyui_pcpo.tiny.tinyeval import HARD
from trainer.config.guard_section import GuardConfig
from trainer.config.schema import ConfigError
from trainer.evaluation.sampling import Draw, sample, sampling_policy
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
    assert [row.get("diverged", False) for row in rows] == [False, False, True, True, True]
    assert gain_within_limits(rows, TASK.reward) == pytest.approx(gain_within_limits(rows[:2], TASK.reward))


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
    interrupted(cell, study, tmp_path, monkeypatch)
    assert run_if_free(cell, study, tmp_path, lambda text: None)
    assert timeless(read_result(cell, study, tmp_path)) == timeless(read_result(cell, study, out))


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
