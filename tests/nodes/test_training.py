"""Training, in process: runs, interruption, resume, and the state that they leave."""

import copy
import json
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import torch  # noqa: E402

comfy_host.load_pack()
import comfy.latent_formats  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_families  # noqa: E402
import comfy_models  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402
from comfy_models import LINES, biggest  # noqa: E402

from comfyui_pcpo.reward import RewardSettings  # noqa: E402
from comfyui_pcpo.reward.color import Colorfulness  # noqa: E402
from comfyui_pcpo.taste.encoders import tiny_encoder  # noqa: E402
from comfyui_pcpo.taste.learned import Taste, TasteReport  # noqa: E402
from comfyui_pcpo.tiny import pipelines  # noqa: E402

pytestmark = pytest.mark.slow

call = comfy_host.execute
job = comfy_host.pack_module("nodes.job")
ksampler = comfy_host.pack_module("nodes.host.ksampler")
comfy_policy = comfy_host.pack_module("nodes.host.policy")
types = comfy_host.pack_module("nodes.types")
settings = comfy_host.pack_module("trainer.config.schema")
options = comfy_host.pack_module("trainer.config.loading")
run_module = comfy_host.pack_module("trainer.runs.folder")
launch = comfy_host.pack_module("trainer.runs.launch")
loading = comfy_host.pack_module("trainer.policy.loading")
lora_pairs = comfy_host.pack_module("trainer.policy.lora_pairs")
align = comfy_host.pack_module("trainer.loop.align")
learning = comfy_host.pack_module("trainer.loop.state")
ConfigError = settings.ConfigError
HOST_MODEL = comfy_host.pack_module("trainer.runs.identity").HOST_MODEL


@pytest.fixture(scope="module", params=pipelines.EMBEDDED)
def tiny(request):
    return comfy_models.Tiny(request.param)


@pytest.fixture(scope="module")
def flow():
    return comfy_models.Tiny("emoji-flow")


def config(name, **run):
    return options.build(
        {
            "model": {"name": name, "device": "cpu"},
            "prompts": {"lines": list(LINES)},
            "rollout": {"prompts_per_update": 2, "group_size": 4, "steps": 4, "height": 64, "width": 64},
            "reward": {"weights": {"colorfulness": 1.0}},
            "lora": {"rank": 4},
            "optimizer": {"learning_rate": 3e-3},
            "run": run,
        },
        "test",
    )


def inside(setup, c, work, prompts=None):
    """`work(policy)` where training happens: inside guider.sample()."""
    return comfy_policy.with_policy(
        setup.model, setup.vae, prompts or setup.prompts, c, setup.latent(1)["samples"], work
    )


def on_call(model, number, action):
    """A MODEL that runs `action` before its call `number`, -> (model, list of calls)."""
    calls, wrapped = [], model.clone()

    def wrapper(apply, args):
        calls.append(1)
        if len(calls) == number:
            action()
        return apply(args["input"], args["timestep"], **args["c"])

    wrapped.set_model_unet_function_wrapper(wrapper)
    return wrapped, calls


@pytest.mark.parametrize(
    "changes",
    [{"objective": {"name": name}} for name in ("log_hinge", "awm", "nft")] + [{"rollout": {"branch": 2}}],
    ids=["log_hinge", "awm", "nft", "branch"],
)
def test_one_update_equals_the_trainers(tiny, changes):
    """With the same LoRA, noise and prompts, the loop gives the same record on both policies."""
    c = options.with_options(config(tiny.name, updates=1), changes)
    reference = loading.make_policy(c)
    pairs, rewards = reference.lora(), {r.name: r for r in tiny.reward.rewards}

    def work(policy):
        assert policy.lora().keys() == pairs.keys()
        policy.load_lora(pairs)
        return next(align.align(learning.make_training_state(policy, c), align.Job(c, LINES, rewards)))

    result = inside(tiny, c, work)
    expected = next(align.align(learning.make_training_state(reference, c), align.Job(c, LINES, rewards)))
    assert (result.images - expected.images).abs().max() < 2e-3
    assert result.metrics["first_log_ratio_abs_max"] < 1e-5
    assert result.metrics["model_evaluations"] == expected.metrics["model_evaluations"]
    for key in ("reward_mean", "loss", "grad_norm"):
        assert result.metrics[key] == pytest.approx(expected.metrics[key], rel=2e-2), key


