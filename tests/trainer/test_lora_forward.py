"""The sum of a LoRA's layer in one pass: peft's result and gradients, of dense layers and convolutions."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.policy.loading import make_policy
from trainer.policy.lora_forward import SumInOnePass, sum_in_one_pass

LAYERS = {
    "dense, 3-D": (lambda: nn.Linear(12, 20), (5, 7, 12)),
    "dense, 2-D": (lambda: nn.Linear(12, 20, bias=False), (5, 12)),
    "dense, 4-D": (lambda: nn.Linear(12, 8), (2, 3, 4, 12)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 8)),
}


def pair(kind: str, alpha: float) -> tuple[nn.Module, nn.Module, Tensor]:
    """peft's layer, the same one computing in one pass, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)  # type: ignore[arg-type]
    plain = inject_adapter_in_model(config, nn.Sequential(make()), "pcpo")
    fast = copy.deepcopy(plain)
    sum_in_one_pass(lora_layers(fast)[0], "pcpo")
    return plain, fast, torch.randn(shape)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def output_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    factors = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(factors) == 2
    return {"output": out.detach(), "input": x.grad, **factors}  # type: ignore[dict-item]


@pytest.mark.parametrize("alpha", [4, 6])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(kind, alpha):
    plain, fast, x = pair(kind, alpha)
    expected, found = output_and_gradients(plain, x), output_and_gradients(fast, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_rollout_computes_bit_for_bit_what_training_computes(kind):
    _, fast, x = pair(kind, 4)
    with torch.no_grad():
        sampled = fast(x)
    assert torch.equal(sampled, fast(x))  # the log-ratio before the first optimizer step is 0
    assert torch.equal(sampled, fast(x.clone().requires_grad_()))


@pytest.mark.parametrize("kind", LAYERS)
def test_without_its_lora_a_layer_is_the_base_layer(kind):
    _, fast, x = pair(kind, 4)
    layer = lora_layers(fast)[0]
    layer._disable_adapters = True
    assert torch.equal(fast(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_in_bfloat16_the_sum_is_rounded_once(kind):
    plain, fast, x = pair(kind, 6)
    exact = plain(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(x)
        assert found.dtype == plain(x).dtype == torch.bfloat16
        assert (found - exact).abs().max() <= (plain(x) - exact).abs().max() * 1.5


def test_every_layer_of_an_embedded_models_lora_computes_so(make_config, model):
    policy = make_policy(make_config(model, lora={"targets": "all"}))
    layers = lora_layers(policy.denoiser)
    assert layers
    assert all(isinstance(layer.lora_variant["pcpo"], SumInOnePass) for layer in layers)


def test_eight_bit_weights_are_below_the_same_sum(make_config):
    policy = make_policy(make_config(model={"quantize": "int8"}))
    layers = lora_layers(policy.denoiser)
    assert layers
    assert all(isinstance(layer.lora_variant["pcpo"], SumInOnePass) for layer in layers)
