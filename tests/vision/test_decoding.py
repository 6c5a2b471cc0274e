import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from contrastive_mm.vision.data import decoding
from contrastive_mm.vision.data.decoding import DRAWS, Crop, decode_crops, random_box


def photo(height=90, width=120):
    """A picture with structure at all scales."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    fine = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(coarse, fine, 0.15)


def draws(views=2, seed=0):
    return np.random.default_rng(seed).random((views, DRAWS))


def oracle(path, crops, numbers):
    """Pillow alone: open, turn, convert, crop, resize."""
    with Image.open(path) as image:
        whole = ImageOps.exif_transpose(image).convert("RGB")
    pieces = []
    for crop, row in zip(crops, numbers.tolist(), strict=True):
        top, left, height, width = random_box(whole.height, whole.width, crop, row)
        cut = whole.crop((left, top, left + width, top + height))
        pieces.append(np.asarray(cut.resize((crop.size, crop.size), Image.Resampling.BILINEAR)).astype(int))
    return pieces


def worst(path, crops, numbers):
    with Image.open(path) as image:
        made = [crop.permute(1, 2, 0).numpy().astype(int) for crop in decode_crops(image, crops, numbers)]
    return max(np.abs(a - b).max() for a, b in zip(made, oracle(path, crops, numbers), strict=True))


KINDS = {
    "jpg": lambda image, path: image.save(path, quality=90),
    "444.jpg": lambda image, path: image.save(path, quality=90, subsampling=0),
    "progressive.jpg": lambda image, path: image.save(path, quality=90, progressive=True),
    "grey.jpg": lambda image, path: image.convert("L").save(path),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path),
    "png": lambda image, path: image.save(path),
    "palette.png": lambda image, path: image.quantize(64).save(path),
    "webp": lambda image, path: image.save(path, lossless=True),
    "gif": lambda image, path: image.save(path, save_all=True, append_images=[ImageOps.invert(image)]),
    "bmp": lambda image, path: image.save(path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_those_of_pillow(tmp_path, kind):
    path = tmp_path / f"photo.{kind}"
    KINDS[kind](photo(), path)
    crops = [Crop(32), Crop(32, 0.5), Crop(100), Crop(12, 0.05, 0.2)]
    assert worst(path, crops, draws(4)) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_cut_from_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / "turned.jpg", quality=90, exif=exif)
    assert worst(tmp_path / "turned.jpg", [Crop(32), Crop(16)], draws()) <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (7, 200)])
def test_crops_of_tiny_and_of_long_images(tmp_path, size):
    photo(*size).save(tmp_path / "small.png")
    assert worst(tmp_path / "small.png", [Crop(16), Crop(8)], draws()) <= 2


def test_ordinary_jpegs_are_decoded_by_torchvision_byte_for_byte_as_by_pillow(tmp_path, monkeypatch):
    calls = []
    original = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *a: calls.append(original(*a)) or calls[-1])
    path = tmp_path / "a.jpg"
    photo().save(path, quality=85)
    with Image.open(path) as image:
        decode_crops(image, [Crop(16)], draws(1))
    assert len(calls) == 1
    assert np.array_equal(calls[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_jpeg_that_is_cut_off_is_broken(tmp_path, share):
    path = tmp_path / "cut.jpg"
    photo().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with Image.open(path) as image, pytest.raises(OSError, match="truncated"):
        decode_crops(image, [Crop(16)], draws(1))


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_where_torchvision_cannot_decode_pillow_does(tmp_path, monkeypatch, error):
    def refuse(*arguments):
        raise error("no such decoder")

    photo().save(tmp_path / "a.jpg")
    monkeypatch.setattr(decoding, "decode_jpeg", refuse)
    assert worst(tmp_path / "a.jpg", [Crop(16), Crop(8)], draws()) <= 2


@pytest.mark.parametrize(("least", "reduction"), [(2.0, 1), (4.0, 2), (7.9, 2), (8.0, 4), (20.0, 8)])
def test_a_jpeg_is_reduced_only_as_far_as_each_crop_keeps_twice_its_view(least, reduction):
    size = 10
    boxes = [(0, 0, 500, 500), (0, 0, int(least * size), 400)]
    assert decoding._reduction(boxes, [Crop(size), Crop(size)]) == reduction


def test_reduced_decoding_changes_little(tmp_path):
    path = tmp_path / "large.jpg"
    photo(900, 1200).save(path, quality=90)
    crops, numbers = [Crop(48, 0.5), Crop(48, 0.5)], draws()
    with Image.open(path) as image:
        made = decode_crops(image, crops, numbers)
        assert image.size == (300, 225), "a quarter"
    for crop, expected in zip(made, oracle(path, crops, numbers), strict=True):
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() < 1.5


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14)])
def test_boxes_have_the_distribution_of_torchvision(scale):
    ours = np.array([random_box(60, 80, Crop(8, *scale), row) for row in draws(4000).tolist()], dtype=float)
    torch.manual_seed(0)
    blank = torch.zeros(3, 60, 80)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], float)
    for a, b in zip(ours.T, theirs.T, strict=True):
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.std() / b.std() - 1) < 0.06
    assert (ours[:, 0] + ours[:, 2]).max() == 60
    assert (ours[:, 1] + ours[:, 3]).max() == 80
    assert ours[:, :2].min() == 0


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_of_an_image_too_long_for_any_draw_the_middle_is_taken(height, width, expected):
    assert random_box(height, width, Crop(8, 1.0, 1.0), [0.5] * DRAWS) == expected
