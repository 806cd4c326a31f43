"""The grid of a study: valid cells, one sweep for all methods, settings chosen on tuning seeds."""

import dataclasses
import functools

import pytest
from benchmark_grids import NINE, ONE_SEED, TASK, fill, small, write

from benchmarks.report.collect import collect
from benchmarks.report.protocol_page import study_paragraph
from benchmarks.report.tuning_page import edge_note, left_out_rows, tuning_table
from benchmarks.study.budget import evaluations_per_update
from benchmarks.study.cell_config import cell_config
from benchmarks.study.grid import Cell, StudyTask, evaluation_updates, study_tasks, task_methods, task_sweep
from benchmarks.study.methods import CLIP_RANGE, CREDIT_METHODS, STUDY_METHODS, Tree
from benchmarks.study.recipes import FOLLOWING, RECIPES, STUDY_REWARDS, training_prompts
from benchmarks.study.studies import STUDIES, Beyond, Rung, Setting
from benchmarks.study.tuning import edges, read_result, tune
from benchmarks.study.work import due_cells, progress, run_if_free
from comfyui_pcpo.tiny.captions import is_held_out
from comfyui_pcpo.tiny.tinyeval import HARD, known_scene, suite_prompts, task_of
from trainer.config.loading import build, with_options
from trainer.config.presets import PRESETS
from trainer.loop.objectives import make_objective
from trainer.loop.plan import make_plan
from trainer.policy.loading import make_policy

EVERY_RUN = {"lora.rank": 8, "optimizer.minibatches": 2, "optimizer.epochs": 1, "objective.clip_range": 1e-3}
RECIPE_SETTINGS = (
    *("model.name", "rollout.method", "rollout.noise_level", "rollout.shared_noise", "rollout.steps"),
    *("advantage.kind", "advantage.spread", "objective.train_steps", "lora.targets"),
)
AS_PUBLISHED = {  # a column for each of these settings
    "flow-grpo": ("emoji-flow", "flow_sde", 0.7, False, 10, "group", "batch", 1.0, "linear"),
    "dance-sde": ("emoji-flow", "dance_sde", 0.3, True, 10, "group", "group", 1.0, "linear"),
    "dance-ddim": ("emoji-eps", "ddim", 1.0, True, 10, "group", "group", 1.0, "all"),
    "dance-ddim-50": ("emoji-eps", "ddim", 1.0, True, 50, "group", "group", 0.2, "all"),
}
NATIVE_PPO = {
    **{
        "objective.name": "ppo",
        "objective.credit": "native",
        "objective.form": "exact",
        "objective.loss_weight": "none",
    },
    **{"objective.skip_last": None, "objective.last_step": False, "objective.first_steps": 0, "rollout.branch": 0},
    **{"rollout.group_size": 2, "rollout.policy": "latest", "optimizer.ema_decay": 0.0},
}
HINGE: Tree = {"objective.name": "log_hinge"}
PROPORTIONATE: Tree = {"objective.name": "log_hinge", "objective.credit": "proportionate"}
BRANCH: Tree = {"rollout.branch": 1, "rollout.shared_noise": True}
NO_NOISE: Tree = {"rollout.noise_level": 0.0, "objective.credit": "proportionate"}
OPTIONS: Tree = {"objective.shared_noise": True, "objective.levels": 4}
CHANGES: dict[str, Tree] = {  # all that a method's run has other than native PPO's, in 10 steps of the flow model
    "ppo": {},
    "ppo-branch-1": BRANCH,
    "ppo-early": {"objective.skip_last": 2},
    "pcpo": PROPORTIONATE,
    "pcpo-branch-1": {**PROPORTIONATE, **BRANCH},
    "pcpo-branch-2": {**PROPORTIONATE, **BRANCH, "rollout.branch": 2},
    "pcpo-branch-3": {**PROPORTIONATE, **BRANCH, "rollout.branch": 3},
    "pcpo-recommended": {**PROPORTIONATE, **BRANCH, "rollout.branch_first": 3, "rollout.group_size": 16},
    "tempflow-grpo": {**BRANCH, "objective.loss_weight": "tempflow"},
    "grpo-guard": {"objective.credit": "guard_dt", "objective.form": "linear", "objective.rescale_credit": False},
    "nft": {**NO_NOISE, "objective.name": "nft"},
    "nft-options": {
        **{**NO_NOISE, **OPTIONS, "objective.name": "nft", "rollout.policy": "ema"},
        **{"optimizer.ema_decay": 0.5, "optimizer.ema_every": 2},
    },
    "awm": {**NO_NOISE, "objective.name": "awm"},
    "awm-options": {**NO_NOISE, **OPTIONS, "objective.name": "awm", "objective.likelihood": "adaptive"},
    "native": HINGE,
    "proportionate": PROPORTIONATE,
    "uniform": {**HINGE, "objective.credit": "uniform"},
    "first-steps": {**HINGE, "objective.first_steps": 4},
    "early": {**HINGE, "objective.skip_last": 2},
    "native-branch-1": {**HINGE, **BRANCH},
    "proportionate-branch-1": {**PROPORTIONATE, **BRANCH},
    "uniform-branch-1": {**HINGE, **BRANCH, "objective.credit": "uniform"},
    "first-steps-branch-1": {**HINGE, **BRANCH, "objective.first_steps": 4},
    "early-branch-1": {**HINGE, **BRANCH, "objective.skip_last": 2},
}


