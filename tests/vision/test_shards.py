import io
import json
import tarfile

import pytest
import torch
from pictures import encoded, levels

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.shards import expand_shards
from contrastive_mm.vision.data.sources import find_images


def write_tar(path, members, mode="w"):
    """A tar file of (name, bytes); the plain format, not webdataset's own writer."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def sample(level, label=None):
    members = [(f"dir/{level:04}.png", encoded(level))]
    if label is not None:
        members.append((f"dir/{level:04}.cls", str(label).encode()))
    return members


def two_shards(folder):
    write_tar(folder / "train-000.tar", sample(1, 0) + sample(2, 1))
    write_tar(folder / "train-001.tar", sample(3, 1) + sample(4, 0) + sample(5, 2))
    return folder


@pytest.mark.parametrize("form", ["{000..001}", "{000,001}", "::", "folder"])
def test_shards_by_pattern_list_and_folder(tmp_path, form):
    two_shards(tmp_path)
    data = {"::": f"{tmp_path}/train-000.tar::{tmp_path}/train-001.tar", "folder": str(tmp_path)}
    source = find_images(data.get(form, f"{tmp_path}/train-{form}.tar"))
    assert source.ids == [f"train-00{int(n > 2)}.tar/dir/000{n}" for n in range(1, 6)]
    assert source.labels.tolist() == [0, 1, 1, 0, 2]
    assert source.class_names == ["0", "1", "2"]
    for limit in (0, 1 << 30):
        images = ImageSet(source, 8, memory_limit=limit)
        assert levels(images.read(torch.tensor([4, 0, 2]))) == [5, 1, 3]


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("a-{0..1}.tar::b.tar", ["a-0.tar", "a-1.tar", "b.tar"]),
    ],
)
def test_patterns_stand_for_shards_as_in_webdataset(pattern, shards):
    assert expand_shards(pattern) == shards
    wds = pytest.importorskip("webdataset")
    assert wds.shardlists.expand_urls(pattern) == shards


@pytest.mark.parametrize("pattern", ["a-{}.tar", "a-{3..1}.tar", "a-{x}.tar"])
def test_a_pattern_that_stands_for_nothing_is_named(pattern):
    with pytest.raises(UserError, match="is neither a range such as"):
        expand_shards(pattern)


def test_labels_come_from_cls_or_json_by_name_or_number_and_may_be_missing(tmp_path):
    members = [("a.jpg", encoded(1)), ("a.cls", b"bee\n"), ("b.png", encoded(2)), ("c.json", b'{"label": "ape"}')]
    members += [("c.png", encoded(3)), ("d.png", encoded(4)), ("d.json", b'{"caption": "x"}'), ("e.txt", b"no image")]
    source = find_images(write_tar(tmp_path / "a.tar", members))
    assert source.class_names == ["ape", "bee"]
    assert source.labels.tolist() == [1, -1, 0, -1]
    assert find_images(write_tar(tmp_path / "b.tar", sample(1))).labels is None


@pytest.mark.parametrize(
    "spoilt", [600, 1024, 1300, 1536, 2048, 2100, "empty", "compressed", "missing", "no images", "no json"]
)
def test_a_bad_shard_is_named(tmp_path, spoilt):
    two_shards(tmp_path)
    path = tmp_path / "train-001.tar"
    if isinstance(spoilt, int):
        path.write_bytes(path.read_bytes()[:spoilt])
    elif spoilt == "empty":
        path.write_bytes(b"")
    elif spoilt == "compressed":
        write_tar(path, sample(3), "w:gz")
    elif spoilt == "missing":
        path.unlink()
    elif spoilt == "no images":
        write_tar(path, [("a.txt", b"text")])
    else:
        write_tar(path, [("a.png", encoded(1)), ("a.json", b"{")])
    messages = {"missing": r"1 of 2 shards are not there", "no images": "holds no images", "no json": "is no JSON"}
    with pytest.raises(UserError, match=messages.get(spoilt, "can't be read as a tar file to its end")) as caught:
        find_images(f"{tmp_path}/train-{{000..001}}.tar")
    assert "train-001.tar" in str(caught.value)


def test_a_broken_image_in_a_shard_is_left_out(tmp_path):
    members = [("a.png", encoded(1)[:50]), ("b.png", encoded(2)), ("c.png", b""), ("d.json", json.dumps(3).encode())]
    with pytest.raises(UserError, match="holds a int; an object is needed"):
        find_images(write_tar(tmp_path / "a.tar", [*members, ("d.png", encoded(4))]))
    source = find_images(write_tar(tmp_path / "a.tar", members))
    for limit in (0, 1 << 30):
        assert ImageSet(source, 8, 0.7, memory_limit=limit).ids == ["a.tar/b"]


def test_names_that_are_not_utf8_can_be_written_into_a_table(tmp_path):
    source = find_images(write_tar(tmp_path / "x.tar", [("caf\udce9.png", encoded(7))]))
    assert source.ids == ["x.tar/caf\\udce9"]
    assert levels(ImageSet(source, 8).read(torch.tensor([0]))) == [7]


def test_names_beside_numbers_of_classes_are_told_apart(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample(1, 0) + sample(2, "cat"))
    with pytest.raises(UserError, match=r"x.tar holds int beside str; it must hold the classes' names alone"):
        find_images(path)
