"""Text files and 16-bit images as other programs save them; any bytes at all end in a sentence."""

import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from comfyui_pcpo.reward.user import names_in_file
from trainer.config.loading import load, parse_overrides
from trainer.config.schema import Config, ConfigError, PromptsConfig
from trainer.config.text_files import read_text
from trainer.evaluation.image_files import read_image

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
MARK = "\ufeff"
DESSERT = "a cr\u00e8me br\u00fbl\u00e9e"
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(path: Path, text: str, encoding: str) -> Path:
    """The file, with a byte order mark where the encoding needs one."""
    mark = MARK if encoding in ("utf-16-le", "utf-16-be") else ""
    path.write_bytes((mark + text).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_prompts_are_the_same_in_every_encoding(tmp_path, encoding, line_break):
    file = saved(
        tmp_path / "prompts.txt",
        line_break.join(["# a comment", "a fox", "", DESSERT]),
        encoding,
    )
    assert PromptsConfig(file=file).read() == ["a fox", DESSERT]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_configurations_are_the_same_in_every_encoding(tmp_path, encoding, line_break):
    text = line_break.join(["[prompts]", 'lines = ["a cr\u00e8me br\u00fbl\u00e9e"]', "[run]", "updates = 7"])
    config = load(saved(tmp_path / "run.toml", text, encoding))
    assert (config.prompts.lines, config.run.updates) == (("a cr\u00e8me br\u00fbl\u00e9e",), 7)


def test_a_reward_file_with_a_byte_order_mark_is_listed(tmp_path):
    text = 'class Mine(Reward):\n    name = "mine"\n'
    assert list(names_in_file(saved(tmp_path / "mine.py", text, "utf-8-sig"))) == ["mine"]


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea", b"a\0b", b"\x80"])
def test_files_that_are_no_text_are_named(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts.txt .*Save it as UTF-8"):
        read_text(tmp_path / "prompts.txt")


@quickly
@given(content=st.binary(max_size=200))
def test_any_bytes_are_text_or_a_sentence(tmp_path, content):
    (tmp_path / "any.txt").write_bytes(content)
    try:
        text = read_text(tmp_path / "any.txt")
    except ConfigError as error:
        assert "any.txt" in str(error)
    else:
        assert "\r" not in text and "\0" not in text


@quickly
@given(text=st.text(max_size=80), encoding=st.sampled_from(ENCODINGS))
def test_text_survives_every_encoding(tmp_path, text, encoding):
    text = "".join(c for c in text if c not in "\0\ufeff")
    file = saved(tmp_path / "any.txt", text, encoding)
    assert read_text(file) == text.replace("\r\n", "\n").replace("\r", "\n")


@quickly
@given(content=st.one_of(st.binary(max_size=120), st.text(string.printable, max_size=120).map(str.encode)))
def test_any_file_is_a_configuration_or_a_sentence(tmp_path, content):
    (tmp_path / "any.toml").write_bytes(content)
    try:
        assert isinstance(load(tmp_path / "any.toml"), Config)
    except ConfigError as error:
        assert "any.toml" in str(error)


@quickly
@given(tokens=st.lists(st.one_of(st.text(max_size=20), st.text(max_size=20).map(lambda t: f"--{t}")), max_size=4))
def test_any_options_are_parsed_or_a_sentence(tokens):
    try:
        assert isinstance(parse_overrides(tokens), dict)
    except ConfigError as error:
        assert str(error)


@quickly
@given(value=st.one_of(st.text(max_size=40), st.floats().map(str), st.integers().map(str)))
@pytest.mark.parametrize(
    "key", ["run.updates", "rollout.cfg", "reward.weights", "lora.alpha", "run.name", "model.name"]
)
def test_any_value_is_taken_or_a_sentence_with_the_key(key, value):
    try:
        load(None, parse_overrides([f"--{key}", value]))
    except ConfigError as error:
        assert key in str(error)


@quickly
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["png", "jpg", "webp", "bmp"]))
def test_any_bytes_are_an_image_or_a_sentence(tmp_path, content, suffix):
    heads = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "webp": b"RIFF", "bmp": b"BM"}
    path = tmp_path / f"any.{suffix}"
    path.write_bytes(heads[suffix] + content)
    try:
        assert read_image(path).shape[-1] == 3
    except ConfigError as error:
        assert "cannot be read as an image" in str(error)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff")])
def test_a_16_bit_image_keeps_its_tones(tmp_path, mode, kind):
    """A ramp of grey, where Pillow's own conversion clips everything above 255 to white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16 if mode == "I;16" else np.int32)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / f"deep.{kind}")
    image = read_image(tmp_path / f"deep.{kind}")
    assert torch.allclose(image[0, 0, :, 0], torch.linspace(0, 1, 256), atol=1 / 255)


def test_cmyk_grey_palette_and_transparent_images_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 40, 40))
    for mode, kind in (("CMYK", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png")):
        red.convert(mode).save(tmp_path / f"{mode}.{kind}")
        assert read_image(tmp_path / f"{mode}.{kind}").shape == (1, 8, 8, 3)
    colors = read_image(tmp_path / "CMYK.jpg")[0, 4, 4] * 255
    assert torch.allclose(colors, torch.tensor([200.0, 40.0, 40.0]), atol=12)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "moves.webp")[0, 0, 0].tolist() == [1, 0, 0]


def test_a_float_image_beyond_its_range_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), -3, np.float32)).save(tmp_path / "odd.tiff")
    with pytest.raises(ConfigError, match="not between 0 and"):
        read_image(tmp_path / "odd.tiff")