def conditionings(flow):
    """The kinds of conditionings that stock nodes make."""
    left, right = flow.encode("a red fox"), flow.encode("a blue rocket")
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    halves = [call("ConditioningSetArea", c, 64, 32, x, 0, 1.0)[0] for c, x in ((left, 0), (right, 32))]
    ranges = [call("ConditioningSetTimestepRange", c, *span)[0] for c, span in ((left, (0, 0.5)), (right, (0.5, 1)))]
    return {
        "areas": call("ConditioningCombine", *halves)[0],
        "mask": call("ConditioningCombine", call("ConditioningSetMask", left, mask, "default", 0.7)[0], right)[0],
        "ranges": call("ConditioningCombine", *ranges)[0],
        "average": call("ConditioningAverage", left, right, 0.3)[0],
        "longer": call("ConditioningConcat", left, right)[0],
    }


@pytest.mark.parametrize("kind", ["areas", "mask", "ranges", "average", "longer"])
def test_predictions_for_every_kind_of_conditioning_equal_comfyuis(flow, kind):
    """One stock step from noise to 0 gives ComfyUI's own prediction."""
    cond, c = conditionings(flow)[kind], config("emoji-flow")
    c = c.model_copy(update={"rollout": c.rollout.model_copy(update={"cfg": 2.0})})
    prompts = types.EncodedPrompts(LINES, (cond, flow.encode("a blue rocket")), "", flow.negative)

    def work(policy):
        t = policy.grid(4).timesteps.tolist()[1]
        sigma = policy.sigma[t]
        out = policy.predict(sigma * noise, t, policy.encode([LINES[0]]))
        out.sum().backward()
        assert all(p.grad is not None for p in policy.trainable())
        return out.detach(), sigma

    noise = comfy_models.comfy.sample.prepare_noise(flow.latent(1)["samples"], 3)
    out, sigma = inside(flow, c, work, prompts)
    guider = flow.guider(cfg=2.0)
    guider.set_conds(cond, flow.negative)
    guess = comfy_models.sample(guider, torch.tensor([sigma, 0.0]), flow.latent(1))
    assert biggest(sigma * noise - sigma * out, guess) < 1e-5


def test_a_run_leaves_the_model_as_it_was(tiny):
    before, stock = tiny.ksample(cfg=2.0)[0], tiny.stock()
    lora, losses, count, run = tiny.train("whole")
    assert torch.equal(tiny.ksample(cfg=2.0)[0], before) and torch.equal(tiny.stock(), stock)
    assert count == 2 and len(losses["loss"]) == 2
    assert run_module.RunFolder(run.path).config().model.name == tiny.name
    loaded = call("LoraModelLoader", tiny.model, lora, 1.0)[0]
    assert len(loaded.patches) > 0 and biggest(tiny.stock(model=loaded), stock) > 0
    assert not any("forward" in vars(m) or m._forward_hooks for m in tiny.model.model.modules())


def finish(run):
    """Do the run headless, -> the numbers of its updates."""
    numbers = []
    with run:
        for update in align.align(run.state, run.job):
            run.keep(update)
            numbers.append(update.number)
    return numbers


def test_the_run_folder_is_the_command_lines(flow, tmp_path):
    """The same files, the same configuration except for the run's name, the same fields in each record."""
    run = flow.train("like-the-command-line", preview_every=1, save_every=1)[3].path
    c = run_module.RunFolder(run).config()
    c = c.model_copy(update={"run": c.run.model_copy(update={"folder": tmp_path, "name": "theirs"})})
    theirs = launch.start_run(c)
    finish(theirs)
    folder = theirs.folder

    def tree(path):
        return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.name != ".lock"} - {"log.txt"}

    assert tree(run) == tree(folder.path)
    mine, theirs = (run_module.RunFolder(p) for p in (run, folder.path))
    assert options.dump(theirs.config()) == options.dump(c)
    assert [row.keys() for row in mine.records()] == [row.keys() for row in theirs.records()]
    shapes = [{k: v.shape for k, v in lora_pairs.read_lora(f.lora_file)[0].items()} for f in (mine, theirs)]
    assert shapes[0] == shapes[1]


