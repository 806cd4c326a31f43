"""The report of a study shows what was measured, against hand-computed values."""

import dataclasses
import json
import math

import pytest
from benchmark_grids import FOUR, TASK, fill, small, write

from benchmarks.report import comparison
from benchmarks.report.collect import by_seed, collect, collect_common
from benchmarks.report.figures import LOOKS
from benchmarks.report.pages import BEGIN, END, write_report
from benchmarks.study.grid import common_settings, fresh_cells, reported_cells
from benchmarks.study.methods import STUDY_METHODS
from benchmarks.study.statistics import holm, t_test


def test_the_report_shows_the_measurements_and_keeps_handwritten_text(tmp_path):
    study = small(seeds=(0, 1, 2, 3, 4), methods=("ppo", "pcpo", "nft"))
    slope = {"ppo": 0.4, "pcpo": 0.6, "nft": 0.9}
    fill(study, tmp_path, lambda cell: slope[cell.method] + 0.01 * cell.seed)
    (tmp_path / "results.md").write_text(f"# Results\n\nPCPO wins.\n\n{BEGIN}\n{END}\n\n## Limits\n")
    for _ in range(2):
        write_report("quick", study, tmp_path, tmp_path)
    summary = (tmp_path / "results.md").read_text()
    assert summary.startswith("# Results\n\nPCPO wins.\n\n" + BEGIN) and summary.endswith(END + "\n\n## Limits\n")
    assert summary.count(BEGIN) == summary.count(END) == 1
    assert "| PCPO | 0.20 [0.20, 0.20] | 0.10 [0.10, 0.10] | < 0.001 | 5/5 | 5 of 5 |" in summary
    pages = {file.stem: file.read_text() for file in (tmp_path / "results").iterdir()}
    assert set(pages) == {"README", "all-tasks", "flow-grpo-colorfulness"}
    text = pages["flow-grpo-colorfulness"]
    assert "| PCPO | 0.006, 0.001 | 5 | 0.31 [0.30, 0.32] | 0.62 [" in text
    assert "| DiffusionNFT | 0.006, - | 5 | 0.46 [0.45, 0.47] | 0.92 [" in text
    beaten = "| native PPO | -0.10 [-0.10, -0.10] | < 0.001 | -0.10 [-0.10, -0.10] | < 0.001 | 0/5 |"
    assert beaten in pages["all-tasks"].split("against PCPO")[1]
    # +0.25 of 0.62 in the median seed, on a line that ends at update 10
    assert f"| PCPO | {10 * 0.25 / 0.62:.1f} [" in text
    assert {f.name for f in (tmp_path / "images" / "results").iterdir()} == {
        "effects.png",
        "summary.png",
        *(f"flow-grpo-colorfulness-{kind}.png" for kind in ("convergence", "health", "matched")),
    }


def test_updates_saved_counts_the_seeds_in_which_either_method_reaches_the_goal(tmp_path):
    study = small(seeds=(0, 1, 2, 3, 4), methods=("ppo", "pcpo", "nft"))
    ends = {"ppo": (0.5, 0.5, 0.5, 0.1, 0.1), "pcpo": (1.0, 1.0, 0.25, 0.5, 0.1), "nft": (0.1,) * 5}
    fill(study, tmp_path, lambda cell: ends[cell.method][cell.seed])
    results = collect(study, tmp_path)
    # half the updates twice, twice the updates once, once alone (in half of the other's updates), once neither
    assert comparison.updates_saved(results, "pcpo", "ppo") == "50 % [-100 %, 50 %] of 4"
    assert comparison.updates_saved(results, "nft", "ppo") == "never [never, never] of 3"
    assert comparison.updates_saved(results, "ppo", "ppo") == "0 % [0 %, 0 %] of 3"
    assert comparison.updates_saved(results, "nft", "nft") == "-"


def test_all_methods_are_also_compared_at_one_setting(tmp_path):
    study = small(sweep=FOUR, tuning_seeds=(100,), methods=("ppo", "pcpo", "nft"), common={"flow-grpo": (1e-2, 1e-3)})
    fill(study, tmp_path, lambda cell: 1.0 if cell.learning_rate == 1e-3 else 0.1)
    common = common_settings(study, TASK)
    assert common == {"ppo": (1e-2, 1e-3), "pcpo": (1e-2, 1e-3), "nft": (1e-2, 1e-4)}
    assert collect_common(study, tmp_path) == []
    for cell in reported_cells(study, TASK, common):
        write(cell, study, tmp_path, 0.4 if cell.method == "pcpo" else 0.2)
    assert [len(runs) for runs in collect_common(study, tmp_path)[0].runs.values()] == [1, 1, 1]
    study = dataclasses.replace(study, fresh_seeds=(5, 6))
    for cell in fresh_cells(study, TASK):
        write(cell, study, tmp_path, (0.5 if cell.method == "pcpo" else 0.1) + 0.1 * cell.seed)
    write_report("quick", study, tmp_path, tmp_path)
    text = (tmp_path / "results" / "common-setting.md").read_text()
    assert "| PCPO | 0.10 |" in text
    assert "Seeds 5, 6 took" in text and "PCPO against native PPO on them: 0.20 [0.20, 0.20] by seeds" in text
    assert common_settings(small(), TASK) == {}


