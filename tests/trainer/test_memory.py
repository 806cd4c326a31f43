"""What saves memory changes nothing that it should not: stored precision, 8 and 4 bits, split guidance, offload."""

import copy
import importlib.util
import json

import pytest
import tiny_pipelines
import torch
from peft.tuners.lora import LoraLayer
from running import resume_run, start_run
from torch import nn

from trainer.config.schema import ConfigError
from trainer.memory.offload import Offloader
from trainer.memory.quantize import EightBitLinear
from trainer.policy import diffusers_policy
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.policy.loading import load_pipeline
from trainer.policy.lora_pairs import load_pairs
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

BITS_AND_BYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not BITS_AND_BYTES, reason="bitsandbytes is not installed")


@pytest.fixture(params=tiny_pipelines.PIPELINES)
def family(request) -> str:
    return request.param


@pytest.fixture
def policy(family, make_config):
    """policy(rollout={...}, **model): the family's tiny model with a LoRA that does something."""
    pipeline = tiny_pipelines.build(family)

    def make(rollout=None, **model):
        used = {**tiny_pipelines.size(pipeline), "cfg": 2.0, **(rollout or {})}
        found = DiffusersPolicy(copy.deepcopy(pipeline), make_config("given", model=model, rollout=used))
        generator = torch.Generator().manual_seed(1)
        for p in found.trainable():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        return found

    return make


def output_and_gradient(policy):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = policy.encode(["a fox", "two red stars"])
    out = policy.predict(x, 500, condition)
    with torch.no_grad():
        assert torch.equal(policy.predict(x, 500, condition), out)  # so that the first ratio is 1
    return out.detach(), torch.autograd.grad(out.square().sum(), policy.trainable(), materialize_grads=True)


def weight_bytes(policy):
    lora = {id(p) for p in policy.trainable()}
    return sum(p.nbytes for p in policy.denoiser.parameters() if id(p) not in lora)


def test_weights_stored_in_bfloat16_give_the_same_bits_as_weights_rounded_at_every_call(policy, monkeypatch):
    stored = policy(precision="bfloat16")
    monkeypatch.setattr(diffusers_policy, "store", lambda *_: None)
    rounded = policy(precision="bfloat16")
    (out, gradient), (expected, slope) = output_and_gradient(stored), output_and_gradient(rounded)
    assert torch.equal(out, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradient, slope, strict=True))
    assert weight_bytes(stored) < 0.6 * weight_bytes(rounded)
    assert all(p.dtype == torch.float32 for p in stored.trainable())


def test_the_lora_reads_what_its_layer_reads_without_a_wide_copy(policy):
    """Its products are in the model's precision, its factors and their gradients in float32."""
    bf16, read = policy(precision="bfloat16"), []
    layers = [m for m in bf16.denoiser.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].dtype))
        layer.lora_A["pcpo"].register_forward_hook(lambda _, inputs, out: read.append((inputs[0].dtype, out.dtype)))
    _, gradient = output_and_gradient(bf16)
    given, used = read[::2], read[1::2]
    assert torch.bfloat16 in given
    assert used == [(dtype, torch.bfloat16) for dtype in given]
    assert {g.dtype for g in gradient} == {torch.float32}


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_output_and_gradient_through_eight_bits_are_those_of_the_weights_they_stand_for(policy, kind):
    narrow = policy(quantize=kind)
    wide = copy.deepcopy(narrow)
    layers = [(n, m) for n, m in wide.denoiser.named_modules() if isinstance(m, EightBitLinear)]
    assert len(layers) > 6
    for name, layer in layers:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = nn.Parameter(layer.wide(), requires_grad=False)
        dense.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(wide.denoiser.get_submodule(parent), last, dense)
    (out, gradient), (expected, slope) = output_and_gradient(narrow), output_and_gradient(wide)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    size = max(float(s.abs().max()) for s in slope)
    for ours, theirs in zip(gradient, slope, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * size)
    assert weight_bytes(narrow) < 0.95 * weight_bytes(wide)  # small models are mostly norms and embeddings


def test_a_sharded_model_is_spread_from_the_cpu(make_config, monkeypatch):
    """A GPU never holds the whole denoiser: one that is sharded may not fit."""
    found = []

    def shard(denoiser, trainable, device):
        found.extend(p.device.type for n, p in denoiser.named_parameters() if ".lora_" not in n)

    monkeypatch.setattr(diffusers_policy, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(diffusers_policy, "sharded", lambda config: True)
    monkeypatch.setattr(diffusers_policy, "shard", shard)
    pipeline = tiny_pipelines.build("flux")
    sections = {"model": {"shard": True}, "rollout": tiny_pipelines.size(pipeline)}
    DiffusersPolicy(pipeline, make_config("given", **sections))
    assert found and set(found) == {"cpu"}


@pytest.mark.parametrize(("kind", "error"), [("fp8", 2**-4), ("int8", 1 / 127)])
def test_a_weight_in_eight_bits_is_near_the_weight(kind, error):
    """fp8 rounds to 3 bits behind the first; int8 in steps of the row's largest / 127."""
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, 32)[:, None])
        layer.weight[0] = 0
    narrow = EightBitLinear(layer, kind)
    off = (narrow.wide() - layer.weight).abs()
    largest = layer.weight.abs().amax(1, keepdim=True)
    bound = layer.weight.abs() * error + largest * 2**-15 if kind == "fp8" else largest * error * 0.51
    assert bool((off <= bound).all())


