"""Gradients through a ComfyUI MODEL, compared with finite differences and with diffusers, per family and base."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy.ops  # noqa: E402
import comfy_families  # noqa: E402
import comfy_models  # noqa: E402
import torch  # noqa: E402

from comfyui_pcpo.tiny import pipelines  # noqa: E402

pytestmark = pytest.mark.slow

comfy_policy = comfy_host.pack_module("nodes.host.policy")
options = comfy_host.pack_module("trainer.config.loading")
LINES = comfy_models.LINES


def config(lines=LINES, checkpointing=False):
    return options.build(
        {
            "model": {"name": "emoji-flow", "gradient_checkpointing": checkpointing},
            "prompts": {"lines": list(lines)},
            "rollout": {"prompts_per_update": 1, "group_size": 4, "steps": 4, "cfg": 2.0},
            "reward": {"weights": {"colorfulness": 1.0}},
            "lora": {"rank": 4, "alpha": 4},
        },
        "test",
    )


def random_pairs(pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: tuple(torch.randn(t.shape, generator=generator) * 0.05 for t in pair) for k, pair in pairs.items()}


def inside(setup, c, work):
    """`work(policy)` where training happens: inside guider.sample()."""
    return comfy_policy.with_policy(setup.model, setup.vae, setup.prompts, c, setup.latent(1)["samples"], work)


def factors(policy, pairs):
    """(parameter, tensor of `pairs`) for both factors of every module."""
    for name, pair in pairs.items():
        layer = policy.layers[name]
        yield from zip((layer.down, layer.up), pair, strict=True)


def finite_difference(policy, steps=4, size=0.02):
    """Derivative of a smooth loss along a direction: by backward, and by a difference of fourth order.

    Half of the direction is random; the other half is the computed gradient, because along a random one alone
    the derivative may be so near to 0 that float32's rounding of the loss is more than a thousandth of it.
    """
    t = policy.grid(steps).timesteps.tolist()[1]
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    start, direction = random_pairs(policy.lora()), random_pairs(policy.lora(), 9)
    rows = policy.encode([policy.lines[0]]).rows([0, 0])

    def loss():
        return (policy.predict(x, t, rows) * along).sum()

    def moved(amount):
        policy.load_lora({k: tuple(a + amount * b for a, b in zip(start[k], direction[k], strict=True)) for k in start})
        with torch.no_grad():
            return float(loss().double())

    policy.load_lora(start)
    loss().backward()
    pairs = list(factors(policy, direction))
    lengths = [
        torch.cat([t.flatten() for t in part]).norm() for part in ([d for _, d in pairs], [p.grad for p, _ in pairs])
    ]
    for p, d in pairs:
        d += p.grad * (lengths[0] / lengths[1])
    slope = sum(float((p.grad * d).sum()) for p, d in pairs)
    near, far = (moved(n * size) - moved(-n * size) for n in (1, 2))
    return slope, (8 * near - far) / (12 * size)


@pytest.mark.parametrize("name", comfy_families.FAMILIES)
def test_predictions_and_gradients_of_every_family_equal_diffusers(name):
    family = comfy_families.make(name)

    def work(policy):
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
        t = policy.grid(4).timesteps.tolist()[1]
        pairs = random_pairs(policy.lora())
        policy.load_lora(pairs)
        out = policy.predict(x, t, policy.encode([comfy_families.LINE]).rows([0, 0]))
        out.square().sum().backward()
        theirs = {k: tuple(f.clone().requires_grad_() for f in pair) for k, pair in pairs.items()}
        expected = family.predict(theirs, x, t, policy.sigma[t], 2.0)
        expected.square().sum().backward()
        return out.detach(), expected.detach(), [(a.grad, b.grad) for a, b in factors(policy, theirs)]

    out, expected, gradients = inside(family, config([comfy_families.LINE]), work)
    assert (out - expected).norm() < 1e-4 * expected.norm()
    assert len(gradients) > 10
    whole = torch.cat([b.flatten() for _, b in gradients]).norm()
    for mine, right in gradients:
        assert (mine - right).norm() < 1e-3 * right.norm() + 1e-5 * whole


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", comfy_families.FAMILIES)
def test_gradients_of_every_family_equal_finite_differences(name, checkpointing):
    family = comfy_families.make(name)
    slope, expected = inside(family, config([comfy_families.LINE], checkpointing), finite_difference)
    assert slope == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module", params=pipelines.EMBEDDED)
def tiny(request):
    return comfy_models.Tiny(request.param)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_embedded_models_equal_finite_differences(tiny, checkpointing):
    slope, expected = inside(tiny, config(checkpointing=checkpointing), finite_difference)
    assert slope == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("offloaded", [False, True])
def test_gradients_on_a_base_with_an_applied_lora(tiny, offloaded, checkpointing):
    """ComfyUI patches the weights on loading, or each time a layer is used."""
    comfy_models.forget_loaded()
    model = comfy_models.lora_on(tiny, 1)
    setup = tiny.on(comfy_models.partly_loaded(model) if offloaded else model)

    def work(policy):
        assert (policy.model.lowvram_patch_counter > 0) == offloaded
        return of_the_base(policy), finite_difference(policy)

    out, (slope, expected) = inside(setup, config(checkpointing=checkpointing), work)
    assert slope == pytest.approx(expected, rel=2e-3)
    assert (out - inside(tiny, config(), of_the_base)).abs().max() > 1e-3
    comfy_models.forget_loaded()


def of_the_base(policy):
    """A prediction without the LoRA being trained."""
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    t = policy.grid(4).timesteps.tolist()[1]
    with torch.no_grad(), policy.reference():
        return policy.predict(x, t, policy.encode([LINES[0]]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_gradients_over_fp8_weights_equal_finite_differences(name, scaled, checkpointing):
    """ComfyUI stores the base in fp8, plain or scaled, and casts each weight when it is used."""
    family = comfy_families.make(name, torch.float32 if scaled else torch.float8_e4m3fn)
    family = comfy_families.with_scaled_fp8(family) if scaled else family
    kept = list(family.model.model.diffusion_model.parameters())
    if scaled:
        assert any(isinstance(p, comfy.ops.QuantizedTensor) for p in kept)
    else:
        assert any(p.dtype == torch.float8_e4m3fn for p in kept)
    slope, expected = inside(family, config([comfy_families.LINE], checkpointing), finite_difference)
    assert slope == pytest.approx(expected, rel=2e-3)