def test_the_command_line_continues_the_nodes_run_and_the_node_the_command_lines(flow):
    run = flow.train("there-and-back", updates=1)[3].path
    assert finish(launch.resume_run(run, launch.ResumeOptions(updates=2))) == [2]
    assert flow.train("there-and-back", updates=3, resume=True)[2] == 3


def test_the_node_continues_a_command_lines_run_with_options_that_have_no_widget(flow):
    path = flow.train("no-widget", updates=1)[3].path
    folder = run_module.RunFolder(path)
    config = folder.config().model_copy(deep=True)
    config = options.with_options(config, {"run": {"name": "no-widget-window"}, "advantage": {"kind": "window"}})
    assert finish(launch.start_run(config)) == [1]
    flow.train("no-widget-window", updates=2, resume=True)
    assert run_module.RunFolder(path.parent / "no-widget-window").config().advantage.kind == "window"


def test_what_a_prompt_by_api_leaves_out_has_the_widgets_default(flow):
    schema = comfy_host.load_pack()["PCPOTrainLoRA"].GET_SCHEMA()
    optional = {i.id: i.default for i in schema.inputs if i.optional and hasattr(i, "default")}
    given = {"updates": 1, "prompts_per_update": 2, "group_size": 4, "steps": 4, "rank": 4, "learning_rate": 3e-3}
    connected = {name: getattr(flow, name) for name in ("model", "vae", "prompts", "reward")}
    connected |= {"latent_image": flow.latent(1), "credit": "proportionate", "seed": 0}
    left_out, spelled_out = (
        run_module.RunFolder(call("PCPOTrainLoRA", name=name, **connected, **given, **more)[3].path).config()
        for name, more in (("left-out", {}), ("spelled-out", optional))
    )
    assert left_out.model_dump(exclude={"run": {"name"}}) == spelled_out.model_dump(exclude={"run": {"name"}})
    assert left_out.guard.every > 0


def test_a_taken_name_gets_a_number(flow):
    first, second = (flow.train("twice", updates=1)[3].path for _ in range(2))
    assert (first.name, second.name) == ("twice", "twice-2")


def test_a_resumed_run_equals_an_uninterrupted_one(tiny):
    whole = tiny.train(f"uninterrupted-{tiny.name}", updates=3)[0]
    tiny.train(f"resumed-{tiny.name}", updates=1)
    resumed, _, count, _ = tiny.train(f"resumed-{tiny.name}", updates=3, resume=True)
    assert count == 3
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_run_is_not_resumed_on_another_base(flow):
    """The LoRA and the optimizer's moments belong to the model that they were trained on."""
    base = flow.on(comfy_models.lora_on(flow, 1))
    base.train("on-a-lora", updates=1)
    assert base.train("on-a-lora", updates=2, resume=True)[2] == 2
    for other in (flow, flow.on(comfy_models.lora_on(flow, 2)), flow.on(comfy_models.lora_on(flow, 1, strength=0.5))):
        with pytest.raises(ConfigError, match=r"the model has other weights.*Undo that, or turn resume off"):
            other.train("on-a-lora", updates=3, resume=True)
    flow.train("on-nothing", updates=1)
    with pytest.raises(ConfigError, match="the model has other weights"):
        base.train("on-nothing", updates=2, resume=True)
    comfy_models.forget_loaded()


def test_a_run_is_not_resumed_with_another_noise_schedule(flow):
    """The noise levels decide the credit of every step."""
    shifted = flow.on(ModelSamplingSD3().patch(flow.model, 5.0)[0])
    flow.train("levels", updates=1)
    with pytest.raises(ConfigError, match=r"another noise schedule.*Undo that, or turn resume off"):
        shifted.train("levels", updates=2, resume=True)
    shifted.train("shifted-levels", updates=1)
    assert shifted.train("shifted-levels", updates=2, resume=True)[2] == 2


def test_a_run_is_not_resumed_with_a_taste_that_was_learned_again(flow):
    def liking(direction: float):
        """The model with a loaded taste of one name."""
        probe = tiny_encoder(RewardSettings()).probe()
        report = TasteReport(5, 5, 0.5, 0.1, 0.5, 1.0)
        file = comfy_host.pack_module("nodes.files").tastes_folder() / "again" / "taste.safetensors"
        Taste("emoji-align", direction * torch.ones(len(probe)), 0.0, probe, report).save(file)
        other = copy.copy(flow)
        other.reward = call("PCPOLoadTaste", taste="again")[0]
        return other

    assert liking(1.0).train("taste", updates=1)[2] == 1
    assert liking(1.0).train("taste", updates=2, resume=True)[2] == 2
    with pytest.raises(ConfigError, match=r"the reward again has other weights.*Undo that, or turn resume off"):
        liking(-1.0).train("taste", updates=3, resume=True)


