"""The report of a study shows what was measured, as far as it is finished, against hand-computed values."""

import json
import math

import pytest
from benchmark_grids import NINE, ONE_SEED, TASK, fill, reported, small, write
from PIL import Image

from benchmarks.markdown import format_p_value
from benchmarks.report import frontier_page, guard_page, prompts_page
from benchmarks.report.collect import collect
from benchmarks.report.comparison import corrected_p_values, mixed_model, paired_difference
from benchmarks.report.frontier_figure import (
    DISTANCE,
    LOST_DIVERSITY,
    cost_figure,
    cost_panels,
    mean_path,
    shown_tasks,
    summary_figure,
    up_to,
)
from benchmarks.report.looks import LOOKS
from benchmarks.report.one_price import cheapest_run
from benchmarks.report.pages import BEGIN, END, NOTHING_MEASURED, write_report
from benchmarks.report.progress_figure import mean_progress
from benchmarks.report.proportionality_page import credit_comparisons, proportionality_page
from benchmarks.report.summary_table import summary_table
from benchmarks.study.grid import StudyTask, study_tasks
from benchmarks.study.methods import STUDY_METHODS
from benchmarks.study.statistics import holm, t_test
from benchmarks.study.tuning import tune
from trainer.config.schema import ConfigError

SEEDS = (0, 1, 2, 3, 4)
SLOPES = {"ppo": 0.4, "pcpo": 0.6, "nft": 0.9}


def by_slope(cell):
    """Equal differences between methods in every seed."""
    return SLOPES[cell.method] + 0.01 * cell.seed


def by_slope_or(other: float):
    return lambda cell: SLOPES.get(cell.method, other) + 0.01 * cell.seed


def written_pages(studies, out):
    write_report(studies, out, out)
    return {file.stem: file.read_text() for file in (out / "results").iterdir()}


def test_the_report_shows_the_measurements_and_keeps_handwritten_text(tmp_path):
    study = small(seeds=SEEDS, methods=tuple(SLOPES))
    fill(study, tmp_path / "quick", by_slope)
    (tmp_path / "results.md").write_text(f"# Results\n\nPCPO wins.\n\n{BEGIN}\n{END}\n\n## Limits\n")
    for _ in range(2):
        pages = written_pages({"quick": study}, tmp_path)
    summary = (tmp_path / "results.md").read_text()
    assert summary.startswith("# Results\n\nPCPO wins.\n\n" + BEGIN) and summary.endswith(END + "\n\n## Limits\n")
    assert summary.count(BEGIN) == summary.count(END) == 1
    assert "| native PPO | 5 of 5 | 0.42 | 0.42 | 0.42 | 0.42 | - | - | - |" in summary
    assert "| PCPO | 5 of 5 | 0.62 | 0.62 | 0.62 | 0.62 | 0.20 [0.20, 0.20] | < 0.001 | - |" in summary
    assert set(pages) == {"README", "frontier", "following-prompts"}
    text = pages["frontier"]
    assert (
        "| PCPO | 0.006, 0 | 5 | 0.62 [0.60, 0.64] | 0.62 [0.60, 0.64] | 0.62 [0.60, 0.64] | 0.62 [0.60, 0.64] |"
        in text
    )
    assert "| PCPO | 100 [100, 100] | 1.0 [1.0, 1.0] | 100 [100, 100] |" in text
    assert (
        "|  | native PPO | PCPO |\n|---|---|---|\n| flow-grpo/colorfulness | 20.0 (30.0) | 20.0 (30.0) |" in text
    )  # clipped
    beaten = "| native PPO | -0.20 [-0.20, -0.20] | < 0.001 | 0/5 |"
    assert beaten not in text  # one comparison is stated once, in the table against native PPO
    assert (
        "| DiffusionNFT | 0.30 [0.30, 0.30] | < 0.001 | 5/5 | 1 | 0.30 [0.30, 0.30] | 0.30 [0.30, 0.30] | < 0.001 |"
        in text
    )
    images = {f.name for f in (tmp_path / "images" / "results").iterdir()}
    assert images == {"frontier.png", "quick-diversity.png", "quick-distance.png"}


