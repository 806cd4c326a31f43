"""Which prompts share a model call, and ControlNets in the conditioning of a training run."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy.cldm.cldm  # noqa: E402
import comfy.controlnet  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy_families  # noqa: E402
import host_models  # noqa: E402
import torch  # noqa: E402
from host_gradients import finite_difference, inside  # noqa: E402

pytestmark = pytest.mark.slow

types = comfy_host.pack_module("nodes.types")
HINT = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))


def prompts(name, lengths=(5, 5), **more):
    """Two prompts of these lengths; `more` has a value of each for keys of the conditioning."""
    generator = torch.Generator().manual_seed(4)
    with torch.inference_mode():
        conds = [host_models.encoded(name, length, generator) for length in (*lengths, 3)]
    for key, values in more.items():
        for cond, value in zip(conds, values, strict=False):
            cond[0][1][key] = value
    return types.EncodedPrompts(host_models.LINES, tuple(conds[:2]), "", conds[2])


def reference(seed, *shape):
    return [torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(seed))]


CASES = {
    "equal shapes": ("krea2", {}, 1),
    "equal constants": ("z-image", {}, 1),  # the number of tokens
    "other constants": ("z-image", {"lengths": (5, 4)}, 2),
    "other lengths": ("krea2", {"lengths": (5, 4)}, 2),
    "reference latents": ("krea2", {"reference_latents": [reference(i, 1, 4, 4) for i in range(2)]}, 1),
    "reference latents of other sizes": (
        "krea2", {"reference_latents": [reference(i, 1, 4, 4 + 2 * i) for i in range(2)]}, 2,
    ),
    "reference methods": (
        "krea2",
        {
            "reference_latents": [reference(i, 1, 4, 4) for i in range(2)],
            "reference_latents_method": ["index", "index_timestep_zero"],
        },
        2,
    ),
    "masks": ("qwen-image", {"attention_mask": [torch.ones(1, 5), torch.tensor([[1.0, 1, 1, 0, 0]])]}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_prompts_share_a_call_where_comfyui_can_concatenate_them(case):
    """In one call or in two, each image gets the prediction of its own prompt."""
    name, given, calls = CASES[case]
    family = host_models.make(name)
    family.prompts, seen = prompts(name, **given), []

    def counted(apply, args):
        seen.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    family.model = family.model.clone()
    family.model.set_model_unet_function_wrapper(counted)

    def work(policy):
        x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
        t, both = policy.grid(3).timesteps.tolist()[1], policy.encode(host_models.LINES)
        together = policy.predict(x, t, both.rows([1, 0, 0]))
        number = len(seen)
        together.sum().backward()
        apart = [policy.predict(x[i : i + 1], t, both.rows([p])) for i, p in enumerate([1, 0, 0])]
        return together.detach(), torch.cat(apart).detach(), number

    together, apart, number = inside(family, host_models.config(cfg=1.0), work)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2
    assert number == calls


@pytest.fixture(scope="module")
def controlled():
    """A tiny UNet, one of whose prompts has a ControlNet with random weights."""
    family = comfy_families.make("sd2-v")
    with torch.inference_mode():
        core = comfy.cldm.cldm.ControlNet(**{**comfy_families.UNET, "hint_channels": 3, "num_heads": 1})
        generator = torch.Generator().manual_seed(5)
        for p in core.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 / max(1, p[0].numel()) ** 0.5)
        control = comfy.controlnet.ControlNet(core, load_device=mm.get_torch_device())
    plain = family.prompts
    ends = {"positive": plain.positive[0], "negative": plain.negative, "control_net": control, "image": HINT}
    applied = comfy_host.execute("ControlNetApplyAdvanced", **ends, strength=0.8, start_percent=0.0, end_percent=1.0)
    controlled = types.EncodedPrompts(plain.lines, (applied[0],), "", applied[1])
    return family, controlled


class Setup:
    """A family with other prompts."""

    def __init__(self, family, prompts):
        self.model, self.vae, self.latent, self.prompts = family.model, family.vae, family.latent, prompts


def predicted(policy):
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    t = policy.grid(4).timesteps.tolist()[1]
    with torch.no_grad(), policy.reference():
        return policy.predict(x, t, policy.encode([comfy_families.LINE]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_controlnet_acts_in_training_and_gradients_equal_finite_differences(controlled, checkpointing):
    """ComfyUI adds its output in place to what the blocks saved."""
    family, prompts = controlled
    c = host_models.config(checkpointing=checkpointing, lines=[comfy_families.LINE])
    plain, guided = (inside(Setup(family, p), c, predicted) for p in (family.prompts, prompts))
    assert (guided - plain).abs().max() > 1e-2
    slope, expected = inside(Setup(family, prompts), c, lambda policy: finite_difference(policy, size=0.01))
    assert slope == pytest.approx(expected, rel=1e-4)
