import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encoded, idx, levels

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.packed import read_idx
from contrastive_mm.vision.data.sources import find_images


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("nested", [True, False])
def test_parquet(tmp_path, nested):
    cells = [encoded(n) for n in range(4)]
    column = [{"bytes": cell, "path": None} for cell in cells] if nested else cells
    data = write_parquet(tmp_path / "data.parquet", image=column, label=["b", "a", "b", "a"])
    source = find_images(data)
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert source.class_names == ["a", "b"]
    assert levels(ImageSet(source, 8).read(torch.tensor([2]))) == [2]


def test_a_folder_of_parquet_files_is_one_set_in_the_order_of_their_names(tmp_path):
    write_parquet(tmp_path / "b.parquet", label=[7, 8], image=[encoded(3), encoded(4)])
    write_parquet(tmp_path / "a.parquet", image=[encoded(1), encoded(2)], other=["x", "y"], label=[8, 7])
    source = find_images(str(tmp_path))
    assert levels(ImageSet(source, 8).read(torch.arange(4))) == [1, 2, 3, 4]
    assert source.labels.tolist() == [1, 0, 0, 1]


def test_parquet_without_images_names_its_columns(tmp_path):
    with pytest.raises(UserError, match=r"data\.parquet has no column 'image'; its columns are text"):
        find_images(write_parquet(tmp_path / "data.parquet", text=["a"]))
    with pytest.raises(UserError, match=r"empty\.parquet holds no images"):
        find_images(write_parquet(tmp_path / "empty.parquet", image=pa.array([], pa.binary())))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not Parquet at all" * 10, None])
def test_a_parquet_file_that_is_broken_is_named(tmp_path, content):
    path = tmp_path / "data.parquet"
    write_parquet(path, image=[encoded(1)] * 50)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(UserError, match=r"data\.parquet can't be read as Parquet"):
        find_images(str(path))
    with pytest.raises(UserError, match=r"data\.parquet can't be read as Parquet"):
        find_images(str(tmp_path))


def test_parquet_files_whose_columns_differ_in_kind_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[encoded(1)], label=["ape"])
    write_parquet(tmp_path / "b.parquet", image=[encoded(1)], label=[3])
    with pytest.raises(UserError, match=r"columns differ among the 2 Parquet files, .*a\.parquet the first"):
        find_images(str(tmp_path))


@pytest.mark.parametrize(
    "labels", [["a", None, "b"], [0, -1, 1], [0.0, float("nan"), 1.0]], ids=["null", "minus one", "nan"]
)
def test_a_row_without_a_label_among_labelled_ones_is_minus_one(tmp_path, labels):
    source = find_images(write_parquet(tmp_path / "data.parquet", image=[encoded(1)] * 3, label=labels))
    assert source.labels.tolist()[1] == -1
    assert min(source.labels[[0, 2]]) >= 0


@pytest.mark.parametrize("label", [None, -1])
def test_a_label_column_without_a_single_label_is_none(tmp_path, label):
    source = find_images(write_parquet(tmp_path / "data.parquet", image=[encoded(1)] * 3, label=[label] * 3))
    assert source.labels is None
    assert source.class_names is None


def test_labels_that_are_no_classes_are_named(tmp_path):
    with pytest.raises(UserError, match="holds list; it must hold the classes' names"):
        find_images(write_parquet(tmp_path / "data.parquet", image=[encoded(1)] * 2, label=[[1, 2], [3]]))


@pytest.mark.parametrize("cell", [None, b"nonsense", {"bytes": None, "path": "x.png"}])
def test_a_cell_without_an_image_counts_as_broken(tmp_path, cell):
    whole = {"bytes": encoded(5), "path": None} if isinstance(cell, dict) else encoded(5)
    source = find_images(write_parquet(tmp_path / "data.parquet", image=[cell, whole]))
    assert ImageSet(source, 8, max_broken=0.5).ids == ["row 1"]


@pytest.mark.parametrize("cell", [{"path": "x.png"}, "x.png", 3])
def test_a_column_of_something_else_than_images_is_named(tmp_path, cell):
    source = find_images(write_parquet(tmp_path / "data.parquet", image=[cell, cell]))
    with pytest.raises(UserError, match=r"Not one of the 2 images could be read: row 0 \(the cell holds no"):
        ImageSet(source, 8, max_broken=1.0)


PIXELS = np.arange(5 * 6 * 6, dtype=np.uint8).reshape(5, 6, 6)
LABELS = np.array([3, 1, 3, 1, 3], np.uint8)


def write_idx(folder, zipped=False, images=PIXELS, labels=LABELS):
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        content = idx(array)
        file = folder / (name + (".gz" if zipped else ""))
        file.write_bytes(gzip.compress(content) if zipped else content)
    return str(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_folder(tmp_path, zipped):
    source = find_images(write_idx(tmp_path, zipped))
    assert source.class_names == ["1", "3"]
    assert source.labels.tolist() == [1, 0, 1, 0, 1]
    read = ImageSet(source, 6).read(torch.tensor([4]))
    assert torch.equal(read[0, 0], torch.from_numpy(PIXELS[4]))


def test_idx_with_fewer_labels_than_images_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte holds labels of shape \(4,\) for 5 images"):
        find_images(write_idx(tmp_path, labels=LABELS[:4]))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte holds an array of 2 dimensions"):
        find_images(write_idx(tmp_path, images=PIXELS[0], labels=LABELS))


def test_labels_come_from_the_folder_of_the_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_idx(tmp_path / "a", labels=LABELS[::-1])
    write_idx(tmp_path / "b", images=PIXELS[:3], labels=LABELS[:3])
    (tmp_path / "a" / "train-labels-idx1-ubyte").unlink()
    assert find_images(str(tmp_path)).labels is None


def test_idx_cut_off_is_named(tmp_path):
    (tmp_path / "x-ubyte").write_bytes(idx(np.zeros((4, 3, 3), np.uint8))[:-5])
    with pytest.raises(UserError, match="should hold 36 values and holds 31"):
        read_idx(tmp_path / "x-ubyte")
    for content in (b"no", b"", b"\x00\x00\x08\x03\x00\x00\x00\x04\x00\x00"):
        (tmp_path / "y-ubyte").write_bytes(content)
        with pytest.raises(UserError, match="y-ubyte is not an IDX file"):
            read_idx(tmp_path / "y-ubyte")


@pytest.mark.parametrize("spoil", [lambda content: content[:-12], lambda content: b"no gzip", lambda content: b""])
def test_a_broken_gz_is_named(tmp_path, spoil):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(gzip.compress(idx(PIXELS))))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz (can't be read|is not an IDX file)"):
        find_images(str(tmp_path))


def test_a_gz_with_a_wrong_byte_is_named(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.compress(idx(PIXELS)))
    content[15] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz can't be read"):
        find_images(str(tmp_path))