def test_without_any_run_the_report_says_so(tmp_path):
    pages = written_pages({"frontier": small(tuning=ONE_SEED, sweep=NINE)}, tmp_path)
    assert set(pages) == {"README"}
    assert "| frontier, flow-grpo/colorfulness | 0 of 18 | 0 of 2 | 0 of 2 |" in pages["README"]
    assert NOTHING_MEASURED in (tmp_path / "results.md").read_text()


def test_a_partial_study_is_reported_with_its_missing_runs(tmp_path):
    """PCPO has two of five seeds, DiffusionNFT none, and the second task none: no comparison is made yet."""
    other = ("dance-sde", "polish")
    study = small(seeds=SEEDS, methods=tuple(SLOPES), tasks=((TASK.recipe, TASK.reward), other))
    out = tmp_path / "frontier"
    for method, count in (("ppo", 5), ("pcpo", 2)):
        for cell in reported(study, out, method=method)[:count]:
            write(cell, study, out, by_slope(cell))
    pages = written_pages({"frontier": study}, tmp_path)
    assert "| frontier, flow-grpo/colorfulness | 0 of 0 | 7 of 15 | 1 of 3 |" in pages["README"]
    assert "| frontier, dance-sde/polish | 0 of 0 | 0 of 15 | 0 of 3 |" in pages["README"]
    summary = (tmp_path / "results.md").read_text()
    assert "| native PPO | 5 of 10 | 0.42 |" in summary and "| PCPO | 0 of 10 | - | - | - | - | - | - | - |" in summary
    assert "DiffusionNFT" not in summary
    assert "| PCPO | 0.006, 0 | 2 | 0.60 |" in pages["frontier"]
    assert "dance-sde" not in pages["frontier"]


def test_the_figure_shows_the_tasks_that_every_method_has_finished(tmp_path):
    study = small(tasks=(("flow-grpo", "colorfulness"), ("flow-grpo", "tinyeval")))
    fill(study, tmp_path, lambda cell: 1.0)
    first, second = collect("quick", study, tmp_path).tasks
    assert shown_tasks(collect("quick", study, tmp_path)) == [first, second]
    (missing,) = reported(study, tmp_path, second.task, "pcpo")
    (missing.folder(tmp_path) / "result.json").unlink()
    assert shown_tasks(collect("quick", study, tmp_path)) == [first]
    (missing,) = reported(study, tmp_path, first.task, "pcpo")
    (missing.folder(tmp_path) / "result.json").unlink()
    assert [one.task for one in shown_tasks(collect("quick", study, tmp_path))] == [first.task]


def test_gains_are_compared_at_the_price_of_the_cheapest_run_of_the_first_wave(tmp_path):
    """A later method's run of half the price does not change it; images and CPU seconds have prices of their own."""
    study = small(seeds=SEEDS, methods=("ppo", "pcpo"), later=("awm",))
    fill(study, tmp_path, by_slope_or(0.5))
    for name, share in (("pcpo", 0.8), ("awm", 0.5)):
        for cell in reported(study, tmp_path, method=name):
            file = cell.folder(tmp_path) / "result.json"
            result = json.loads(file.read_text())
            for row in result["rows"]:
                row["model_evaluations"] *= share
            file.write_text(json.dumps(result))
    results = collect("quick", study, tmp_path)
    (task,) = results.tasks
    assert [cheapest_run(results, task, of) for of in ("model_evaluations", "images", "cpu_seconds")] == [1600, 160, 20]
    ppo, pcpo = (task.runs[name][0] for name in ("ppo", "pcpo"))
    assert (ppo.gain_at(1600), pcpo.gain_at(1600)) == pytest.approx((0.8 * ppo.gain, pcpo.gain))
    assert ppo.gain_at(80, "images") == pytest.approx(ppo.gain / 2)
    pcpo.rows[-1].update(model_evaluations=100, diverged=True)  # a run that overflowed has spent less than it would
    assert cheapest_run(results, task) == 1600


def test_the_other_limits_stop_a_run_earlier_or_later(tmp_path):
    study = small(seeds=SEEDS, methods=tuple(SLOPES))
    fill(study, tmp_path, lambda cell: 1.0, diversity=0.6)  # 5, 10 and 20 % of it are lost at an 8th, a quarter, half
    table = frontier_page.sensitivity_table(collect("quick", study, tmp_path))
    assert "| PCPO | 0.13 | 0.25 | 0.50 |" in table
    rewards = frontier_page.reward_table(collect("quick", study, tmp_path))
    assert "| PCPO | 0.25 [0.25, 0.25] | 0.00 [0.00, 0.00] | 1.000 |" in rewards


