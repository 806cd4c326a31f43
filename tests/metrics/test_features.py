"""The networks behind the evaluation metrics give what their references gave, from files in the published layouts."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_pcpo.metrics.errors import MetricError
from comfyui_pcpo.metrics.features import (
    extract,
    load_dino,
    load_inception,
    load_lpips,
    load_tiny_features,
)
from comfyui_pcpo.metrics.frechet import inception_score
from tests.golden import metric_recipe as recipe
from tests.golden import reward_recipe as gold


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The recipe's weights in the layout of the published file, batch counters included."""
    state = recipe.weights(gold.golden("inception")["shapes"])
    counters = {n.replace("running_var", "num_batches_tracked"): torch.tensor(0) for n in state if "running_var" in n}
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(state | counters, path)
    return path


@pytest.fixture(scope="module")
def network(inception_file):
    return load_inception(inception_file)


@pytest.fixture
def alexnet_file(tmp_path):
    """A torchvision AlexNet with its classifier, and the heads of the lpips package beside it."""
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(recipe.weights(gold.golden("lpips")["shapes"]) | {"classifier.1.bias": torch.zeros(4)}, path)
    torch.save(recipe.lpips_heads(), tmp_path / "alex.pth")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.IMAGE_SUFFIXES)
def test_inception_equals_torch_fidelity(network, name):
    wanted = gold.golden("inception")
    features, logits = extract(network, gold.image(name))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    for output, key, stride in ((features, "features", 128), (logits, "logits", 63)):
        want = torch.tensor(wanted[key][name])
        torch.testing.assert_close(output[0, ::stride], want, rtol=1e-4, atol=1e-5)


def test_an_ordinary_resize_is_not_the_references(network, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as library

    wanted = torch.tensor(gold.golden("inception")["features"]["small96"])

    def ordinary(x, size, align_corners):
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=align_corners)

    monkeypatch.setattr(library, "interpolate_bilinear_2d_like_tensorflow1x", ordinary)
    features = extract(network, gold.image("small96"))[0][0, ::128]
    assert (features - wanted).abs().max() > 100 * 1e-5


def test_inception_weights_never_run_code_nor_come_from_the_network(inception_file, tmp_path, monkeypatch):
    import pickle
    import socket

    def refuse(*args):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_inception(inception_file)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))[0].isfinite().all()

    class Exploit:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Exploit(), protocol=2))
    with pytest.raises(MetricError, match=r"bad.pth .*cannot be read as weights"):
        load_inception(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_fid_without_torch_fidelity_names_the_package(inception_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MetricError, match=r"pip install torch-fidelity"):
        load_inception(inception_file)


def test_inception_score_equals_torch_fidelity_and_its_bounds():
    logits = torch.from_numpy(np.random.RandomState(3).standard_normal((12, 1008)).astype(np.float32)) * 2
    assert inception_score(logits) == pytest.approx(gold.golden("inception")["inception_score"], rel=1e-12)
    assert inception_score(torch.zeros(5, 10)) == pytest.approx(1)
    assert inception_score(1e4 * torch.eye(10)) == pytest.approx(10)
    with pytest.raises(ValueError, match="2 or more rows"):
        inception_score(torch.zeros(1, 10))


def test_lpips_equals_the_lpips_package(alexnet_file):
    network = load_lpips(alexnet_file)
    first = gold.image("exact224")[:, :200, :200]
    for name, want in gold.golden("lpips")["distances"].items():
        other = gold.image(name)[:, :200, :200]
        assert network(first, other).item() == pytest.approx(want, rel=1e-5)
        assert network(other, first).item() == pytest.approx(want, rel=1e-5)
    assert network(first, first).item() == 0


def test_pairwise_lpips_is_the_mean_over_all_pairs(alexnet_file):
    network = load_lpips(alexnet_file)
    batch = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    pairs = [network(batch[[i]], batch[[j]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(network.pairwise(batch), torch.cat(pairs).mean())


@pytest.mark.slow
def test_dino_is_the_class_token_of_the_normalised_image(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    reference = Dinov2Model(config).eval()
    reference.save_pretrained(tmp_path)
    resized = Image.fromarray(gold.array("land300x451")).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        want = reference(pixel_values=(pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).pooler_output
    (features,) = extract(load_dino(tmp_path), gold.image("land300x451"))
    torch.testing.assert_close(features, want)


def test_tiny_features_do_not_depend_on_the_batch():
    network, batch = load_tiny_features(), torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = extract(network, batch, 5)[0], extract(network, batch, 2)[0]
    assert whole.shape == (5, 128)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (load_inception, r"gone does not exist.*weights-inception-2015-12-05-6726825d.pth \(95.6 MB.*torch-fidelity"),
        (load_lpips, r"gone does not exist.*alexnet-owt-7be5be79.pth.*download.pytorch.org"),
        (load_dino, r"gone has no config.json.*facebook/dinov2-large"),
    ],
)
def test_an_absent_file_says_where_it_is_published(load, said, tmp_path):
    with pytest.raises(MetricError, match=said):
        load(tmp_path / "gone")


def test_absent_heads_and_weights_of_other_networks_are_named(alexnet_file, inception_file, tmp_path):
    with pytest.raises(MetricError, match=r"alexnet-owt-7be5be79.pth holds other weights than Inception's"):
        load_inception(alexnet_file)
    with pytest.raises(MetricError, match=r"alexnet-owt-7be5be79.pth lacks 10 weights"):
        torch.save({"fc.weight": torch.zeros(2)}, alexnet_file)
        load_lpips(alexnet_file)
    (tmp_path / "alex.pth").unlink()
    with pytest.raises(MetricError, match=r"alex.pth does not exist.*lpips package"):
        load_lpips(alexnet_file)


def test_a_dino_folder_that_lacks_weights_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MetricError, match=r"lacks 1 weights, such as layernorm.weight"):
        load_dino(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(MetricError, match=r"cannot be read as DINOv2"):
        load_dino(tmp_path)
