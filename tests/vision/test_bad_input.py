"""Whatever lies in a folder of images: a clear message, and nothing lost but what is broken."""

import os

import numpy as np
import pytest
import torch
from pictures import break_file, levels, picture
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.decoding import Crop, decode_crops
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.integrity import looks_whole
from contrastive_mm.vision.data.loader import CropBatches, CropWorkers
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.domain import ImageDomain, VisionConfig

LEVEL = 200
STORAGES = pytest.mark.parametrize("memory_limit", [0, 1 << 30], ids=["disk", "memory"])


def sixteen_bit(size=(12, 10)):
    return Image.fromarray(np.full(size[::-1], LEVEL * 257, np.uint16))


WHOLE = {
    "cmyk.jpg": lambda path: picture(LEVEL).convert("CMYK").save(path),
    "grey.jpg": lambda path: picture(LEVEL).convert("L").save(path),
    "sixteen bits.png": lambda path: sixteen_bit().save(path),
    "sixteen bits.tif": lambda path: sixteen_bit().save(path),
    "palette.png": lambda path: picture(LEVEL).quantize(4).save(path),
    "one bit.png": lambda path: picture(255).convert("1").save(path),
    "animated.gif": lambda path: picture(LEVEL).save(path, save_all=True, append_images=[picture(0)]),
    "animated.webp": lambda path: picture(LEVEL).save(path, save_all=True, append_images=[picture(0)], lossless=True),
    "pixel.png": lambda path: picture(LEVEL, (1, 1)).save(path),
    "pixel.jpg": lambda path: picture(LEVEL, (1, 1)).save(path),
    "long.png": lambda path: picture(LEVEL, (500, 2)).save(path),
    "large.jpg": lambda path: picture(LEVEL, (900, 700)).save(path),
    "übergröße 図.png": lambda path: picture(LEVEL).save(path),
    "bytes behind the end.jpg": lambda path: (
        picture(LEVEL).save(path),
        path.write_bytes(path.read_bytes() + b"\0" * 50),
    ),
    "no image name.PNG": lambda path: picture(LEVEL).save(path, "png"),
    "from a browser.jfif": lambda path: picture(LEVEL).save(path, "jpeg"),
    "grey.pgm": lambda path: picture(LEVEL).convert("L").save(path),
    "jpeg.png": lambda path: picture(LEVEL).save(path, "jpeg"),
}

BROKEN = {
    "zero bytes.jpg": lambda path: path.write_bytes(b""),
    "head only.jpg": lambda path: (picture(LEVEL, (99, 99)).save(path), break_file(path)),
    "half.jpg": lambda path: (photo().save(path), path.write_bytes(path.read_bytes()[:2000])),
    "half.png": lambda path: (photo().save(path), path.write_bytes(path.read_bytes()[:2000])),
    "half.webp": lambda path: (photo().save(path), path.write_bytes(path.read_bytes()[:1000])),
    "half.gif": lambda path: (photo().save(path), path.write_bytes(path.read_bytes()[:2000])),
    "text.jpg": lambda path: path.write_text("<html>404</html>"),
    "link to nowhere.jpg": lambda path: path.symlink_to("nowhere"),
}


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))


def batches_of(images):
    def describe(indices):
        return {"index": indices}

    return CropBatches(len(images), 2, CropWorkers([Crop(8)] * 2, 2), images.open, describe, images.note_broken)


@STORAGES
@pytest.mark.parametrize("name", WHOLE)
def test_unusual_images_keep_their_level(tmp_path, name, memory_limit, capsys):
    WHOLE[name](tmp_path / name)
    picture(0).save(tmp_path / "~.png")
    source = find_images(str(tmp_path))
    images = ImageSet(source, 8, 0.0, memory_limit)
    assert sorted(images.ids) == sorted([name, "~.png"])
    place = images.ids.index(name)
    level = 255 if name == "one bit.png" else LEVEL
    assert abs(levels(images.read(torch.tensor([place])))[0] - level) <= 3
    with source.open_image(place) as image:
        crops = decode_crops(image, [Crop(8), Crop(4)], np.random.default_rng(0).random((2, 22)))
    assert all(abs(levels(crop[None])[0] - level) <= 3 for crop in crops)
    assert not capsys.readouterr().out


@STORAGES
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_left_out_by_name_before_training(tmp_path, name, memory_limit, capsys):
    BROKEN[name](tmp_path / name)
    for i in range(4):
        picture(50 * i).save(tmp_path / f"~{i}.png")
    images = ImageSet(find_images(str(tmp_path)), 8, 0.25, memory_limit)
    assert images.ids == [f"~{i}.png" for i in range(4)]
    assert f"Left out 1 broken of 5 images: {name} (" in capsys.readouterr().out
    seen = {int(index): levels(batch["view_0"]) for batch in batches_of(images) for index in batch["index"]}
    assert sorted(seen) == [0, 1, 2, 3]