def settings_of(recipe: str, method: str, tmp_path) -> Tree:
    """The dotted settings of a run of 10 steps."""
    config = cell_config(cell(method, StudyTask(recipe, "colorfulness")), small(steps=10), tmp_path)
    sections = ("model", "rollout", "objective", "advantage", "optimizer", "lora")
    return {f"{section}.{key}": value for section in sections for key, value in getattr(config, section)}


def test_recipes_run_as_published(tmp_path):
    found = {recipe: settings_of(recipe, "ppo", tmp_path) for recipe in RECIPES}
    assert {recipe: tuple(own[key] for key in RECIPE_SETTINGS) for recipe, own in found.items()} == AS_PUBLISHED
    assert all(own.items() >= EVERY_RUN.items() for own in found.values())


def test_methods_run_as_published(tmp_path):
    base = settings_of("flow-grpo", "ppo", tmp_path)
    assert base.items() >= NATIVE_PPO.items()
    found = {name: settings_of("flow-grpo", name, tmp_path) for name in STUDY_METHODS}
    assert {name: {k: v for k, v in own.items() if v != base[k]} for name, own in found.items()} == CHANGES


@functools.cache
def policy_of(model: str):
    return make_policy(build({"model": {"name": model, "device": "cpu"}}, "test"))


def cell(method: str, task: StudyTask = TASK) -> Cell:
    return Cell(task, method, Setting(2e-3, 0.4), 0)


def plan_of(study, task, method, tmp_path):
    config = cell_config(cell(method, task), study, tmp_path)
    return make_plan(policy_of(config.model.name), config, make_objective(config), ["a fox"], 1)


def trained_steps(study, task, method, tmp_path):
    return plan_of(study, task, method, tmp_path).steps.trainable


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_a_study_is_a_valid_run_whose_sampler_fits_its_model(name, tmp_path):
    study = STUDIES[name]
    for task in study_tasks(study):
        for method in task_methods(study, task):
            assert trained_steps(study, task, method, tmp_path)
            assert cell_config(cell(method, task), study, tmp_path).reward.weights == {task.reward: 1.0}


