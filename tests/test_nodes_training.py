"""Training inside a ComfyUI host in this process: gradients, runs, interruption, resume."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import comfy_host

comfy_host.skip_without_host()

import torch  # noqa: E402

NODES = comfy_host.load_pack()
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402

from comfyui_pcpo.tiny import pipelines  # noqa: E402

job = comfy_host.pack_module("nodes.job")
comfy_policy = comfy_host.pack_module("nodes.comfy_policy")
types = comfy_host.pack_module("nodes.types")
config_module = comfy_host.pack_module("trainer.config")
run_module = comfy_host.pack_module("trainer.run")
align = comfy_host.pack_module("trainer.align")
DiffusersPolicy = comfy_host.pack_module("trainer.diffusers_policy").DiffusersPolicy
ConfigError = config_module.ConfigError
LINES = ("a red fox", "a blue rocket")


def call(node, *args, **kwargs):
    with torch.inference_mode():
        return NODES[node].execute(*args, **kwargs).result


class Setup:
    def __init__(self, name):
        self.name = name
        self.model, self.clip, self.vae = call("PCPOLoadTinyModel", name)
        self.prompts = call("PCPOPrompts", self.clip, "\n".join(LINES), "")[0]
        self.reward = call("PCPOLoadReward", "colorfulness")[0]
        self.latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def train(self, name, updates=2, **widgets):
        small = {"prompts_per_update": 2, "group_size": 4, "steps": 4, "rank": 4, "learning_rate": 3e-3}
        return call(
            "PCPOTrainLoRA", model=self.model, vae=self.vae, prompts=self.prompts, reward=self.reward,
            latent_image=self.latent, name=name, updates=updates, **{**small, **widgets},
        )  # fmt: skip

    def sample(self):
        return call(
            "PCPOKSampler", self.model, 1, 4, 2.0, "training", self.prompts.positive[0], self.prompts.negative,
            self.latent, 1.0, "auto", -1.0,
        )[0]["samples"]  # fmt: skip


@pytest.fixture(scope="module", params=pipelines.EMBEDDED)
def tiny(request):
    return Setup(request.param)


@pytest.fixture(scope="module")
def flow():
    return Setup("emoji-flow")


def config(name, **rollout):
    return config_module.build(
        {
            "model": {"name": name},
            "prompts": {"lines": list(LINES)},
            "rollout": {"prompts_per_update": 2, "group_size": 4, "steps": 4, "cfg": 2.0, **rollout},
            "reward": {"weights": {"colorfulness": 1.0}},
            "lora": {"rank": 4},
            "optimizer": {"learning_rate": 3e-3},
        },
        "test",
    )


def random_pairs(pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: tuple(torch.randn(t.shape, generator=generator) * 0.05 for t in pair) for k, pair in pairs.items()}


def inside(setup, c, work):
    """`work(policy)` where training happens: inside guider.sample()."""
    return comfy_policy.with_policy(setup.model, setup.vae, setup.prompts, c, setup.latent["samples"], work)


def test_prediction_and_gradients_equal_diffusers(tiny):
    c = config(tiny.name)
    reference = DiffusersPolicy(pipelines.load_tiny(tiny.name, pipelines.MODELS), c)
    pairs = random_pairs(dict(sorted(reference.lora().items())))

    def work(policy):
        assert policy.lora().keys() == reference.lora().keys()
        grid = policy.grid(4)
        assert torch.allclose(grid.levels, reference.grid(4).levels, atol=1e-6)
        x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        found = []
        for p in (policy, reference):
            p.grid(4)
            p.load_lora(pairs)
            out = p.predict(x, p.grid(4).timesteps.tolist()[1], p.encode(list(LINES)).rows([0, 1, 1, 0]))
            out.square().sum().backward()
            found.append((out.detach(), {n: factor_gradients(p, n) for n in pairs}))
        return found

    (out, mine), (expected, theirs) = inside(tiny, c, work)
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
    for name in pairs:
        for a, b in zip(mine[name], theirs[name], strict=True):
            assert (a - b).norm() < 1e-3 * b.norm() + 1e-6, name


def factor_gradients(policy, name):
    if isinstance(policy, DiffusersPolicy):
        layer = policy._layers()[name]
        return layer.lora_A["pcpo"].weight.grad, layer.lora_B["pcpo"].weight.grad
    layer = policy.layers[name]
    return layer.down.grad, layer.up.grad


def finite_difference(policy, steps=4, size=2e-2):
    """Derivative of a smooth loss along a random direction: by backward, and by differences."""
    t = policy.grid(steps).timesteps.tolist()[1]
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    start = random_pairs(policy.lora())
    direction = random_pairs(policy.lora(), 9)
    rows = policy.encode([policy.lines[0]]).rows([0, 0])

    def loss():
        return (policy.predict(x, t, rows) * along).sum()

    def moved(amount):
        policy.load_lora({k: tuple(a + amount * b for a, b in zip(start[k], direction[k], strict=True)) for k in start})
        with torch.no_grad():
            return float(loss().double())

    policy.load_lora(start)
    loss().backward()
    slope = sum(
        float((p.grad * d).sum())
        for layer, pair in zip(policy.layers.values(), direction.values(), strict=True)
        for p, d in zip((layer.down, layer.up), pair, strict=True)
    )
    return slope, (moved(size) - moved(-size)) / (2 * size)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_finite_differences(tiny, checkpointing):
    c = config(tiny.name)
    c = c.model_copy(update={"model": c.model.model_copy(update={"gradient_checkpointing": checkpointing})})
    slope, expected = inside(tiny, c, finite_difference)
    assert slope == pytest.approx(expected, rel=1e-2)


def test_one_update_equals_the_trainers(tiny):
    """The same LoRA, noise and prompts: the loop on both policies gives the same record."""
    c = config(tiny.name)
    c = c.model_copy(update={"run": c.run.model_copy(update={"updates": 1})})
    reference = DiffusersPolicy(pipelines.load_tiny(tiny.name, pipelines.MODELS), c)
    pairs = reference.lora()
    rewards = {r.name: r for r in tiny.reward.rewards}

    def work(policy):
        policy.load_lora(pairs)
        return next(align.align(align.make_learner(policy, c), rewards, list(LINES), c))

    found = inside(tiny, c, work)
    expected = next(align.align(align.make_learner(reference, c), rewards, list(LINES), c))
    assert (found.images - expected.images).abs().max() < 2e-3
    assert found.metrics["first_log_ratio_abs_max"] < 1e-5
    for key in ("reward_mean", "loss", "grad_norm"):
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=2e-2), key


def test_a_run_leaves_the_model_as_it_was_and_a_whole_folder(flow):
    before = flow.sample()
    lora, losses, count, run = flow.train("whole")
    assert torch.equal(flow.sample(), before)
    assert count == 2 and len(losses["loss"]) == 2
    files = {p.name for p in run.path.iterdir()}
    assert {
        "config.toml",
        "metrics.jsonl",
        "curves.png",
        "grids",
        "lora.safetensors",
        "checkpoints",
        "log.txt",
    } <= files
    assert run_module.RunFolder(run.path).config().model.name == "emoji-flow"
    loaded = call("LoraModelLoader", flow.model, lora, 1.0)[0]
    assert len(loaded.patches) > 0 and not any("forward" in vars(m) for m in flow.model.model.modules())


def test_a_taken_name_gets_a_number(flow):
    first, second = (flow.train("twice", updates=1)[3].path for _ in range(2))
    assert (first.name, second.name) == ("twice", "twice-2")


def test_a_resumed_run_equals_an_uninterrupted_one(flow):
    whole = flow.train("uninterrupted", updates=3)[0]
    flow.train("resumed", updates=1)
    resumed, _, count, _ = flow.train("resumed", updates=3, resume=True)
    assert count == 3
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_interrupt_keeps_finished_updates_and_the_next_run_works(flow, monkeypatch):
    calls = {"left": 30}

    def tick():
        calls["left"] -= 1
        if calls["left"] == 0:
            mm.interrupt_current_processing()
        mm.throw_exception_if_processing_interrupted()

    before = flow.sample()
    with monkeypatch.context() as patched:
        patched.setattr(job, "tick", tick)
        with pytest.raises(mm.InterruptProcessingException):
            flow.train("cancelled", updates=50)
    folder = run_module.RunFolder(job.runs_folder() / "cancelled")
    done = len(folder.records())
    assert done >= 1 and folder.numbers()[-1] == done
    assert torch.equal(flow.sample(), before)
    assert flow.train("cancelled", updates=done + 1, resume=True)[2] == done + 1


def test_out_of_memory_names_the_inputs_and_the_next_run_works(flow, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(job, "tick", full)
        with pytest.raises(ConfigError, match="images_at_once 16 at 64 x 64"):
            flow.train("full")
    assert flow.train("room", updates=1)[2] == 1


def test_a_lora_below_and_a_lora_to_go_on_from(flow):
    lora = flow.train("first", updates=1)[0]
    again = flow.train("second", updates=1, lora=lora)[0]
    assert any(not torch.equal(lora[k], again[k]) for k in lora)
    loaded = Setup.__new__(Setup)
    loaded.__dict__.update(flow.__dict__, model=call("LoraModelLoader", flow.model, lora, 1.0)[0])
    assert loaded.train("on-top", updates=1)[2] == 1


def test_compare_shows_the_same_noise_on_both_sides(flow):
    lora = flow.train("compared", updates=1)[0]
    still = {k: torch.zeros_like(v) for k, v in lora.items()}
    before, after, grid, report = call("PCPOCompare", flow.model, still, flow.vae, flow.prompts, 0, 4, 1.0, flow.reward)
    assert torch.equal(before, after) and before.shape[0] == 2 and grid.shape[0] == 1
    assert "before" in report


def test_refusals_before_any_work(flow):
    refuse = NODES["PCPOTrainLoRA"].validate_inputs
    assert "group_size" in str(refuse(name="a", group_size=1))
    assert "run.name" in str(refuse(name="../a", group_size=8))
    assert refuse(name="a", group_size=8) is True
    bypass = call("LoraModelLoader", flow.model, {}, 1.0)[0]
    module = bypass.model.diffusion_model.x_embedder
    object.__setattr__(module, "forward", module.forward)
    try:
        with pytest.raises(ConfigError, match="replaced forward"):
            flow.train("refused", updates=1)
    finally:
        object.__delattr__(module, "forward")


def stock_model(family):
    """A tiny random model of another family, through the host's own loader under inference mode, as its nodes do."""
    import diffusers

    torch.manual_seed(0)
    if family == "flux":
        core = diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
            joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
        width = (64, 32)
    else:
        core = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=32, out_channels=16,
            pos_embed_max_size=8,
        )  # fmt: skip
        width = (64, 32)
    state = {k: v.detach() + 0.02 * torch.randn_like(v) for k, v in core.state_dict().items()}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
        conds = [[[torch.randn(1, 8, width[0]), {"pooled_output": torch.randn(1, width[1])}]] for _ in range(2)]
    setup = Setup.__new__(Setup)
    setup.name, setup.model, setup.vae = family, model, None
    setup.prompts = types.EncodedPrompts(LINES[:1], (conds[0],), "", conds[1])
    setup.latent = {"samples": torch.zeros(1, 16, 8, 8)}
    return setup


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_gradients_of_stock_families_equal_finite_differences(family, checkpointing):
    setup = stock_model(family)
    c = config(family)
    c = c.model_copy(update={"model": c.model.model_copy(update={"gradient_checkpointing": checkpointing})})
    slope, expected = inside(setup, c, finite_difference)
    assert slope == pytest.approx(expected, rel=1e-2)
    assert comfy_policy.family_of(setup.model.model) == family


def test_fp8_weights_train(flow):
    """The host keeps the base in fp8 and casts each weight when it is used."""
    state = {k: v.clone() for k, v in flow.model.model.diffusion_model.state_dict().items()}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float8_e4m3fn})
    assert model.model.diffusion_model.joint_blocks[0].x_block.attn.proj.weight.dtype == torch.float8_e4m3fn
    small = Setup.__new__(Setup)
    small.__dict__.update(flow.__dict__, model=model)
    slope, expected = inside(small, config("emoji-flow"), finite_difference)
    assert slope == pytest.approx(expected, rel=3e-2)
