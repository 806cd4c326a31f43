"""Pictures that a user gives to `score` and `evaluate`: turned as their camera says, closed, and named when broken."""

import gc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cli.main import main
from trainer.config.schema import ConfigError
from trainer.evaluation.image_files import read_image

UPRIGHT = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)  # one row of red, green, blue
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
MAKER, ORIENTATION = 0x010F, 0x0112  # EXIF tags: the camera's maker, and which side of what is stored is up


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_picture_is_turned_as_its_camera_was(kind, tmp_path):
    """EXIF 2.32, Orientation 6: what is stored is to be turned a quarter clockwise."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = Image.fromarray(np.rot90(UPRIGHT).copy())
    stored.save(tmp_path / f"turned.{kind}", exif=exif, lossless=True)
    assert torch.equal(read_image(tmp_path / f"turned.{kind}"), torch.from_numpy(UPRIGHT / np.float32(255))[None])


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a picture of more than twice as many is refused
    assert main(["score", str(tmp_path), "--reward", "colorfulness"]) == 2
    said = capsys.readouterr().err
    assert "huge.png cannot be read as an image" in said
    assert "400 pixels" in said and "200 pixels" in said and "Remove it" in said


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.6, 0.9])
def test_a_picture_that_is_cut_off_is_named(kind, share, tmp_path):
    path = tmp_path / f"half.{kind}"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConfigError, match=rf"half\.{kind} cannot be read as an image .*Remove it"):
        read_image(path)


@pytest.mark.parametrize(
    ("kind", "place"),
    [("png", 0), ("png", 11), ("png", 36), ("jpg", 41)],
    ids=["signature", "length of the header", "length of the pixels", "number of an EXIF tag"],
)
def test_a_picture_with_a_wrong_byte_is_named(kind, place, tmp_path):
    """Pillow has another kind of error for each place."""
    path = tmp_path / f"wrong.{kind}"
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = 6, "maker"
    Image.fromarray(NOISE).save(path, exif=exif if kind == "jpg" else None)
    content = bytearray(path.read_bytes())
    content[place] = 0
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"wrong\.{kind} cannot be read as an image"):
        read_image(path)


def test_a_picture_is_closed_whether_it_can_be_read_or_not(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "moves.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:80])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        assert read_image(tmp_path / "moves.png").shape == (1, 32, 32, 3)
        with pytest.raises(ConfigError):
            read_image(tmp_path / "half.png")
        gc.collect()
    assert [str(warning.message) for warning in said if warning.category is ResourceWarning] == []