def test_methods_differ_only_in_their_objective_and_rollout(tmp_path):
    study = small(methods=tuple(STUDY_METHODS))
    base = cell_config(cell("ppo"), study, tmp_path)
    for name in task_methods(study, TASK):
        config = cell_config(cell(name), study, tmp_path)
        for section in ("model", "prompts", "reward", "advantage", "lora", "guard"):
            assert getattr(config, section) == getattr(base, section)
        for section in ("rollout", "optimizer"):
            same = getattr(base, section)
            changed = {k for k, v in getattr(config, section) if v != getattr(same, k)}
            assert changed <= set(getattr(STUDY_METHODS[name], section))


def test_a_setting_is_the_learning_rate_and_the_kl_weight_and_the_clip_range_is_the_trainers(tmp_path):
    config = cell_config(cell("pcpo"), small(), tmp_path)
    assert (config.optimizer.learning_rate, config.objective.kl_weight) == (2e-3, 0.4)
    assert config.objective.clip_range == CLIP_RANGE == PRESETS["embedded"].clip_range


@pytest.mark.parametrize("task", study_tasks(STUDIES["proportionality"]), ids=lambda task: task.recipe)
def test_credits_differ_in_what_their_names_say(task, tmp_path):
    """Of T steps the last is never trained; 40 % are the first 4 of 10 and 20 of 50."""
    study = STUDIES["proportionality"]
    steps = RECIPES[task.recipe].rollout.get("steps", study.steps)
    for branch in ("", "-branch-1"):
        by_credit = {
            name: trained_steps(study, task, name + branch, tmp_path)
            for name in CREDIT_METHODS
            if name in task_methods(study, task)
        }
        assert by_credit["native"] == by_credit["proportionate"] == list(range(steps - 1))
        assert by_credit["early"] == list(range(steps - 2))
        assert by_credit["first-steps"] == list(range(2 * steps // 5))
    assert ("uniform" in task_methods(study, task)) == (RECIPES[task.recipe].kind == "flow")


def test_an_update_of_the_50_step_task_trains_a_random_fifth_of_them_as_the_protocol_says(tmp_path):
    study, task = STUDIES["proportionality"], StudyTask("dance-ddim-50", "colorfulness")
    for method, count in {"native": 10, "first-steps": 4, "native-branch-1": 2}.items():  # a branch in each of 2 groups
        assert len(plan_of(study, task, method, tmp_path).trained) == count
    said = study_paragraph("proportionality", study)
    assert "10 denoising steps (dance-ddim-50: 50, 20 % of them, drawn at random, trained in an update)" in said


def test_proportionate_credit_is_the_uniform_one_on_ddim_and_not_on_flow(tmp_path):
    for task in (StudyTask("dance-ddim", "colorfulness"), TASK):
        config = cell_config(cell("proportionate", task), STUDIES["proportionality"], tmp_path)
        weights = make_plan(policy_of(config.model.name), config, make_objective(config), ["a fox"], 1).steps.weights
        same = bool((weights[:-1] - weights[0]).abs().max() < 1e-9)
        assert same == (task != TASK)


def test_methods_without_noise_never_share_the_first_latent_of_a_group():
    """A shared first latent and the ODE would make all images of a group equal, so no advantage would be left."""
    for recipe in RECIPES.values():
        for method in STUDY_METHODS.values():
            rollout = {**recipe.rollout, **method.rollout}
            assert not (rollout["noise_level"] == 0 and rollout.get("shared_noise"))


def test_no_training_prompt_is_one_of_tinyeval_or_has_a_combination_that_it_holds_out():
    for reward in STUDY_REWARDS:
        prompts = training_prompts(reward)
        assert not set(prompts) & set(suite_prompts())
        assert not any(is_held_out(known_scene(prompt)) for prompt in prompts)
    assert {task_of(known_scene(prompt)) for prompt in training_prompts(FOLLOWING)} == set(HARD)


@pytest.mark.parametrize("name", STUDIES)
def test_settings_are_never_chosen_on_reported_seeds_and_the_first_rung_has_the_whole_sweep(name):
    study = STUDIES[name]
    assert not set(study.tuning_seeds) & set(study.seeds)
    assert not any(map(study.reads_tinyeval, study.tuning_seeds))
    assert all(study.reads_tinyeval(seed) == (name != "proportionality") for seed in study.seeds)
    assert not study.tuning or study.tuning[0].settings is None
    for sweep in study.sweep.values():
        assert len(set(sweep)) == len(sweep) and (study.tuning or len(sweep) == 1)


def test_a_guarded_run_is_evaluated_wherever_the_guard_measures():
    study = STUDIES["guard"]
    measured = [u for u in range(1, study.updates + 1) if u % study.guard["every"] == 0 or u == study.updates]
    assert set(measured) <= set(evaluation_updates(study, study.updates))


def test_evaluations_are_evenly_spaced_over_runs_of_any_length():
    study = STUDIES["frontier"]
    assert evaluation_updates(study, 16) == [4, 8, 12, 16]
    assert evaluation_updates(study, 77) == [20, 39, 58, 77]
    assert evaluation_updates(study, 4) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in study_tasks(STUDIES["frontier"]) if task.reward == FOLLOWING])