def test_a_method_of_one_model_is_reported_by_task_and_compared_but_not_averaged(tmp_path):
    """GRPO-Guard exists for flow models only: its mean over one task says nothing beside means over two."""
    tasks = (("flow-grpo", "tinyeval"), ("dance-ddim", "tinyeval"))
    study = small(seeds=SEEDS, tasks=tasks, methods=tuple(SLOPES), later=("awm", "grpo-guard"))
    fill(study, tmp_path, by_slope_or(0.5), hard=0.7)
    results = collect("quick", study, tmp_path)
    assert results.methods == [*SLOPES, "awm", "grpo-guard"] and results.general == [*SLOPES, "awm"]
    gain = "0.52 [0.50, 0.54]"
    assert f"| AWM | {gain} | {gain} |\n| GRPO-Guard | {gain} | - |" in frontier_page.gains_by_task_table(results)
    assert "| GRPO-Guard | 0.10 [0.10, 0.10] |" in frontier_page.comparison_tables(results)[0]
    averaged = (frontier_page.reward_table, frontier_page.sensitivity_table, summary_table)
    assert all("| AWM |" in (text := table(results)) and "GRPO-Guard" not in text for table in averaged)
    page = prompts_page.prompts_page(results)
    assert page.count("| GRPO-Guard |") == 1 and page.count("| AWM |") == 3  # of tasks; and of their mean
    (reported(study, tmp_path, StudyTask(*tasks[1]), "awm")[0].folder(tmp_path) / "result.json").unlink()
    results = collect("quick", study, tmp_path)  # nor does a mean over some of the tasks say anything
    assert results.methods == [*SLOPES, "awm", "grpo-guard"] and results.general == [*SLOPES]


def test_objective_and_branches_are_told_apart_where_all_four_combinations_are_finished(tmp_path):
    gains = {"ppo": 0.1, "pcpo": 0.2, "ppo-branch-1": 0.4, "pcpo-branch-1": 0.7}
    study = small(seeds=SEEDS, tasks=(("flow-grpo", "tinyeval"), ("dance-ddim", "tinyeval")), methods=tuple(gains))
    fill(study, tmp_path, lambda cell: gains[cell.method] * (1 if cell.task.recipe == "flow-grpo" else 2))
    *_, table = frontier_page.additions_section(collect("quick", study, tmp_path))
    for task, factor in (("flow-grpo/tinyeval", 1), ("dance-ddim/tinyeval", 2), ("mean", 1.5)):
        added = (f"{factor * one:.2f}" for one in (0.1, 0.3, 0.3, 0.5))
        assert f"| {task} | {' | '.join(f'{one} [{one}, {one}]' for one in added)} |" in table
    for cell in reported(study, tmp_path, StudyTask("flow-grpo", "tinyeval"), "ppo-branch-1"):
        (cell.folder(tmp_path) / "result.json").unlink()
    *_, table = frontier_page.additions_section(collect("quick", study, tmp_path))
    assert "flow-grpo" not in table
    assert frontier_page.additions_section(collect("quick", small(seeds=SEEDS), tmp_path)) == []


def test_all_comparisons_are_corrected_as_one_family():
    differences = {"ppo": (0.1, 0.2, 0.4), "pcpo": (0.2, 0.3, 0.5), "awm": (0.1, 0.3, 0.3)}
    assert corrected_p_values(differences) == dict(
        zip(differences, holm([t_test(own) for own in differences.values()]), strict=True)
    )


def test_a_gains_price_is_that_within_the_limits(tmp_path):
    """2,000 model evaluations in all; a tenth of the diversity is lost after 400, at a fifth of the final gain."""
    study = small(seeds=SEEDS)
    fill(study, tmp_path, lambda cell: {"ppo": 1.0, "pcpo": 2.0}[cell.method], diversity=0.5)
    ppo, pcpo = (collect("quick", study, tmp_path).tasks[0].runs[name][0] for name in ("ppo", "pcpo"))
    assert (ppo.gain, pcpo.gain) == pytest.approx((0.2, 0.4))
    assert (ppo.price(0.25), pcpo.price(0.25)) == (math.inf, pytest.approx(250))
    table = frontier_page.price_table(collect("quick", study, tmp_path).tasks[0])
    never, always = " never (0/5) |", "(5/5) |"
    assert f"| native PPO | 200 [200, 200] {always}{4 * never}" in table
    costs = [f"{value} [{value}, {value}] {always}" for value in (100, 250, 20)]
    assert f"| PCPO | {costs[0]} {costs[1]}{never} {costs[2]}" in table