def test_a_run_from_before_its_base_was_recorded_resumes_and_records_it(flow):
    base = flow.on(comfy_models.lora_on(flow, 1))
    folder = run_module.RunFolder(base.train("older", updates=1)[3].path)
    record = json.loads(folder.record_file.read_text())
    del record["identity"][HOST_MODEL]
    folder.record_file.write_text(json.dumps(record))
    assert base.train("older", updates=2, resume=True)[2] == 2
    with pytest.raises(ConfigError, match="the model has other weights"):
        flow.train("older", updates=3, resume=True)
    comfy_models.forget_loaded()


def watched(train, **options) -> list[tuple]:
    """What a training tells the progress bar: (value, total, preview) each time."""
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total, preview)))
    try:
        train(**options)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    return seen


def test_every_update_sends_a_preview(flow):
    seen = watched(flow.train, name="watched", updates=3)
    previews = [preview[1] for value, total, preview in seen if preview is not None and total == 3 * job.BAR_UNITS]
    assert len(previews) == 3 and previews[0].size[0] >= 256
    assert previews[0].tobytes() != previews[2].tobytes()


def test_the_bar_moves_within_an_update_and_never_back(flow):
    """Otherwise a model whose update takes minutes stays at 0 % all that time."""
    values = [value for value, _, _ in watched(flow.train, name="moving", updates=2, guard_every=1)]
    assert values == sorted(values) and values[-1] == 2 * job.BAR_UNITS
    assert any(0 < value < job.BAR_UNITS for value in values)


def test_the_guards_calls_before_the_first_update_are_no_measure_of_one(flow):
    bar = job.RunBar(config("emoji-flow", updates=2))
    guess = bar.expected
    for _ in range(3):
        bar.tick()
    bar.show(0)
    assert bar.expected == guess
    for _ in range(40):
        bar.tick()
    bar.show(1, job.Image.new("RGB", (8, 8)))
    assert bar.expected == 40


def test_the_preview_of_a_large_group_has_images_from_its_best_to_its_worst(flow):
    sizes = []
    for size in (8, 20, 2, 3):
        seen = watched(flow.train, name=f"group-of-{size}", updates=1, group_size=size, prompts_per_update=1)
        sizes += [preview[1].size for _, _, preview in seen if preview is not None]
    widths = [width for width, _ in sizes]
    assert sizes[0] == sizes[1] and max(widths) - min(widths) < 0.1 * max(widths)  # whose curves all have room
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    assert job.best_to_worst(scores, 3).tolist() == [1, 3, 2]
    assert job.best_to_worst(scores, 8).tolist() == [1, 4, 3, 0, 2]


def test_the_preview_has_the_guards_line_once_it_has_measured_twice(flow):
    seen = watched(flow.train, name="watched-by-the-guard", updates=3, guard_every=1)
    heights = [preview[1].size[1] for _, total, preview in seen if preview is not None and total == 3 * job.BAR_UNITS]
    assert heights[0] < heights[1] == heights[2]


def test_the_embedded_models_branch_where_nothing_is_set_and_the_objective_can(flow):
    def branch(name, **widgets):
        return run_module.RunFolder(flow.train(name, updates=1, **widgets)[3].path).config().rollout.branch

    assert [branch("auto-branch", branch=-1), branch("no-branch", branch=0)] == [1, 0]
    assert branch("nft-branch", branch=-1, objective="nft") == 0


def test_a_branching_run_of_the_node_trains_few_evaluations_and_resumes(flow):
    branch = {"branch": 1, "branch_first": 2, "branch_points": 2, "updates": 2}
    whole, _, _, run = flow.train("branching", **branch)
    folder = run_module.RunFolder(run.path)
    r = folder.config().rollout
    assert (r.branch, r.branch_first, r.branch_points) == (1, 2, 2)
    for row in folder.records():
        assert row["model_evaluations"]["rollout"] < 2 * 4 * 4
        assert set(row["per_step"]["steps"]) <= {0, 1}
    flow.train("branching-parts", **{**branch, "updates": 1})
    resumed = flow.train("branching-parts", resume=True, **branch)[0]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    with pytest.raises(ConfigError, match=r"rollout.branch 1 cannot be combined with objective.name = nft"):
        flow.train("refused-branch", branch=1, objective="nft", updates=1)
    assert not (job.runs_folder() / "refused-branch").exists()