def test_runs_for_a_budget_make_as_many_model_evaluations_with_every_method(tmp_path, task):
    study, made = STUDIES["frontier"], {}
    for method in task_methods(study, task):
        for setting in (Setting(1e-3), Setting(1e-3, 0.3)):
            configs = [cell_config(Cell(task, method, setting, seed), study, tmp_path) for seed in (0, 100)]
            assert configs[0].run.updates == configs[1].run.updates
            made[method, setting] = configs[0].run.updates * evaluations_per_update(configs[0])
    assert all(abs(evaluations / study.budgets[FOLLOWING] - 1) < 0.05 for evaluations in made.values()), made


def test_the_model_evaluations_of_an_update_by_hand(tmp_path):
    """2 images in 3 steps, of which 2 are trained: 6 in the rollout, 4 per epoch, and 4 for the KL, measured once."""
    config = cell_config(Cell(TASK, "ppo", Setting(1e-3), 0), small(), tmp_path)
    assert evaluations_per_update(config) == 6 + 4
    assert evaluations_per_update(with_options(config, {"objective": {"kl_weight": 0.1}})) == 6 + 4 + 4
    assert evaluations_per_update(with_options(config, {"optimizer": {"epochs": 3}})) == 6 + 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pcpo", "pcpo-branch-1", "nft"])
def test_the_price_of_an_update_is_what_runs_are_metered_by(tmp_path, method):
    study = small(methods=(method,), updates=3, evaluate_every=3)
    one = Cell(TASK, method, Setting(1e-3, 0.1), 0)
    run_if_free(one, study, tmp_path, print)
    config = cell_config(one, study, tmp_path)
    spent = read_result(one, study, tmp_path)["rows"][-1]["model_evaluations"]
    assert spent == pytest.approx(3 * evaluations_per_update(config), rel=0.25 if config.rollout.branch else 0)


def test_each_further_tuning_seed_is_run_with_the_best_settings_so_far(tmp_path):
    study = small(sweep=NINE, tuning=(Rung(100, 9), Rung(101, 2)))
    sweep = task_sweep(study, TASK)
    lucky, right = sweep[3], sweep[4]
    first = tune(study, TASK, "ppo", tmp_path)
    assert [(one.setting, one.seed) for one in first.due] == [(setting, 100) for setting in sweep]
    assert (first.done, first.planned, first.chosen) == (0, 11, None)
    for one in first.due:
        write(one, study, tmp_path, {lucky: 1.5, right: 1.0}.get(one.setting, 0.1))
    second = tune(study, TASK, "ppo", tmp_path)
    assert [(one.setting, one.seed) for one in second.due] == [(lucky, 101), (right, 101)]
    for one in second.due:
        write(one, study, tmp_path, 1.0 if one.setting == right else 0.2)
    last = tune(study, TASK, "ppo", tmp_path)
    assert (last.due, last.done, last.planned, last.chosen) == ([], 11, 11, right)


