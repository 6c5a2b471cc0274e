import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encoded, idx, levels, picture

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.sources import find_images


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
    assert levels(ImageSet(source, 8).read(torch.tensor([0, 4]))) == [0, 101]


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"bild-ü{i}.JPG")
    source = find_images(str(tmp_path))
    assert len(source) == 4
    assert source.labels is None


def save_all(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return find_images(str(folder))


def test_the_class_is_the_first_folder_on_the_way(tmp_path):
    source = save_all(tmp_path, "ape/old/1.png", "ape/young/1.png", "ape/2.png", "bee/x/y/1.png")
    assert source.class_names == ["ape", "bee"]
    assert dict(zip(source.ids, source.labels.tolist(), strict=True)) == {
        "ape/2.png": 0,
        "ape/old/1.png": 0,
        "ape/young/1.png": 0,
        "bee/x/y/1.png": 1,
    }


def test_a_folder_that_holds_everything_stands_in_for_its_parent(tmp_path):
    source = save_all(tmp_path, "unpacked/set/ape/1.png", "unpacked/set/bee/1.png", "__MACOSX/set/ape/1.png")
    assert source.class_names == ["ape", "bee"]
    assert source.ids == ["unpacked/set/ape/1.png", "unpacked/set/bee/1.png"]
    assert save_all(tmp_path / "flat", "photos/1.png", "photos/2.png").labels is None


def test_hidden_files_and_folders_are_skipped(tmp_path):
    source = save_all(tmp_path, "ape/1.png", "ape/._1.png", ".thumbnails/1.png", "bee/.cache/1.png", "bee/1.png")
    assert source.ids == ["ape/1.png", "bee/1.png"]
    assert save_all(tmp_path / ".hidden", "1.png").ids == ["1.png"], "a hidden folder that was asked for"


@pytest.mark.parametrize("loose", ["cover.png", "unlabelled/1.png", "Unlabeled/x/1.png"])
def test_images_in_no_class_folder_have_no_label_and_a_note_says_so(tmp_path, capsys, loose):
    source = save_all(tmp_path, "ape/1.png", "bee/1.png", loose)
    labels = dict(zip(source.ids, source.labels.tolist(), strict=True))
    assert labels == {"ape/1.png": 0, "bee/1.png": 1, loose: -1}
    assert source.class_names == ["ape", "bee"]
    assert "1 of 3 images in" in (said := capsys.readouterr().out)
    assert loose in said


@pytest.mark.parametrize(
    "names",
    [
        ["train/ape/1.png", "train/bee/1.png", "val/ape/1.png", "val/bee/1.png"],
        ["Train/ape/1.png", "Test/ape/1.png"],
        ["set/training/ape/1.png", "set/validation/ape/1.png", "set/test/ape/1.png"],
        ["train/1.png", "test/1.png"],
    ],
)
def test_folders_that_are_splits_are_not_taken_for_classes(tmp_path, names):
    parts = names[0].split("/")
    train = tmp_path.joinpath(*parts[: 2 if parts[0] == "set" else 1])
    with pytest.raises(UserError, match=f"look like splits .* such as --data {train}"):
        save_all(tmp_path, *names)
    assert 0 < len(find_images(str(train))) < len(names), "what the message says works"


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    assert save_all(tmp_path, "train/1.png", "tram/1.png").class_names == ["train", "tram"]


def test_other_data_beside_images_do_not_hide_them(tmp_path, capsys):
    save_all(tmp_path, "ape/1.png", "bee/1.png")
    pq.write_table(pa.table({"id": ["a"], "feature": [0.5]}), tmp_path / "features.parquet")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not even IDX")
    capsys.readouterr()
    assert find_images(str(tmp_path)).ids == ["ape/1.png", "bee/1.png"]
    assert "not train-images-idx3-ubyte" in capsys.readouterr().out
    pq.write_table(pa.table({"image": [encoded(7)]}), tmp_path / ".hidden.parquet")
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "features.parquet").unlink()
    find_images(str(tmp_path))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits:zzz", r"Unknown split 'zzz' in the data set digits\..*Known: train"),
        ("cifar10:tets", r"Unknown split 'tets' in the data set cifar10\. Did you mean 'test'\? Known: test, train"),
        ("mnist:val", "Unknown split 'val'.*Known: test, train"),
        ("stl10:unlabelled", "Did you mean 'unlabeled'"),
        ("svhn:extr", "Known: extra, test, train"),
    ],
)
def test_a_split_that_is_not_there_is_named_before_anything_is_loaded(data, message):
    with pytest.raises(UserError, match=message):
        find_images(data)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [-1, 0, 1], [-1, -1, -1]])
def test_stl10_may_be_labelled_in_part(monkeypatch, numbers):
    class STL10:
        labels = np.array(numbers)
        classes = ("ape", "bee", "cow")

        def __init__(self, *arguments, **options): ...
        def __len__(self):
            return 3

    monkeypatch.setattr("torchvision.datasets.STL10", STL10)
    source = find_images("stl10:train+unlabeled")
    assert (None if source.labels is None else source.labels.tolist()) == (None if max(numbers) < 0 else numbers)
    assert (source.class_names is None) == (max(numbers) < 0)


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
    assert levels(ImageSet(source, 8).read(torch.tensor([1]))) == [4]
    with pytest.raises(UserError, match=r"\(tset\) could not be loaded: Unknown split \"tset\". Should be one of"):
        find_images(f"hf:{tmp_path}:tset")


@pytest.mark.parametrize(("numbers", "labels"), [([2, 0, 2], [2, 0, 2]), ([-1, -1, -1], None), ([None] * 3, None)])
def test_hugging_face_classes_without_images_and_without_labels(tmp_path, numbers, labels):
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee", "cow"])}
    columns = {"image": [picture(3), None, picture(4)], "label": numbers}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(tmp_path / "train.parquet")
    source = find_images(f"hf:{tmp_path}")
    assert (None if source.labels is None else source.labels.tolist()) == labels
    images = ImageSet(source, 8, max_broken=0.5)
    assert images.ids == ["row 0", "row 2"], "a cell without an image is a broken one"
    assert levels(images.read(torch.arange(2))) == [3, 4]


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
    with pytest.raises(UserError, match="is a file but neither Parquet nor tar"):
        find_images(str(tmp_path / "notes.txt"))