def test_everything_at_once_in_training_and_in_evaluation(tmp_path):
    for name, write in {**WHOLE, **BROKEN}.items():
        for label in ("ape", "bee"):
            (tmp_path / label).mkdir(exist_ok=True)
            write(tmp_path / label / name)
    for storage in ("disk", "memory"):
        options = {"image_size": 8, "batch_size": 4, "max_broken": 0.4, "validation_share": 0.3}
        domain = ImageDomain(VisionConfig(str(tmp_path), storage=storage, **options), 0)
        assert len(domain.images) == 2 * len(WHOLE)
        assert sum(len(batch["index"]) for batch in domain.train_batches()) == len(domain.train_rows) // 4 * 4
        assert "knn_accuracy" in domain.evaluate(None)


def test_a_name_that_is_not_utf8_is_read_and_can_be_written_into_a_table(tmp_path):
    path = os.fsencode(str(tmp_path)) + b"/\xff\xe4.png"
    picture(LEVEL).save(tmp_path / "a.png")
    try:
        os.rename(tmp_path / "a.png", path)
    except OSError:
        pytest.skip("this file system allows no such name")
    images = ImageSet(find_images(str(tmp_path)), 8, memory_limit=0)
    assert images.ids == ["\\udcff\\udce4.png"]
    assert levels(images.read(torch.tensor([0]))) == [LEVEL]


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"The folder {tmp_path}/bee can't be read \(Permission denied\)"):
        find_images(str(tmp_path))


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    (tmp_path / "real").mkdir()
    picture(1).save(tmp_path / "real" / "1.png")
    data = tmp_path / "data"
    for name in ("ape", "bee"):
        (data / name).mkdir(parents=True)
        picture(2).save(data / name / "2.png")
    (data / "cow").symlink_to(tmp_path / "real")
    (data / "ape" / "up").symlink_to(data)
    assert find_images(str(data)).ids == ["ape/2.png", "bee/2.png", "cow/1.png"]


def test_finding_and_checking_many_files_opens_no_image(tmp_path, monkeypatch):
    picture(1).save(tmp_path / "0.jpg")
    content = (tmp_path / "0.jpg").read_bytes()
    for i in range(1, 500):
        (tmp_path / f"{i}.jpg").write_bytes(content)

    def refuse(*arguments, **options):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    images = ImageSet(find_images(str(tmp_path)), 8, 0.0, memory_limit=0)
    assert len(images) == 500


@pytest.mark.parametrize(
    ("ends", "whole"),
    [
        ((b"\xff\xd8\xff\xe0", b"..\xff\xd9", 900), True),
        ((b"\xff\xd8\xff\xe0", b"....", 900), False),
        ((b"\x89PNG\r\n\x1a\n", b"....\x00\x00\x00\x00IEND\xaeB`\x82", 900), True),
        ((b"\x89PNG\r\n\x1a\n", b"IEND", 900), False),
        ((b"RIFF\x7c\x03\x00\x00WEBP", b"....", 900), True),
        ((b"RIFF\x7c\x03\x00\x00WEBP", b"....", 899), False),
        ((b"GIF89a", b"\x00;", 900), False),
        ((b"", b"", 0), False),
    ],
)
def test_only_what_begins_and_ends_as_a_whole_image_goes_undecoded(ends, whole):
    assert looks_whole(ends) == whole


def test_images_too_small_to_tell_the_size_of_views_are_named(tmp_path):
    for number in range(3):
        picture(LEVEL, (50, 1)).save(tmp_path / f"{number}.png")
    with pytest.raises(
        UserError, match=r"Not one of the 3 images of .* has 4 pixels a side, 0.png the first.*--image-s"
    ):
        ImageDomain(VisionConfig(data=str(tmp_path)), 0)
    assert len(ImageDomain(VisionConfig(data=str(tmp_path), image_size=8), 0).images) == 3


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_the_digest_tells_other_images_names_and_labels(tmp_path, storage):
    def digest():
        return ImageDomain(VisionConfig(data=str(tmp_path), storage=storage, image_size=8), 0).digest

    for name, level in (("a/1.png", 10), ("a/2.png", 20), ("b/3.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(level).save(tmp_path / name)
    found = [digest(), digest()]
    assert found[0] == found[1]
    photo().save(tmp_path / "a" / "1.png")
    found.append(digest())
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "4.png")
    found.append(digest())
    (tmp_path / "a" / "4.png").rename(tmp_path / "b" / "4.png")
    found.append(digest())
    assert len(set(found)) == 4


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_resuming_on_as_many_other_images_is_refused(tmp_path, storage):
    def batches():
        options = VisionConfig(data=str(tmp_path), storage=storage, image_size=8, batch_size=2)
        return ImageDomain(options, 0).train_batches()

    for number in range(4):
        picture(LEVEL).save(tmp_path / f"{number}.png")
    saved = batches().state_dict()
    batches().load_state_dict(saved)
    (tmp_path / "2.png").rename(tmp_path / "9.png")
    with pytest.raises(UserError, match="but not the same ones"):
        batches().load_state_dict(saved)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_pipe_among_the_images_is_named_and_not_waited_on(tmp_path, storage, capsys):
    for number in range(5):
        picture(LEVEL).save(tmp_path / f"{number}.png")
    os.mkfifo(tmp_path / "5.png")
    domain = ImageDomain(VisionConfig(data=str(tmp_path), max_broken=0.2, storage=storage), 0)
    assert len(domain.images) == 5
    assert "5.png (it is no regular file)" in capsys.readouterr().out
