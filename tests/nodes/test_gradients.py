"""Gradients through a ComfyUI MODEL, compared with finite differences and with diffusers, per family and base."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy_families  # noqa: E402
import comfy_models  # noqa: E402
import torch  # noqa: E402
from host_gradients import factors, finite_difference, inside, random_pairs  # noqa: E402

from comfyui_pcpo.tiny import pipelines  # noqa: E402

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_gradients_over_weights_that_decoding_and_rewards_evict_meanwhile(name):
    """A loader's weights are inference tensors, and moving those outside of inference mode makes them unusable."""
    comfy_models.forget_loaded()
    family = comfy_families.make(name)
    family.model.__class__ = comfy_models.Moved

    def work(policy):
        found = []
        for _ in range(2):
            found.append(finite_difference(policy))
            with torch.inference_mode():  # as in vae.decode
                comfy.model_management.unload_all_models()
            policy.evicted = True
            for parameter in policy.trainable():
                parameter.grad = None
        return found

    before = comfy_models.Moved.moves
    for slope, expected in inside(family, config([comfy_families.LINE]), work):
        assert slope == pytest.approx(expected, rel=1e-4)
    assert comfy_models.Moved.moves - before >= 4
    with torch.inference_mode():  # and ComfyUI can sample with them afterwards
        assert all(torch.mul(p, 2) is not None for p in family.model.model.diffusion_model.parameters())
    comfy_models.forget_loaded()


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