def test_differences_are_averaged_over_whole_tasks_before_seeds_are_compared(tmp_path):
    pairs = (("flow-grpo", "colorfulness"), ("dance-sde", "colorfulness"), ("dance-ddim", "colorfulness"))
    study = small(tasks=pairs, seeds=(0, 1, 2), methods=tuple(SLOPES), later=("awm",))
    fill(
        study,
        tmp_path,
        lambda c: (
            SLOPES.get(c.method, 0.5 + 0.2 * c.seed**2) * (1 + c.seed) * (2 if c.task.recipe == "dance-sde" else 1)
        ),
    )
    last = StudyTask("dance-ddim", "colorfulness")
    for cell in reported(study, tmp_path, last, "pcpo")[1:]:
        (cell.folder(tmp_path) / "result.json").unlink()  # the third task has one seed of PCPO: it does not count yet
    results = collect("quick", study, tmp_path)
    one = paired_difference(results, "pcpo", "ppo")
    assert one.differences == pytest.approx([0.3, 0.6, 0.9])
    assert one.better_in == "6/6"
    assert paired_difference(results, "nft", "ppo").better_in == "6/6"  # of the same tasks
    family = frontier_page.frontier_family(results)
    first = [("pcpo", "ppo"), ("nft", "ppo"), ("nft", "pcpo")]
    later = [("awm", "ppo"), ("awm", "pcpo"), ("awm", "nft")]
    assert set(family) == {*first, *later}
    keys = [*first, *later]
    p = [t_test(paired_difference(results, *key).differences) for key in keys]
    assert [family[key][1] for key in keys] == pytest.approx(holm(p))


def test_updates_are_without_signal_where_every_advantage_is_0(tmp_path):
    study = small(seeds=(0, 1), methods=("ppo", "pcpo"))
    fill(study, tmp_path, lambda cell: 1.0)
    for cell in reported(study, tmp_path, method="pcpo"):
        sizes = (0.0, 1.3, 0.0, 0.5) if cell.seed == 0 else (0.0, 1e-9, 1.0, 1.0)
        lines = [json.dumps({"update": k, "advantage_abs_max": size}) + "\n" for k, size in enumerate(sizes, 1)]
        (cell.folder(tmp_path) / "metrics.jsonl").write_text("".join(lines))
    table = frontier_page.signal_table(collect("quick", study, tmp_path))
    assert "| native PPO | 0 % |" in table and "| PCPO | 38 % |" in table


