"""A grid is worked off by any number of processes: cells resume, are done once and are never mistaken for others."""

import json

import pytest
from benchmark_grids import TASK, interrupted, small, write

from benchmarks.speed import speed
from benchmarks.study import cells, guidance
from benchmarks.study import work as working
from benchmarks.study.grid import Cell, cell_config, choose, kept_gains, read_result, reported_cells, settings
from benchmarks.study.measure import EXAM, make_evaluator
from benchmarks.study.methods import PROMPTS
from benchmarks.study.work import if_free, progress, run_if_free, share, work
from trainer.config.schema import ConfigError
from trainer.evaluation.sampling import Draw, sample, sampling_policy
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole small grid, run once."""
    out, said = tmp_path_factory.mktemp("grid"), []
    form = small()
    work(form, out, said.append)
    return form, out, said


def test_a_grid_leaves_one_result_per_cell_and_is_not_done_again(done):
    form, out, said = done
    assert len(said) == 2
    assert progress(form, out) == (2, 2)
    work(form, out, said.append)
    assert len(said) == 2


def test_a_cell_is_examined_before_and_at_every_interval_with_gains_in_base_deviations(done):
    form, out, _ = done
    for cell in reported_cells(form, TASK, choose(form, TASK, out)):
        result = read_result(cell, form, out)
        assert result["updates"] == [0, 1, 2]
        rows = result["rows"]
        expected = [(row["colorfulness"] - rows[0]["colorfulness"]) / rows[0]["colorfulness_std"] for row in rows]
        assert result["gains"] == pytest.approx(expected)
        assert len(RunFolder(cell.folder(out)).records()) == 2


def test_contenders_start_from_the_same_examination_which_is_the_base_model_s(tmp_path):
    form, first = small(updates=1), []
    for name in ("ppo", "pcpo"):
        cells._examiners.clear()  # each measures for itself
        cell = Cell(TASK, name, *settings(form, TASK, name)[0], 0)
        assert run_if_free(cell, form, tmp_path, lambda text: None)
        first.append(read_result(cell, form, tmp_path)["rows"][0])
    assert first[0] == first[1]
    room = sampling_policy(cell_config(cell, form, tmp_path), [])  # a model that never had a LoRA
    images = sample(room, PROMPTS, [], Draw(EXAM, form.steps, each=form.each))
    base = make_evaluator(room, form, tmp_path / "reference").judge(images)
    assert {k: v for k, v in first[0].items() if k != "update"} == pytest.approx(base, rel=1e-3)


def test_the_base_examination_of_a_trained_policy_is_that_of_the_fresh_one(tmp_path):
    form = small()
    policy = make_policy(cell_config(Cell(TASK, "ppo", 1e-3, 1e-3, 0), form, tmp_path))
    fresh = make_evaluator(policy, form, tmp_path).measure(policy)
    policy.load_lora({n: (a, b + 0.1) for n, (a, b) in policy.lora().items()})
    examiner = make_evaluator(policy, form, tmp_path)
    assert examiner.measure(policy) != fresh
    assert cells.base_examination(examiner, policy) == fresh


def test_a_cell_whose_journal_was_cut_short_starts_again_from_the_base_model(done, tmp_path, monkeypatch):
    form, out, _ = done
    cell = Cell(TASK, "pcpo", *settings(form, TASK, "pcpo")[0], 0)
    folder = interrupted(cell, form, tmp_path, monkeypatch)
    assert folder.numbers() == [1]
    journal = folder.path / cells.JOURNAL
    journal.write_text(journal.read_text()[:-20])
    cells._examiners.clear()
    assert run_if_free(cell, form, tmp_path, lambda text: None)
    assert read_result(cell, form, tmp_path)["rows"] == read_result(cell, form, out)["rows"]
    assert [record["update"] for record in folder.records()] == [1, 2]


def test_a_run_whose_gradient_becomes_infinite_is_finished_as_one_without_pictures(tmp_path, monkeypatch):
    def overflow(self, state, config):
        raise FloatingPointError("the gradient norm is inf in minibatch 1.")

    form, said = small(updates=4), []
    cell = Cell(TASK, "ppo", 1e-3, 1e-3, 0)
    monkeypatch.setattr(RunFolder, "save", overflow)  # after the first update and its examination
    assert run_if_free(cell, form, tmp_path, said.append)
    assert "the gradient norm is inf" in said[0]
    result = read_result(cell, form, tmp_path)
    assert result["updates"] == [0, 1, 2, 3, 4]
    assert [row["object"] for row in result["rows"][2:]] == [0, 0, 0]
    assert len(set(kept_gains(result)[1:])) == 1


def test_a_result_of_another_configuration_is_refused_with_the_difference(tmp_path):
    form = small()
    cell = Cell(TASK, "ppo", *settings(form, TASK, "ppo")[0], 0)
    write(cell, form, tmp_path, 0.5)
    other = small(updates=3, group_size=4)
    with pytest.raises(ConfigError, match=r"rollout.group_size = 2 there, 4 asked for; run.updates = 2 .*--out"):
        read_result(cell, other, tmp_path)
    with pytest.raises(ConfigError, match=r"run\.updates"):
        run_if_free(cell, other, tmp_path, print)


def test_an_unfinished_cell_of_another_configuration_is_not_continued(tmp_path, monkeypatch):
    form = small()
    cell = Cell(TASK, "ppo", *settings(form, TASK, "ppo")[0], 0)
    interrupted(cell, form, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"rollout\.steps = 3 there, 4 asked for"):
        run_if_free(cell, small(steps=4), tmp_path, print)


def test_a_process_passes_over_work_that_is_taken_and_waits_for_the_last_of_it(tmp_path, monkeypatch):
    held, done = RunFolder(tmp_path / "a").locked(), []
    held.__enter__()
    monkeypatch.setattr(working.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    share(
        lambda: [name for name in "ab" if name not in done],
        lambda name: if_free(tmp_path / name, lambda: done.append(name)),
    )
    assert done == ["b", "a"]


def test_guidance_trains_other_mixes_while_one_is_taken_and_ends_where_all_are_there(tmp_path, monkeypatch):
    form = small(updates=1)
    taken = guidance.folder_of(guidance.mix_config(guidance.mixes(form)[0], form, tmp_path)).locked()
    taken.__enter__()
    said, waits = [], []

    def sleep(seconds):
        waits.append(len(said))
        taken.__exit__(None, None, None)

    monkeypatch.setattr(working.time, "sleep", sleep)
    guidance.run(form, tmp_path, said.append)
    assert waits == [4]
    assert len(said) == 6
    found = json.loads((tmp_path / "guidance.json").read_text())
    assert len(found["rows"]) == 5 + 2 * 10
    (tmp_path / "images").mkdir()
    text = guidance.report(tmp_path, tmp_path / "images", "images")
    assert "| IRG | 2, 0 |" in text and "| IRG | 1, 0 |" not in text and "| trained on both | 0.5, 0.5 |" in text
    assert (tmp_path / "images" / "guidance.png").is_file()
    guidance.run(form, tmp_path, said.append)
    assert len(said) == 6


def test_speed_is_measured_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "AXES", {"steps": (4,)})
    other, point = RunFolder(tmp_path / "speed").locked(), ("emoji-flow", "steps", 4)
    other.__enter__()

    def finish(seconds):  # the other process measures it while this one waits
        speed.file_of(tmp_path / "speed", point).write_text("{}")
        other.__exit__(None, None, None)

    monkeypatch.setattr(working.time, "sleep", finish)
    said = []
    speed.run(tmp_path, said.append, ("emoji-flow",))
    assert said == []
    assert speed.file_of(tmp_path / "speed", point).read_text() == "{}"


def test_a_cell_that_was_interrupted_ends_like_one_that_was_not(done, tmp_path, monkeypatch):
    form, out, _ = done
    cell = Cell(TASK, "pcpo", *settings(form, TASK, "pcpo")[0], 0)
    interrupted(cell, form, tmp_path, monkeypatch)
    assert run_if_free(cell, form, tmp_path, lambda text: None)
    assert read_result(cell, form, tmp_path)["rows"] == read_result(cell, form, out)["rows"]


WORKER = """
import sys, dataclasses
from pathlib import Path
import torch
torch.set_num_threads(1)
from benchmarks.study.methods import FORMS
from benchmarks.study.work import work
import benchmarks.study.work
benchmarks.study.work.WAIT = 0.1
form = dataclasses.replace(FORMS["quick"], contenders=("ppo", "log-hinge", "pcpo"), seeds=(0, 1),
    tasks=(("flow-grpo", "colorfulness"),), group_size=2, prompts_per_update=1, steps=2, updates=1, every=1,
    each=2, reference=16)
work(form, Path(sys.argv[1]), lambda text: print(text, flush=True))
"""


def test_two_processes_share_a_grid_and_do_each_cell_once(script, tmp_path):
    workers = [script(WORKER, tmp_path) for _ in range(2)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    lines = [line.split(":")[0] for text, _ in outputs for line in text.splitlines()]
    assert len(lines) == len(set(lines)) == 6