def test_beyond_an_edge_with_a_methods_best_settings_the_next_values_are_tried(tmp_path):
    study = small(sweep=NINE, tuning=(Rung(100, 9), Rung(101, 2)), beyond={"flow": Beyond(1e-4, 1.0, (10.0,))})
    inner, corner, further = Setting(1e-2, 0.1), Setting(1e-3, 1.0), Setting(1e-3, 10.0)
    for one in tune(study, TASK, "ppo", tmp_path).due:
        write(one, study, tmp_path, {inner: 0.8, corner: 1.0}.get(one.setting, 0.1))
    second = tune(study, TASK, "ppo", tmp_path)
    assert [(one.setting, one.seed) for one in second.due] == [(Setting(1e-4, 1.0), 100), (further, 100)]
    assert (second.done, second.planned) == (9, 13)
    for one in second.due:
        write(one, study, tmp_path, 1.5 if one.setting == further else 0.1)
    third = tune(study, TASK, "ppo", tmp_path)
    assert [(one.setting, one.seed) for one in third.due] == [(further, 101), (corner, 101)]
    for one in third.due:
        write(one, study, tmp_path, 1.0)
    assert tune(study, TASK, "ppo", tmp_path).chosen == further
    assert "Chosen at the largest KL weight tried: native PPO." in edge_note(collect("quick", study, tmp_path).tasks[0])


def test_a_choice_with_the_largest_kl_weight_is_tuned_further_on_every_seed(tmp_path):
    beyond = {"flow": Beyond(1e-4, 1.0, (10.0, 100.0))}
    study = small(sweep=NINE, tuning=(Rung(100, 9), Rung(101, 2)), beyond=beyond)
    last, further = Setting(1e-2, 10.0), Setting(1e-2, 100.0)
    gain = {Setting(1e-2, 1.0): 1.0, last: 1.5, further: 1.2}
    while not (found := tune(study, TASK, "ppo", tmp_path)).chosen:
        for one in found.due:
            write(one, study, tmp_path, gain.get(one.setting, 0.1))
    assert [(one.setting, one.seed) for one in found.due] == [] and found.chosen == last
    assert [len(found.gains[one]) for one in (last, further)] == [2, 2]
    assert found.done == found.planned == 9 + 2 + 2 + 2


def test_long_runs_are_tuned_on_the_first_seed_alone_and_beyond_an_edge(tmp_path):
    study = small(
        sweep=NINE,
        tuning=(Rung(100, 9), Rung(101, 2)),
        beyond={"flow": Beyond(1e-4, 1.0, ())},
        tuned_once=(TASK.recipe,),
    )
    for one in tune(study, TASK, "ppo", tmp_path).due:
        write(one, study, tmp_path, 1.0 if one.setting == Setting(1e-1, 0.0) else 0.1)
    (more,) = tune(study, TASK, "ppo", tmp_path).due
    assert (more.setting, more.seed) == (Setting(1.0, 0.0), 100)
    write(more, study, tmp_path, 0.5)
    assert tune(study, TASK, "ppo", tmp_path).chosen == Setting(1e-1, 0.0)


def test_a_setting_is_not_chosen_for_gains_that_lose_the_diversity(tmp_path):
    study = small(sweep=NINE, tuning=ONE_SEED)
    for one in tune(study, TASK, "pcpo", tmp_path).due:
        fast = one.setting.learning_rate == 1e-1
        write(one, study, tmp_path, 2.0 if fast else 1.0 + one.setting.kl_weight / 10, diversity=0.5 if fast else 1.0)
    assert tune(study, TASK, "pcpo", tmp_path).chosen == Setting(1e-3, 1.0)
    table = tuning_table(collect("quick", study, tmp_path).tasks[0])
    assert "| PCPO | 0 | 1.00 | 1.00 | 0.40 |" in table and "| PCPO | 1 | **1.10** | 1.10 | 0.40 |" in table


