"""Train LoRA on tiny random models of the families of today: gradients, updates, files, what is left behind."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy.samplers  # noqa: E402
import comfy_models  # noqa: E402
import host_models  # noqa: E402
import torch  # noqa: E402
from host_gradients import finite_difference, inside  # noqa: E402
from host_models import config  # noqa: E402

from comfyui_pcpo.lora.formats import export_state  # noqa: E402

pytestmark = pytest.mark.slow

ATTENTION = re.compile(r"(attn|attention)\d?\.")
SURROUNDINGS = re.compile(  # of the blocks, and their modulations
    r"mod(ulation)?\b|adaln|adaLN|^(?!.*(blocks|layers|refiner)\.)|llm_adapter|caption_projection|distilled_guidance"
)
adapter = comfy_host.pack_module("nodes.host.adapter")
align = comfy_host.pack_module("trainer.loop.align")
differentiable = comfy_host.pack_module("nodes.host.differentiable")
learning = comfy_host.pack_module("trainer.loop.state")
DEAD_ENDS = ("add_q_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")  # the last block's, for text alone


@pytest.fixture(scope="module", params=host_models.CONFIGS)
def family(request):
    return host_models.make(request.param)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_finite_differences_and_every_block_is_recomputed(family, checkpointing, monkeypatch):
    calls, checkpoint = [], differentiable.checkpoint
    monkeypatch.setattr(differentiable, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    slope, expected = inside(
        family, config(checkpointing=checkpointing, cfg=1.0), lambda policy: finite_difference(policy, size=0.01)
    )
    assert slope == pytest.approx(expected, rel=1e-4)
    assert len(calls) == (host_models.BLOCKS[family.name] if checkpointing else 0)


def reward():
    return comfy_host.execute("PCPOLoadReward", "colorfulness")[0].rewards


def two_updates(family, objective):
    """Two updates -> their metrics, the LoRA in each layout, a prediction, and the modules that learned nothing."""

    def work(policy):
        c = config(objective)
        state = learning.make_training_state(policy, c)
        job = align.Job(c, list(host_models.LINES), {r.name: r for r in reward()})
        rows = [update.metrics for update in align.align(state, job)]
        pairs = {name: (down, up * c.lora.scale) for name, (down, up) in policy.lora().items()}
        files = {layout: export_state(pairs, 2.0, 2, layout, policy.family) for layout in ("comfyui", "kohya")}
        return rows, files, prediction(policy), [name for name, (_, up) in policy.lora().items() if not up.any()]

    return inside(family, config(objective), work)


def prediction(policy):
    """Of both prompts, at a middle step."""
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    t = policy.grid(3).timesteps.tolist()[1]
    with torch.no_grad():
        return policy.predict(x, t, policy.encode(host_models.LINES).rows([0, 1]))


def stock(family):
    """ComfyUI's own sampler."""
    guider = comfy.samplers.CFGGuider(family.model)
    guider.set_conds(family.prompts.positive[0], family.prompts.negative)
    guider.set_cfg(2.0)
    sampling = family.model.get_model_object("model_sampling")
    return comfy_models.sample(guider, comfy.samplers.calculate_sigmas(sampling, "simple", 2), family.latent())


@pytest.mark.parametrize("objective", ["log_hinge", "nft"])
def test_training_learns_and_its_lora_reloads_and_nothing_is_left_behind(family, objective):
    before = stock(family)
    rows, files, trained, still = two_updates(family, objective)
    assert all(row["first_log_ratio_abs_max"] < 1e-5 and row["grad_norm"] > 0 for row in rows)
    assert torch.equal(stock(family), before)
    base = inside(family, config(), prediction)
    assert (trained - base).norm() > 1e-3 * base.norm()
    for layout, state in files.items():
        loaded = host_models.HostModel(family.name, lora_on(family, state), family.vae, family.prompts)
        again = inside(loaded, config(), prediction)
        assert (again - trained).norm() < 1e-4 * (trained - base).norm() + 1e-6 * base.norm(), layout
    assert torch.equal(stock(family), before)
    assert not [name for name in still if not name.endswith(DEAD_ENDS)]


def lora_on(family, state):
    return comfy_host.execute("LoraModelLoader", family.model, state, 1.0)[0]


@pytest.mark.parametrize("targets", ["attention", "linear", "all"])
def test_targets_are_the_same_layers_of_every_family(family, targets):
    """Attention, feed-forward, all their rows; never what surrounds or modulates the blocks."""
    core = family.model.model.diffusion_model
    names = {id(module): name for name, module in core.named_modules()}
    chosen = {}
    for place in adapter.target_modules(family.model.model, targets)[1]:
        chosen.setdefault(names[id(place.module)], []).append(place.part)
    for name, parts in chosen.items():
        rows = core.get_submodule(name).weight.shape[0]
        covered = rows if parts == [None] else sum(count for _, count in parts)
        assert covered == rows or (targets == "attention" and "single_blocks" in name), name
    inner = {n for n, m in core.named_modules() if isinstance(m, torch.nn.Linear) and SURROUNDINGS.search(n) is None}
    attention = {name for name in inner if ATTENTION.search(name)}
    assert attention <= chosen.keys() <= inner
    assert targets == "attention" or chosen.keys() == inner