def test_the_guard_is_on_where_nothing_is_set_and_off_at_0():
    schema = comfy_host.load_pack()["PCPOTrainLoRA"].GET_SCHEMA()
    defaults = {i.id: vars(i)["default"] for i in schema.inputs if "default" in vars(i)}
    assert 0 < defaults["guard_every"] <= defaults["updates"]
    assert settings.GuardConfig().tolerance >= 0.8  # loose; the node has no widget for it


def test_a_run_without_a_guard_measures_nothing(flow):
    run = flow.train("without-a-guard", updates=1, guard_every=0)[3]
    folder = run_module.RunFolder(run.path)
    assert "guard" not in folder.records()[0] and not folder.guard_file.exists()


def test_a_guarded_run_holds_rewards_of_weight_0_out_and_outputs_the_kept_lora(flow):
    setup, alignment = copy.copy(flow), call("PCPOLoadReward", "alignment")[0]
    setup.reward = call("PCPOCombineRewards", flow.reward, 1.0, alignment, 0.0)[0]
    lora, _, _, run = setup.train("guarded", updates=2, guard_every=1)
    folder = run_module.RunFolder(run.path)
    measured = [row["guard"] for row in folder.records()]
    assert [list(row["held_out"]) for row in measured] == [["alignment"]] * 2
    assert folder.config().guard.every == 1
    kept = call("PCPOLoadRun", run="guarded", checkpoint="kept")[1]
    assert call("PCPOPlotRun", run, 0.6, "guard")[0].shape[0] == 1
    assert kept.keys() == lora.keys() and all(torch.equal(kept[k], lora[k]) for k in kept)


def test_a_run_that_cannot_be_resumed_names_the_inputs_that_continue_it(flow):
    """None of the command line's options, which a user of the node does not have."""
    folder = run_module.RunFolder(flow.train("stopped", updates=1, guard_every=1)[3].path)
    with pytest.raises(ConfigError, match=r"learning_rate was .*\. Undo that, or turn resume off"):
        flow.train("stopped", updates=2, guard_every=1, resume=True, learning_rate=0.01)
    folder.rewrite_config(options.with_options(folder.config(), {"guard": {"patience": 1}}))
    (row,) = folder.records()
    row["guard"]["lost"]["diversity"] = 0.9
    folder.metrics_file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"was stopped by its guard: diversity .* Set guard_every to 0 ") as error:
        flow.train("stopped", updates=2, guard_every=1, resume=True)
    assert "--" not in str(error.value) and "config.toml" not in str(error.value)
    flow.train("stopped", updates=2, guard_every=0, resume=True)
    assert len(folder.records()) == 2


def test_a_group_reward_and_prompts_with_metadata_train_in_the_node(flow, monkeypatch):
    """Scores are distances within the group; the run's configuration keeps the metadata."""
    line = '{"prompt": "a red fox", "tag": "color"}'
    monkeypatch.setattr(flow, "prompts", call("PCPOPrompts", flow.clip, line, "")[0])
    monkeypatch.setattr(flow, "reward", call("PCPOLoadReward", "tiny_diversity")[0])
    folder = run_module.RunFolder(flow.train("diverse", updates=1, save_every=1)[3].path)
    (row,) = folder.records()
    assert set(row["rewards"]) == {"tiny_diversity"} and row["failed"] == 0 and row["reward_std"] > 0
    (prompt,) = folder.config().prompts.read()
    assert (prompt, prompt.metadata) == ("a red fox", {"tag": "color"})