def test_a_kl_weight_of_0_is_no_edge_of_the_sweep():
    sweep = NINE["flow"]
    assert edges(Setting(1e-2, 0.0), sweep) == edges(Setting(1e-2, 0.1), sweep) == []
    assert edges(Setting(1e-3, 1.0), sweep) == ["the lowest learning rate", "the largest KL weight"]
    assert edges(Setting(1e-1, 0.0), sweep) == ["the highest learning rate"]
    assert edges(Setting(1e-2, 0.0), [Setting(1e-2, 0.0)]) == []


def test_the_report_names_choices_on_an_edge_and_methods_that_are_still_tuned(tmp_path):
    study = small(sweep=NINE, tuning=ONE_SEED, methods=("ppo", "pcpo", "nft"))
    for method, sign in (("ppo", 1), ("pcpo", -1)):
        for one in tune(study, TASK, method, tmp_path).due:
            write(one, study, tmp_path, sign * one.setting.learning_rate)
    write(tune(study, TASK, "nft", tmp_path).due[0], study, tmp_path, 1.0)
    note = edge_note(collect("quick", study, tmp_path).tasks[0])
    assert "Chosen at the highest learning rate tried: native PPO." in note
    assert "Chosen at the lowest learning rate tried: PCPO." in note
    assert note.endswith("Tuning not finished: DiffusionNFT.")


def test_finished_runs_that_nothing_else_reports_are_listed(tmp_path):
    study = small(sweep=NINE, tuning=ONE_SEED, seeds=(0, 1, 2))
    fill(study, tmp_path, lambda cell: cell.setting.learning_rate + cell.seed)
    assert left_out_rows(collect("quick", study, tmp_path)) == []
    for seed in study.seeds:
        write(Cell(TASK, "pcpo", Setting(1e-2, 0.1), seed), study, tmp_path, float(seed))
    write(Cell(TASK, "ppo", Setting(5e-4, 0.0), 100), study, tmp_path, 0.5)
    first, second = left_out_rows(collect("quick", study, tmp_path))
    assert first == ["quick", "flow-grpo/colorfulness", "native PPO", "0.0005, 0", "100", "0.50"]
    assert second[2:5] == ["PCPO", "0.01, 0.1", "0, 1, 2"] and second[5].startswith("1.00 [")


def test_methods_of_the_first_wave_come_first_and_a_method_is_reported_once_it_is_tuned(tmp_path):
    study = small(methods=("ppo", "pcpo"), later=("nft",), sweep=NINE, tuning=ONE_SEED, seeds=(0, 1))
    assert study.waves == (("ppo", "pcpo"), ("nft",))
    assert progress(study, tmp_path) == (0, 3 * (9 + 2))
    for one in tune(study, TASK, "pcpo", tmp_path).due:
        write(one, study, tmp_path, one.setting.learning_rate)
    due = due_cells(study, TASK, ("ppo", "pcpo"), tmp_path)
    assert [one.method for one in due] == ["ppo"] * 9 + ["pcpo"] * 2
    assert [one.seed for one in due[9:]] == [0, 1]
    write(due[-1], study, tmp_path, 0.5)
    assert progress(study, tmp_path) == (10, 33)


def test_each_task_is_tuned_by_itself(tmp_path):
    other = StudyTask("dance-sde", "polish")
    study = small(tasks=((TASK.recipe, TASK.reward), (other.recipe, other.reward)), sweep=NINE, tuning=ONE_SEED)
    for one in tune(study, TASK, "ppo", tmp_path).due:
        write(one, study, tmp_path, 1.0)
    assert tune(study, TASK, "ppo", tmp_path).chosen is not None
    assert tune(study, other, "ppo", tmp_path).chosen is None
    ddim = dataclasses.replace(study, tasks=(("dance-ddim", "colorfulness"),), methods=("ppo", "tempflow-grpo"))
    assert task_methods(ddim, study_tasks(ddim)[0]) == ["ppo"]