def test_nothing_wide_is_kept_for_the_backward_pass_of_eight_bits():
    layer, kept = EightBitLinear(nn.Linear(256, 256), "fp8"), []
    x = torch.ones(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(x)
    assert sum(kept) <= 256 * 256 + 4 * 256 + 4 * 256


@needs_bitsandbytes
def test_four_bits_are_near_the_weights_and_their_gradient_is_finite(policy, family):
    narrow, wide = policy(quantize="4bit"), policy()
    (out, gradient), (expected, slope) = output_and_gradient(narrow), output_and_gradient(wide)
    assert float((out - expected).norm() / expected.norm()) < 0.3
    ours, theirs = (torch.cat([g.flatten() for g in found]) for found in (gradient, slope))
    assert float(torch.cosine_similarity(ours, theirs, 0)) > 0.8
    assert weight_bytes(narrow) < weight_bytes(policy(quantize="int8"))


@pytest.mark.skipif(BITS_AND_BYTES, reason="bitsandbytes is installed")
def test_four_bits_and_the_eight_bit_optimizer_name_the_package_they_need(make_config, learn):
    for section in ({"model": {"quantize": "4bit"}}, {"optimizer": {"name": "adamw8bit"}}):
        with pytest.raises(ConfigError, match=r"= (4bit|adamw8bit) needs the package bitsandbytes.*pip install"):
            learn(make_config(**section))


def test_checkpointed_blocks_give_the_same_gradient(policy):
    both = [policy(gradient_checkpointing=on) for on in (True, False)]
    (out, gradient), (expected, slope) = map(output_and_gradient, both)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradient, slope, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_guidance_in_two_calls_is_guidance_in_one(policy):
    (out, gradient), (expected, slope) = (output_and_gradient(policy({"batch_cfg": one})) for one in (False, True))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    size = max(float(s.abs().max()) for s in slope)
    for ours, theirs in zip(gradient, slope, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("quantize", ["fp8", pytest.param("4bit", marks=needs_bitsandbytes)])
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_a_quantised_run_starts_at_ratio_one_learns_and_resumes_to_the_same_numbers(make_config, optimizer, quantize):
    def config(name, updates):
        return make_config(
            model={"quantize": quantize, "precision": "bfloat16"},
            lora={"rank": 64},  # 4096 numbers and more in a factor are what the 8-bit optimizer packs
            optimizer={"name": optimizer},
            run={"name": name, "updates": updates},
        )

    whole, updates = start_run(config("whole", 2))
    list(updates)
    for row in whole.records():
        assert row["first_log_ratio_abs_max"] < 0.01 * 1e-3
        assert row["grad_norm"] > 0
    moments = torch.load(whole.checkpoint() / "optimizer.pt", weights_only=True)
    assert ("dtype=torch.uint8" in str(moments)) == (optimizer == "adamw8bit")
    half, updates = start_run(config("half", 1))
    list(updates)
    _, _, updates = resume_run(half.path, updates=2)
    list(updates)
    ours, theirs = (load_pairs(RunFolder(run.path).checkpoint() / "lora.safetensors") for run in (whole, half))
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    assert any(bool(up.abs().max() > 0) for _, up in ours.values())


def test_a_pipeline_is_read_in_the_models_precision_but_for_its_vae(tmp_path):
    pipeline = load_pipeline(str(tiny_pipelines.save("sd35", tmp_path)), dtype=torch.bfloat16)
    assert {pipeline.transformer.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32


class Part:
    """Remembers where it was sent, in order, with the others'."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def to(self, device):
        self.log.append(f"{self.name} {device.type}")


def residents(device, **options):
    log = []
    names = ("denoiser", "vae", "text")
    return Offloader({n: [Part(n, log)] for n in names}, torch.device(device), **options), log


def test_a_part_goes_before_the_next_one_comes():
    residence, log = residents("cuda", offload=True)
    assert log == []
    residence.only("text")
    residence.only("denoiser")
    residence.only("denoiser")
    residence.only("denoiser", "vae")
    residence.only("denoiser")
    assert log == ["text cuda", "text cpu", "denoiser cuda", "vae cuda", "vae cpu"]


def test_without_offload_all_parts_come_once_and_stay():
    residence, log = residents("cuda", offload=False)
    residence.only("text")
    residence.only("denoiser")
    assert sorted(log) == ["denoiser cuda", "text cuda", "vae cuda"]


def test_a_part_that_cannot_be_moved_stays():
    residence, log = residents("cuda", offload=True, fixed=["denoiser"])
    residence.only("text")
    residence.only("denoiser")
    assert log == ["denoiser cuda", "text cuda", "text cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_run_is_the_run_that_keeps_all_on_the_gpu(make_config):
    rows = []
    for offload in (True, False):
        run, updates = start_run(make_config(model={"device": "cuda", "offload": offload}, run={"name": str(offload)}))
        list(updates)
        rows.append([{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.records()])
    assert json.dumps(rows[0]) == json.dumps(rows[1])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"precision": "float16"}, "precision: cannot be float16, which represents no values below 6e-8"),
        ({"quantize": "fp8", "shard": True}, "shard = true cannot be combined with quantize = fp8"),
        ({"compile": True, "shard": True}, "shard = true cannot be combined with compile = true"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(make_config, model, words):
    with pytest.raises(ConfigError, match=words):
        make_config(model=model)