def test_interrupt_stops_at_the_next_step_and_saves_finished_updates(flow):
    before = flow.stock()
    model, calls = on_call(flow.model, 30, mm.interrupt_current_processing)
    with pytest.raises(mm.InterruptProcessingException):
        flow.on(model).train("cancelled", updates=50)
    assert len(calls) == 30
    folder = run_module.RunFolder(job.runs_folder() / "cancelled")
    done = len(folder.records())
    assert done >= 1 and folder.checkpoints.numbers()[-1] == done and folder.lora_file.is_file()
    assert torch.equal(flow.stock(), before)
    again = flow.train("cancelled", updates=done + 1, resume=True)[0]
    whole = flow.train("never-cancelled", updates=done + 1)[0]
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_interrupt_does_not_wait_for_a_reward_elsewhere(flow):
    class Slow(Colorfulness):
        """Asks to cancel when the last images of an update arrive, and then does not answer."""

        elsewhere, calls, released = True, 0, threading.Event()

        def score_batch(self, images, prompts):
            self.calls += 1
            if self.calls == 3:  # before it, the trial and the first half
                mm.interrupt_current_processing()
                self.released.wait(60)
            return super().score_batch(images, prompts)

    reward, slow = Slow(), copy.copy(flow)
    slow.reward = types.WeightedRewards((reward,), (1.0,))
    start = time.perf_counter()
    with pytest.raises(mm.InterruptProcessingException):
        slow.train("not-waited-for", prompts_per_update=1)
    assert time.perf_counter() - start < 60 and reward.calls == 3
    reward.released.set()


def test_out_of_memory_names_the_inputs_saves_finished_updates_and_the_next_run_works(flow):
    def full():
        raise torch.OutOfMemoryError("no room")

    before = flow.stock()
    model, _ = on_call(flow.model, 30, full)
    with pytest.raises(ConfigError, match="images_at_once 16 at 64 x 64"):
        flow.on(model).train("full", updates=50)
    folder = run_module.RunFolder(job.runs_folder() / "full")
    done = len(folder.records())
    assert done >= 1 and folder.checkpoints.numbers()[-1] == done
    assert torch.equal(flow.stock(), before)
    assert flow.train("full", updates=done + 1, resume=True)[2] == done + 1
    assert flow.train("room", updates=1)[2] == 1


@pytest.mark.parametrize(
    ("at_once", "checkpointing", "saved", "named", "absent"),
    [
        (8, False, True, ["set images_at_once to 4, turn on gradient_checkpointing, or use", "set resume"], []),
        (1, True, False, ["To need less, use a smaller latent."], ["images_at_once to", "turn on", "saved"]),
    ],
)
def test_out_of_memory_names_only_what_still_helps(at_once, checkpointing, saved, named, absent):
    sections = {"rollout": {"images_at_once": at_once}, "model": {"gradient_checkpointing": checkpointing}}
    config = options.with_options(settings.Config(), sections)
    message = str(job.out_of_memory(config, torch.OutOfMemoryError("no room"), saved))
    assert all(text in message for text in named) and not any(text in message for text in absent)


def test_a_lora_of_another_model_is_refused_in_words(flow):
    other = comfy_models.random_lora(comfy_models.Tiny("emoji-eps"), 1)
    with pytest.raises(ConfigError, match=r"the connected lora does not belong to this model.*Connect one"):
        flow.train("another-models-lora", updates=1, lora=other)


def test_training_continues_from_a_lora(flow):
    lora = flow.train("first", updates=1)[0]
    again = flow.train("second", updates=1, lora=lora)[0]
    assert any(not torch.equal(lora[k], again[k]) for k in lora)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_run_on_top_of_an_applied_lora(flow, offloaded):
    comfy_models.forget_loaded()
    model = comfy_models.lora_on(flow, 1)
    model = comfy_models.partly_loaded(model) if offloaded else model
    before = flow.stock(model=model)
    assert flow.on(model).train(f"on-top-{offloaded}")[2] == 2
    assert torch.equal(flow.stock(model=model), before)
    comfy_models.forget_loaded()


def test_compare_shows_the_same_noise_on_both_sides(flow):
    lora = flow.train("compared", updates=1)[0]
    still = {k: torch.zeros_like(v) for k, v in lora.items()}
    before, after, grid, report = call("PCPOCompare", flow.model, still, flow.vae, flow.prompts, 0, 4, 1.0, flow.reward)
    assert torch.equal(before, after) and before.shape == (2, 128, 128, 3) and grid.shape[0] == 1
    assert "before" in report