def test_the_frontiers_tables_have_the_numbers_of_their_columns(tmp_path):
    """Two tasks of different rewards; PCPO spends 0.4 times the model evaluations and twice the CPU seconds."""
    study = small(
        seeds=(0, 1, 2),
        tasks=(("flow-grpo", "colorfulness"), ("flow-grpo", "tinyeval")),
        methods=("ppo", "pcpo", "nft"),
    )
    slopes = {
        "colorfulness": {"ppo": 0.5, "pcpo": 1.0, "nft": 0.7},
        "tinyeval": {"ppo": 1.0, "pcpo": 3.0, "nft": 2.0},
    }
    fill(study, tmp_path, lambda c: slopes[c.task.reward][c.method] * (0.8, 1.0, 1.2)[c.seed], distance=1.4)
    for task in study_tasks(study):
        for cell in reported(study, tmp_path, task, "pcpo"):
            file = cell.folder(tmp_path) / "result.json"
            result = json.loads(file.read_text())
            for row, right in zip(result["rows"], (1.0, 0.9, 0.5), strict=True):
                row |= {"right": right, "model_evaluations": 0.4 * row["model_evaluations"]}
                row["cpu_seconds"] *= 2
            file.write_text(json.dumps(result))
    results = collect("quick", study, tmp_path)
    colour = results.tasks[0]
    table = frontier_page.price_gain_table(results, colour).splitlines()
    assert "800 model evaluations | gain after 160 images | gain after 20 CPU seconds" in table[0]
    assert [row.split("|")[2:5] for row in table[2:4]] == [
        [" 0.20 [0.10, 0.30] ", " 0.50 [0.25, 0.75] ", " 0.50 [0.25, 0.75] "],
        [" 1.00 [0.50, 1.50] ", " 1.00 [0.50, 1.50] ", " 0.50 [0.25, 0.75] "],
    ]
    assert "| PCPO | 100 [100, 100] | 1.4 [1.4, 1.4] | 50 [50, 50] |" in frontier_page.ending_table(colour)
    assert "| PCPO | 800 (400) | 800 (400) |" in frontier_page.run_cost_table(results)
    (row,) = (row for row in frontier_page.comparison_tables(results)[0].splitlines() if row.startswith("| PCPO |"))
    whole, early = row.split("|")[2].split()[0], row.split("|")[6].split()[0]
    assert (whole, early) == ("1.25", "1.70")
    effect = mixed_model(results, "ppo").p["pcpo"]
    assert row.split("|")[8].strip() == format_p_value(effect) != row.split("|")[3].strip()
    (row,) = (row for row in frontier_page.reward_table(results).splitlines() if row.startswith("| PCPO |"))
    assert [row.split("|")[k].split()[0] for k in (2, 3, 5, 6)] == ["1.00", "0.30", "3.00", "1.00"]
    (row,) = (row for row in summary_table(results).splitlines() if row.startswith("| PCPO |"))
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["2.00", "2.00", "2.00", "1.00"]