def test_matched_reward_is_read_where_each_seed_reaches_it(tmp_path):
    study = small(seeds=(0, 1))
    fill(study, tmp_path, lambda cell: 0.5 if cell.method == "pcpo" else 0.2)
    results = collect(study, tmp_path)[0]
    assert [run.matched("fd_base", 0.25) for run in results.runs["pcpo"]] == pytest.approx([105, 105])
    assert all(math.isnan(run.matched("fd_base", 0.25)) for run in results.runs["ppo"])
    assert results.runs["pcpo"][0].mean_kept_gain == pytest.approx(0.25)
    assert results.runs["pcpo"][0].rollout_reward == pytest.approx(0.95)


def test_the_report_states_choices_at_an_end_of_the_sweep(tmp_path):
    study = small(sweep=FOUR, tuning_seeds=(100,))
    fill(study, tmp_path, lambda cell: cell.learning_rate * (1 if cell.method == "pcpo" else -1) + cell.clip_range)
    write_report("quick", study, tmp_path, tmp_path)
    text = (tmp_path / "results" / "flow-grpo-colorfulness.md").read_text()
    assert "Chosen at the upper end of the learning rates: PCPO.\n" in text
    assert "Chosen at the lower end of the learning rates: native PPO.\n" in text
    assert "Chosen at the upper end of the clip ranges: native PPO, PCPO.\n" in text


def test_differences_are_averaged_over_tasks_before_seeds_are_compared(tmp_path):
    pairs = (("flow-grpo", "colorfulness"), ("dance-sde", "polish"))
    study = small(tasks=pairs, seeds=(0, 1, 2), methods=("ppo", "pcpo", "nft"))
    slope = {"ppo": 0.0, "pcpo": 0.2, "nft": 0.6}
    fill(study, tmp_path, lambda c: slope[c.method] * (1 + c.seed) * (2 if c.task.recipe == "dance-sde" else 1))
    results = collect(study, tmp_path)
    assert by_seed(results, "pcpo", "ppo") == pytest.approx([0.15, 0.3, 0.45])
    family = [t_test(by_seed(results, *pair)) for pair in (("pcpo", "ppo"), ("nft", "ppo"), ("nft", "pcpo"))]
    p = comparison.corrected_p_values(results)
    assert [p["pcpo", "ppo"], p["nft", "ppo"], p["nft", "pcpo"]] == pytest.approx(holm(family))
    assert p["ppo", "pcpo"] == p["pcpo", "ppo"]
    text, _ = comparison.comparison_table(results, "ppo")
    assert f"| 0.30 [-0.07, 0.67] | {p['pcpo', 'ppo']:.3f} | 6/6 |" in text


def test_gain_per_1000_model_evaluations_counts_rollouts_and_gradient_steps(tmp_path):
    study = small(seeds=(0, 1, 2), methods=("ppo", "pcpo-branch-1"))
    fill(study, tmp_path, lambda cell: {"ppo": 0.6, "pcpo-branch-1": 0.5}[cell.method] + 0.001 * cell.seed)
    assert "model-evaluations" not in written_pages(study, tmp_path)  # these records do not count them
    for file in tmp_path.rglob("metrics.jsonl"):
        rollout = 20 if "branch" in str(file) else 120
        counted = {"model_evaluations": {"rollout": rollout, "update": 80, "reference": 999}}
        lines = [json.dumps(json.loads(line) | counted) for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines) + "\n")
    page = written_pages(study, tmp_path)["model-evaluations"]
    assert "| native PPO | 0.30 [0.30, 0.30] |" in page  # 0.6 in 10 updates of 200
    assert "| PCPO, branch of 1 | 0.50 [0.50, 0.50] |" in page
    assert set(STUDY_METHODS) == set(LOOKS)  # every method has its line in the figures
    assert "| PCPO, branch of 1 | 3 | 100 | 2.00 | 0.50 | 0.50 | 100 | 1.00 |" in page


def written_pages(study, out):
    write_report("quick", study, out, out)
    return {file.stem: file.read_text() for file in (out / "results").iterdir()}
