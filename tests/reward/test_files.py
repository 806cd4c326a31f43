"""Weight files that are absent, cut off or not what they should be: errors name the file and the way out."""

import pickle
import subprocess
import sys
import unicodedata

import pytest
import torch
from safetensors.torch import save_file

from comfyui_pcpo.reward import RewardError, RewardSettings
from comfyui_pcpo.reward.base import RewardFile
from comfyui_pcpo.reward.hpsv2 import HPSv2
from comfyui_pcpo.reward.weights.checkpoint import load_strict, read_state
from comfyui_pcpo.reward.weights.tokens import ftfy_tokenizer, plain_clip_tokens

torch.set_num_threads(1)
FILE = RewardFile("someone/things", "weights.pt", 1000, "MIT")


def test_an_absent_file_says_where_it_comes_from_and_where_it_goes(tmp_path):
    with pytest.raises(RewardError, match="Set the folder"):
        HPSv2().load()
    with pytest.raises(RewardError, match=r"HPS_v2_compressed.pt does not exist.*3.94 GB, Apache-2.0, from xswu/HPSv2"):
        HPSv2(RewardSettings(folder=tmp_path)).load()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_named(name, share, tmp_path):
    path = tmp_path / name
    state = {"a": torch.zeros(500)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RewardError, match=rf"{name} has \d+ bytes of about 1000.*delete it"):
        read_state(path, FILE)


@pytest.mark.parametrize("content", [b"Repository not found", b"\x80\x02]q\x00e.", b"\x80\x02K"])
def test_a_file_that_is_no_pickle_at_all_is_named(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(RewardError, match=r"weights.pt has \d+ bytes of about 1000.*delete it"):
        read_state(tmp_path / "weights.pt", FILE)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(RewardError, match="another file"):
        read_state(path, FILE)


def test_what_is_no_state_dict_is_refused(tmp_path):
    for content in ([1, 2], {"a": 1}):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(RewardError, match="no state dict"):
            read_state(tmp_path / "weights.pt", FILE)


def test_weights_of_another_model_are_counted(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        RewardError, match=r"lacks 1 weights, has 1 unknown ones and 1 of another shape \(such as bias\)"
    ):
        load_strict(model, {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, tmp_path / "weights.pt")


@pytest.mark.slow
def test_importing_rewards_imports_no_large_library():
    heavy = ("diffusers", "transformers", "open_clip", "peft", "rapidocr", "huggingface_hub", "http.server")
    code = f"import sys, comfyui_pcpo.reward; assert not [m for m in {heavy} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_plain_ids_equal_those_of_the_transformers_tokenizer():
    from transformers import CLIPTokenizer

    ours = ftfy_tokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): n for token, n in ours.encoder.items()}
    theirs = CLIPTokenizer(vocab=vocabulary, merges=list(ours.bpe_ranks), pad_token="!", model_max_length=77)
    prompts = [
        "it\u2019s \u201ccurly\u201d &amp; &lt;b&gt;",
        "\ufb01ne caf\u00e9",
        unicodedata.normalize("NFD", "caf\u00e9 \u00c5"),
        "\U0001f98a\U0001f33b 3 foxes, 12.5%",
        "a\u00a0b\u3000c\t\n",
        "\u4e2d\u6587 \u0395\u03bb\u03bb",
        "",
        "x" * 5000,
        "Don't we've I'LL",
    ]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    assert plain_clip_tokens(prompts).tolist() == expected