def test_a_held_out_reward_alone_is_a_violation_in_the_study_too(tmp_path):
    study = small(methods=("ppo",), guard={"every": 5}, held_out=("polish",))
    fill(study, tmp_path, lambda cell: 1.0)
    (cell,) = reported(study, tmp_path)
    file = cell.folder(tmp_path) / "result.json"
    result = json.loads(file.read_text())
    result["rows"][1]["polish"] -= 0.9 * result["rows"][0]["polish_std"]
    file.write_text(json.dumps(result))
    (run,) = collect("guard", study, tmp_path).tasks[0].runs["ppo"]
    (default,) = guard_page.under_guard([run], "default")
    assert [default.is_within(k) for k in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    "text", ["", f"# Results\n\n{BEGIN}\n\nLimits\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2]
)
def test_a_summary_without_one_generated_part_is_left_alone(tmp_path, text):
    study = small()
    fill(study, tmp_path / "quick", by_slope)
    file = tmp_path / "results.md"
    file.write_text(text)
    with pytest.raises(ConfigError, match="two lines that enclose its generated part"):
        write_report({"quick": study}, tmp_path, tmp_path)
    assert file.read_text() == text


def test_the_figure_has_the_mean_path_of_every_method(tmp_path):
    study = small(seeds=(0, 1), methods=tuple(SLOPES))
    fill(study, tmp_path, lambda cell: 1.0 + cell.seed, diversity=0.8)
    results = collect("quick", study, tmp_path)
    lost, gained = mean_path(results.tasks[0].runs["pcpo"], LOST_DIVERSITY)
    assert (lost, gained) == (pytest.approx([0, 10, 20]), pytest.approx([0, 0.75, 1.5]))
    spent, kept = mean_progress(results.tasks[0].runs["pcpo"])
    assert (spent, kept) == (pytest.approx([0, 1, 2]), pytest.approx([0, 0.75, 0.75]))
    width, height = summary_figure(results).size
    assert width > height > 300
    assert set(STUDY_METHODS) == set(LOOKS)  # every method has its line in the figures


def test_a_panel_has_the_path_of_every_method(tmp_path):
    study = small(methods=("ppo", "pcpo"), later=("awm",))
    fill(study, tmp_path, lambda cell: {"ppo": 0.5, "pcpo": 1.0, "awm": 2.0}[cell.method], diversity=0.95, distance=1.8)
    results = collect("quick", study, tmp_path)
    (lost,), (far,) = (cost_panels(results, cost) for cost in (LOST_DIVERSITY, DISTANCE))
    assert {line.title: line.y[-1] for line in lost.lines} == pytest.approx(
        {"native PPO": 0.5, "PCPO": 1.0, "AWM": 2.0}
    )
    assert (lost.limit, far.limit) == (10, 1.5)
    assert [line.x for line in lost.lines] == [pytest.approx([0, 2.5, 5])] * 3
    assert [line.x for line in far.lines] == [pytest.approx([1, 1.4, 1.8])] * 3
    width, height = cost_figure(results, DISTANCE).size
    assert width > 500 and height > 400


def test_a_path_ends_where_it_first_passes_the_edge():
    assert up_to(2, [0, 1, 3, 1], [0, 1, 2, 5]) == ([0, 1, 2], [0, 1, 1.5])
    assert up_to(2, [0, 2, 1], [0, 4, 5]) == ([0, 2, 1], [0, 4, 5])


def test_prompt_following_is_compared_before_and_after_where_diversity_is_left(tmp_path):
    study = small(seeds=SEEDS, tasks=(("flow-grpo", "tinyeval"),), methods=("ppo", "pcpo"))
    fill(study, tmp_path, lambda cell: 1.0, hard=0.7, diversity=0.8)
    page = prompts_page.prompts_page(collect("quick", study, tmp_path))
    assert "| base model | - | 50 | - | - | 50 | 50 | 50 | 50 |" in page
    assert "| PCPO | 5 | 70 [70, 70] | 20.0 [20.0, 20.0] | 10.0 [10.0, 10.0] |" in page
    assert "| PCPO | 20.0 [20.0, 20.0] | < 0.001 | 10.0 [10.0, 10.0] |" in page
    assert prompts_page.mean_change(collect("quick", study, tmp_path), "pcpo") == "20.0 [20.0, 20.0]"


def test_the_summary_averages_over_finished_tasks_only(tmp_path):
    """Otherwise the first seeds would be means over more tasks than the others."""
    study = small(
        seeds=(0, 1, 2), tasks=(("flow-grpo", "tinyeval"), ("dance-ddim", "tinyeval")), methods=("ppo", "pcpo")
    )
    partial = StudyTask("dance-ddim", "tinyeval")
    fill(study, tmp_path, lambda cell: 3.0 if cell.task == partial else 1.0, hard=0.7)
    for cell in reported(study, tmp_path, partial, "pcpo")[:2]:
        write(cell, study, tmp_path, 3.0, hard=0.9)
    (reported(study, tmp_path, partial, "pcpo")[2].folder(tmp_path) / "result.json").unlink()
    summary = summary_table(collect("quick", study, tmp_path))
    for title in ("native PPO", "PCPO"):  # the same tasks for both
        assert f"| {title} | 3 of 6 | 1.00 |" in summary
    assert summary.count("| 20.0 [20.0, 20.0] |") == 2


def test_credits_are_compared_with_the_native_one_of_the_same_rollouts(tmp_path):
    names = ("native", "proportionate", "native-branch-1", "proportionate-branch-1", "early", "first-steps")
    study = small(seeds=SEEDS, methods=names, baseline="native")
    slopes = dict(zip(names, (0.1, 0.3, 0.5, 1.0, 0.2, 0.1), strict=True))
    fill(study, tmp_path, lambda cell: slopes[cell.method] + 0.01 * cell.seed)
    results = collect("proportionality", study, tmp_path)
    family = credit_comparisons(results)
    primary = {("proportionate", "native"), ("proportionate", "early"), ("proportionate-branch-1", "native-branch-1")}
    assert set(family) == primary | {("early", "native"), ("first-steps", "native")}
    assert {key for key, (_, p) in family.items() if not math.isnan(p)} == primary
    assert family["proportionate", "native"][0].interval.value == pytest.approx(0.2)
    assert family["proportionate-branch-1", "native-branch-1"][0].interval.value == pytest.approx(0.5)
    page = proportionality_page(results, tmp_path, "images")
    width, height = Image.open(tmp_path / "proportionality.png").size
    assert width > 1.5 * height  # with and without branches, side by side
    assert "| proportionate | native | 0.20 [0.20, 0.20] | < 0.001 | 5/5 | 1 |" in page
    assert "| proportionate | 0.006, 0 | 5 | 0.32 [0.30, 0.34] | 2000" in page
    assert "| native | 2.0 | 10.0 to 30.0 |" in page


def test_a_guards_outcome_is_the_evaluation_of_the_update_that_it_keeps(tmp_path):
    """Update 5 of 10 has lost 30 % of diversity, update 10 60: the default limits keep the first, strict ones none."""
    study = small(seeds=(0, 1, 2), methods=("ppo",), guard={"every": 5, "patience": 2}, held_out=("polish",))
    fill(study, tmp_path, lambda cell: 2.0 + 0.1 * cell.seed, diversity=0.4, hard=0.1)
    results = collect("guard", study, tmp_path)
    page = guard_page.guard_page(results)
    for title in ("colorfulness, native PPO", "all"):
        assert f"| {title} | 0 of 3 | 3 of 3 | 5.0 | 3 of 3 | 3 of 3 | 0 of 3 | 1.05 | 1.05 | 27 % |" in page
    assert "| colorfulness, native PPO | 3 of 3 | 0 of 3 | - | 0 of 3 | 0 of 3 | 0 of 3 | 2.10 | 2.10 | 27 % |" in page
    assert "| gain in the reward | 0.00 | 2.10 [" in page and "| 1.05 [" in page
    assert "| diversity left, % | 100 | 40 [40, 40] | 70 [70, 70] | - | 40 [40, 40] | - |" in page
    assert "| TinyEval, hard tasks, % | 50 | 10 [10, 10] | 30 [30, 30] | < 0.001 | 10 [10, 10] | < 0.001 |" in page


def test_the_guards_control_ends_all_runs_at_the_evaluation_nearest_to_the_mean_kept_update(tmp_path):
    """The runs keep updates 10, 5 and 5, and the evaluation nearest to 6.7 is that of update 5."""
    study = small(seeds=(0, 1, 2), methods=("ppo",), guard={"every": 5}, held_out=("polish",))
    for cell, diversity in zip(reported(study, tmp_path), (0.9, 0.4, 0.4), strict=True):
        write(cell, study, tmp_path, 2.0, diversity=diversity)
    (group,) = guard_page.guarded_runs(collect("guard", study, tmp_path))
    side = group.sides["default"]
    assert [one.outcome.kept for one in side] == [10, 5, 5]
    assert guard_page.shared_end(side) == 1  # of 0, 5 and 10
    assert "| all | 0 of 3 | 3 of 3 | 6.7 | 3 of 3 | 3 of 3 | 1 of 3 | 1.33 | 1.00 |" in guard_page.promise_table(
        [group], "default"
    )


def test_a_guarded_method_is_reported_once_all_of_its_seeds_are_finished(tmp_path):
    study = small(seeds=(0, 1), methods=("ppo",), guard={"every": 5}, held_out=("polish",))
    write(reported(study, tmp_path)[0], study, tmp_path, 2.0)
    page = guard_page.guard_page(collect("guard", study, tmp_path))
    assert "native PPO" not in page and "| all |" not in page


def test_a_guards_work_counts_up_to_the_update_at_which_it_stops_the_run(tmp_path):
    study = small(methods=("ppo",), guard={"every": 5, "patience": 1}, held_out=("polish",))
    fill(study, tmp_path, lambda cell: 2.0, diversity=0.4)
    (run,) = collect("guard", study, tmp_path).tasks[0].runs["ppo"]
    (default,), (strict,) = (guard_page.under_guard([run], limits) for limits in ("default", "strict"))
    assert (default.outcome.stopped, strict.outcome.stopped) == (10, 5)
    assert default.guards_share == pytest.approx(750 / 2750)
    assert strict.guards_share == pytest.approx(500 / 1500)  # after 1,000 of the run's model evaluations
    assert (default.kept, strict.kept) == (1, 1)  # nothing is kept: the run ends where it is stopped


def test_tuning_is_reported_before_it_is_finished(tmp_path):
    study = small(sweep=NINE, tuning=ONE_SEED)
    for cell in tune(study, TASK, "ppo", tmp_path / "frontier").due[:2]:
        write(cell, study, tmp_path / "frontier", 0.5)
    page = written_pages({"frontier": study}, tmp_path)["tuning"]
    assert "| native PPO | 0 | 0.50 | - | - |" in page and "| native PPO | 0.1 | 0.50 | - | - |" in page
    assert "Tuning not finished: native PPO." in page