def test_compare_draws_each_prompt_from_noise_of_its_own(flow):
    prompts = types.EncodedPrompts(
        ("a red fox",) * 2, (flow.prompts.positive[0],) * 2, flow.prompts.negative_text, flow.prompts.negative
    )
    still = {k: torch.zeros_like(v) for k, v in comfy_models.random_lora(flow, 1).items()}
    first, later = (call("PCPOCompare", flow.model, still, flow.vae, prompts, seed, 2, 1.0)[0] for seed in (5, 6))
    assert not torch.equal(first[0], first[1]) and torch.equal(first[1], later[0])


def test_compare_tells_why_scores_failed(flow):
    lora = comfy_models.random_lora(flow, 1)
    reward = call("PCPOLoadReward", "tiny_diversity")[0]
    report = call("PCPOCompare", flow.model, lora, flow.vae, flow.prompts, 0, 4, 1.0, reward)[3].splitlines()
    reason = "2 of 2 tiny_diversity scores failed (a single image of a prompt has none to compare with"
    assert [line.split("; ")[0] for line in report[1:]] == [f"{side}: {reason}" for side in ("before", "after")]


def test_compare_refuses_prompts_that_the_reward_cannot_score_before_any_image(flow, monkeypatch):
    monkeypatch.setattr(ksampler.ImageRequest, "generate", None)
    lora, reward = comfy_models.random_lora(flow, 1), call("PCPOLoadReward", "ocr")[0]
    with pytest.raises(ConfigError, match="the prompt 'a red fox' has no text in double quotes"):
        call("PCPOCompare", flow.model, lora, flow.vae, flow.prompts, 0, 4, 1.0, reward)


def test_compare_takes_the_images_of_a_video_models_vae(flow):
    """It decodes to frames, (B, 1, H, W, 3)."""

    class Frames:
        def decode(self, samples):
            return flow.vae.decode(samples)[:, None]

    one = (0, 4, 1.0)
    request = [ksampler.ImageRequest(vae, flow.prompts, flow.latent(1), *one) for vae in (flow.vae, Frames())]
    with torch.inference_mode():
        assert torch.equal(request[0].generate(flow.model), request[1].generate(flow.model))


def test_compare_generates_the_models_own_size_whatever_a_latent_stands_for(flow):
    for family, latents, size in (("sd3", comfy.latent_formats.Flux2(), 64), ("sdxl", None, 128), ("flux", None, 128)):
        model = comfy_families.make(family).model
        latents = model.model.latent_format = latents or model.model.latent_format
        assert ksampler.empty_latent(model)["samples"].shape == (1, latents.latent_channels, size, size)
    assert ksampler.empty_latent(flow.model)["samples"].shape == (1, 16, 16, 16)


def test_compare_makes_one_image_per_prompt_of_any_latent_and_seed(flow):
    """Latent From Batch and Repeat Latent Batch number a batch's images; seeds reach up to 2^64 - 1."""
    numbered = {**flow.latent(2), "batch_index": [0, 1]}
    lora, last = comfy_models.random_lora(flow, 1), 2**64 - 1
    before, *_ = call("PCPOCompare", flow.model, lora, flow.vae, flow.prompts, last, 1, 1.0, None, numbered)
    assert len(before) == len(flow.prompts.lines) and before.isfinite().all()


def test_compare_takes_steps_and_cfg_of_training_at_0(flow):
    inputs = (flow.model, flow.train("compared-auto", updates=1)[0], flow.vae, flow.prompts, 0)
    assert torch.equal(call("PCPOCompare", *inputs, 0, 0.0)[1], call("PCPOCompare", *inputs, 10, 1.0)[1])


class ImageSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG):
    """A sampling type that is neither epsilon, v-prediction nor flow."""


def test_refusals_before_any_work(flow):
    refuse = comfy_host.load_pack()["PCPOTrainLoRA"].validate_inputs
    assert "run.name" in str(refuse(name="../a"))
    assert refuse(name="a") is True and refuse(name=None) is True
    odd = flow.model.clone()
    odd.add_object_patch("model_sampling", ImageSampling(flow.model.model.model_config))
    with pytest.raises(ConfigError, match="supports epsilon prediction, v-prediction and flow matching"):
        flow.on(odd).train("refused", updates=1)
    module = flow.model.model.diffusion_model.x_embedder
    object.__setattr__(module, "forward", lambda x: x)
    try:
        with pytest.raises(ConfigError, match="replaced forward"):
            flow.train("refused", updates=1)
    finally:
        object.__delattr__(module, "forward")
    assert not (job.runs_folder() / "refused").exists()
