import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data import ImageSet, find_images, read_idx
from contrastive_mm.vision.domain import ImageDomain, VisionConfig


def picture(value, size=(12, 10)):
    return Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8))


def encoded(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def class_folders(tmp_path):
    for number, name in enumerate(["ape", "bee"]):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            picture(100 * number + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_class_folders(class_folders):
    source = find_images(str(class_folders))
    assert source.ids == ["ape/0.png", "ape/1.png", "ape/2.png", "bee/0.png", "bee/1.png", "bee/2.png"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.class_names == ["ape", "bee"]
    images = ImageSet(source, 8)
    assert images.read(torch.tensor([0, 4])).float().mean(dim=(1, 2, 3)).tolist() == [0, 101]


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"bild-ü{i}.JPG")
    source = find_images(str(tmp_path))
    assert len(source) == 4
    assert source.labels is None


@pytest.mark.parametrize("nested", [True, False])
def test_parquet(tmp_path, nested):
    cells = [encoded(n) for n in range(4)]
    column = [{"bytes": cell, "path": None} for cell in cells] if nested else cells
    pq.write_table(pa.table({"image": column, "label": ["b", "a", "b", "a"]}), tmp_path / "data.parquet")
    source = find_images(str(tmp_path / "data.parquet"))
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert source.class_names == ["a", "b"]
    assert int(ImageSet(source, 8).read(torch.tensor([2])).float().mean()) == 2
    assert len(find_images(str(tmp_path))) == 4, "a folder of Parquet files"


def test_parquet_without_images_names_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match="no column 'image'; its columns are text"):
        find_images(str(tmp_path / "data.parquet"))


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_folder(tmp_path, zipped):
    pixels = np.arange(5 * 6 * 6, dtype=np.uint8).reshape(5, 6, 6)
    labels = np.array([3, 1, 3, 1, 3], np.uint8)
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        content = idx(array)
        file = tmp_path / (name + (".gz" if zipped else ""))
        file.write_bytes(gzip.compress(content) if zipped else content)
    source = find_images(str(tmp_path))
    assert source.class_names == ["1", "3"]
    read = ImageSet(source, 6).read(torch.tensor([4]))
    assert torch.equal(read[0, 0], torch.from_numpy(pixels[4]))


def test_idx_cut_off_is_named(tmp_path):
    (tmp_path / "x-ubyte").write_bytes(idx(np.zeros((4, 3, 3), np.uint8))[:-5])
    with pytest.raises(UserError, match="should hold 36 values and holds 31"):
        read_idx(tmp_path / "x-ubyte")
    (tmp_path / "y-ubyte").write_bytes(b"no")
    with pytest.raises(UserError, match="not an IDX file"):
        read_idx(tmp_path / "y-ubyte")


def test_torchvision_by_name_from_files_at_hand(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1, 2, 9], np.uint8)))
    monkeypatch.setenv("CONTRASTIVE_MM_DATA", str(tmp_path))
    for name in ("fashion-mnist", "fashion-mnist:test"):
        source = find_images(name)
        assert source.class_names[9] == "Ankle boot"
        assert source.labels.tolist() == [0, 1, 2, 9]
        assert source.open_image(0).size == (28, 28)


def test_a_download_that_fails_says_where_to_put_the_files(tmp_path, monkeypatch):
    from torchvision import datasets

    def fail(*arguments, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    monkeypatch.setenv("CONTRASTIVE_MM_DATA", str(tmp_path))
    with pytest.raises(UserError, match=rf"no network.*Put its files into {tmp_path}"):
        find_images("cifar10")


def test_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee"])})
    built = datasets.Dataset.from_dict({"img": [picture(3), picture(4)], "label": [1, 0]}, features=features)
    built.to_parquet(tmp_path / "train.parquet")
    source = find_images(f"hf:{tmp_path}")
    assert source.class_names == ["ape", "bee"]
    assert source.labels.tolist() == [1, 0]
    assert int(ImageSet(source, 8).read(torch.tensor([1])).float().mean()) == 4


def test_digits_have_ten_classes():
    source = find_images("digits")
    assert len(source) == 1797
    assert len(source.class_names) == 10
    assert ImageSet(source, 8).read(torch.arange(100)).max() == 255


@pytest.mark.parametrize(
    ("data", "message"),
    [("cifar01", "Did you mean 'cifar10'"), ("./nowhere", "does not exist"), ("", "--data is missing")],
)
def test_what_is_not_there_is_named(data, message):
    with pytest.raises(UserError, match=message):
        find_images(data)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=f"No images in {tmp_path}"):
        find_images(str(tmp_path))
    with pytest.raises(UserError, match="is a file but not Parquet"):
        find_images(str(tmp_path / "notes.txt"))


@pytest.fixture
def partly_broken(tmp_path):
    for i in range(10):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    (tmp_path / "7.png").write_bytes(b"")
    return tmp_path


def test_broken_images_are_named_counted_and_left_out(partly_broken, capsys):
    images = ImageSet(find_images(str(partly_broken)), 8, max_broken=0.2)
    assert len(images) == 8
    assert "3.png" not in images.ids
    said = capsys.readouterr().out
    assert "Left out 2 broken of 10" in said
    assert "3.png" in said
    means = images.read(torch.arange(8)).float().mean(dim=(1, 2, 3))
    assert means.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
def test_too_many_broken_images_stop_the_run(partly_broken, memory_limit):
    with pytest.raises(UserError, match=r"2 of 10 images are broken, more than --max-broken 0.1.*3\.png.*7\.png"):
        ImageSet(find_images(str(partly_broken)), 8, 0.1, memory_limit).read(torch.arange(10))


def test_images_that_do_not_fit_into_memory_are_decoded_as_they_are_read(partly_broken):
    images = ImageSet(find_images(str(partly_broken)), 8, max_broken=0.2, memory_limit=0)
    means = images.read(torch.arange(10)).float().mean(dim=(1, 2, 3))
    assert means.tolist() == [0, 1, 2, 4, 4, 5, 6, 8, 8, 9], "a broken image gives way to the next whole one"


def test_pictures_of_many_kinds_become_rgb_squares(tmp_path):
    picture(200).convert("L").save(tmp_path / "grey.png")
    picture(200).convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture(200).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    picture(200).convert("RGBA").save(tmp_path / "alpha.png")
    picture(200, (1, 1)).save(tmp_path / "pixel.png")
    picture(200, (300, 100)).save(tmp_path / "wide.png")
    images = ImageSet(find_images(str(tmp_path)), 8, max_broken=0.0).read(torch.arange(6))
    assert images.shape == (6, 3, 8, 8)
    assert (images.float() - 200).abs().max() <= 3


def test_the_side_is_that_of_the_images_or_224(tmp_path):
    picture(1, (40, 30)).save(tmp_path / "a.png")
    assert ImageDomain(VisionConfig(data=str(tmp_path)), 0).config.image_size == 30
    picture(1, (400, 300)).save(tmp_path / "a.png")
    assert ImageDomain(VisionConfig(data=str(tmp_path)), 0).config.image_size == 224


def test_a_folder_of_nothing_readable_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"Not one of the 1 images could be opened, a\.png"):
        ImageDomain(VisionConfig(data=str(tmp_path)), 0)
