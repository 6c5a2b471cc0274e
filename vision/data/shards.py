"""WebDataset shards on a disk: tar files whose members are found by their place, in any order."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress
from contrastive_mm.vision.data.images import ImageSource, printable, to_classes
from contrastive_mm.vision.data.integrity import END_BYTES, Ends, ends_of

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "img")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_shards(pattern: str) -> list[str]:
    """The shards of a pattern, as WebDataset writes them.

    ``{000..015}`` stands for each number of a range, with its zeros, ``{a,b}`` for each of a list, and ``::`` stands
    between patterns.

    Raises:
        UserError: a brace holds neither.
    """
    return [shard for part in pattern.split("::") for shard in _expand(part)]


def _expand(pattern: str) -> Iterator[str]:
    brace = BRACES.search(pattern)
    if brace is None:
        yield pattern
        return
    numbers = RANGE.fullmatch(brace[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    else:
        choices = brace[1].split(",")
    if len(choices) == 0 or (not numbers and len(choices) == 1):
        raise UserError(f"--data: {brace[0]} is neither a range such as {{000..015}} nor a list such as {{a,b}}.")
    for choice in choices:
        yield from _expand(pattern[: brace.start()] + choice + pattern[brace.end() :])


def label_of(members: Mapping[str, bytes], where: str) -> Any:
    """A sample's label: what ``.cls`` holds, or ``label`` (``cls``, ``class``) in ``.json``; None where neither is.

    Raises:
        UserError: the ``.json`` member is no JSON object.
    """
    if "cls" in members:
        text = members["cls"].decode("utf-8", "replace").strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else text or None
    if "json" in members:
        try:
            values = json.loads(members["json"])
        except ValueError as error:
            raise UserError(f"The .json member of {where} is no JSON: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"The .json member of {where} holds a {type(values).__name__}; an object is needed.")
        return next((values[name] for name in ("label", "cls", "class") if name in values), None)
    return None


def image_member(names: Mapping[str, Any]) -> str | None:
    """Which of a sample's members is its image: ``jpg`` before ``png`` and so on; ``left.jpg`` is none."""
    return next((name for name in IMAGE_MEMBERS if name in names), None)


def split_name(name: str) -> tuple[str, str]:
    """A member's key and suffix: what stands before and behind the first dot of its file name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


class _Index:
    """Where the images of shards lie."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.shards, self.offsets, self.sizes = array("i"), array("q"), array("q")
        self.ids: list[str] = []
        self.labels: list[Any] = []

    def add(self, shard: int, key: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> None:
        suffix = image_member(members)
        if suffix is None:
            return
        name = printable(f"{os.path.basename(self.paths[shard])}/{key}")
        texts: dict[str, bytes] = {kind: _content(tar, members[kind]) for kind in ("cls", "json") if kind in members}
        self.ids.append(name)
        self.labels.append(label_of(texts, name))
        self.shards.append(shard)
        self.offsets.append(members[suffix].offset_data)
        self.sizes.append(members[suffix].size)

    def read(self, number: int) -> bytes:
        with open(self.paths[self.shards[number]], "rb") as file:
            file.seek(self.offsets[number])
            return file.read(self.sizes[number])

    def ends(self, number: int) -> Ends:
        size = self.sizes[number]
        if size < END_BYTES:
            return ends_of(self.read(number))
        with open(self.paths[self.shards[number]], "rb", buffering=0) as file:
            file.seek(self.offsets[number])
            head = file.read(END_BYTES)
            file.seek(self.offsets[number] + size - END_BYTES)
            return head, file.read(END_BYTES), size


def open_tars(paths: list[str]) -> ImageSource:
    """Images in uncompressed tar files: members of one key are one sample, as WebDataset writes them.

    The files are read once for their headers; each image is then read from its place, so shuffling, resuming and
    evaluation work as with a folder. Labels come from ``.cls`` or ``.json`` members (``label_of``).

    Raises:
        UserError: a shard is missing, cut off, compressed or no tar file, or holds no image.
    """
    index = _Index(paths)
    for shard in progress(range(len(paths)), desc="index", unit="shard"):
        _index_shard(index, shard)
    classes = to_classes(index.labels, f"the list of labels in {paths[0]}")
    return ImageSource(index.ids, lambda number: Image.open(io.BytesIO(index.read(number))), *classes, ends=index.ends)


def _index_shard(index: _Index, shard: int) -> None:
    path, before = index.paths[shard], len(index.ids)
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                current, suffix = split_name(member.name)
                if current != key:
                    index.add(shard, key or "", members, tar)
                    key, members = current, {}
                members[suffix] = member
            index.add(shard, key or "", members, tar)
        with open(path, "rb") as file:
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            check_tail(file.read())
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path} can't be read as a tar file to its end ({error}). Fetch it again; if it is "
            "compressed, unpack it first."
        ) from error
    if len(index.ids) == before:
        raise UserError(f"{path} holds no images: looked for members ending in {', '.join(IMAGE_MEMBERS)}.")


def check_tail(tail: bytes) -> None:
    """Make sure that a tar file's last block is its end mark: tarfile does not miss one.

    Raises:
        tarfile.ReadError: it is not.
    """
    if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
        raise tarfile.ReadError("it is cut off: the end mark of a tar file is missing")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
