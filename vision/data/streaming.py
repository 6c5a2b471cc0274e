"""Streams of images: shards read from front to back, of a length that nobody knows beforehand."""

from __future__ import annotations

import contextlib
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.hub import hub_columns, import_datasets, load_hub
from contrastive_mm.vision.data.images import ImageSource
from contrastive_mm.vision.data.integrity import ends_of
from contrastive_mm.vision.data.packed import cell_bytes, open_cell
from contrastive_mm.vision.data.shards import check_tail, expand_shards, image_member, label_of

STREAM = "stream:"
SHARD_STREAM = 3
"""Which of a seed's random numbers order the shards; crops and blocks have their own."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""How gzip, bzip2 and xz begin."""
SAMPLED = 1000
"""Images from a stream's beginning by which its encoder is judged without labels."""


@dataclass(frozen=True)
class Sample:
    """One image of a stream.

    Attributes:
        name: where it comes from.
        content: the image, encoded; None where its cell holds none.
        label: class number, or None.
    """

    name: str
    content: bytes | None
    label: int | None


class Shard(ABC):
    """One shard, read from front to back."""

    @abstractmethod
    def __iter__(self) -> Iterator[Sample]: ...

    @abstractmethod
    def state(self) -> Any:
        """What opens the shard behind the sample that was read last; of types that a checkpoint holds."""


class Stream(ABC):
    """Shards of samples.

    Attributes:
        num_shards: how many there are.
    """

    num_shards: int

    @abstractmethod
    def open_shard(self, number: int, state: Any) -> Shard:
        """A shard from its beginning (state None), or from where it was left."""


class StreamReader:
    """Samples of shards in a given order.

    Args:
        stream: read from.
        order: numbers of the shards.
        state: what ``state`` returned, to go on from there.
    """

    def __init__(self, stream: Stream, order: list[int], state: dict[str, Any] | None = None) -> None:
        self._stream = stream
        self._order = order
        self._place = 0 if state is None else int(state["place"])
        self._inner = None if state is None else state["inner"]
        self._shard: Shard | None = None
        self._samples = self._read()

    def read(self, count: int) -> list[Sample]:
        """The next samples; fewer at the end."""
        return list(islice(self._samples, count))

    def state(self) -> dict[str, Any]:
        """Where the next sample stands."""
        return {"place": self._place, "inner": self._inner if self._shard is None else self._shard.state()}

    def _read(self) -> Iterator[Sample]:
        while self._place < len(self._order):
            self._shard = self._stream.open_shard(self._order[self._place], self._inner)
            yield from self._shard
            self._place, self._inner, self._shard = self._place + 1, None, None


class _TarShard(Shard):
    def __init__(self, path: str, number: int) -> None:
        self._path = path
        self._number = number

    def state(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Sample]:
        try:
            for members in islice(self._members(), self._number, None):
                self._number += 1
                name = f"{os.path.basename(self._path)}/{members['__key__']}"
                suffix = image_member(members)
                label = label_of({kind: members[kind] for kind in ("cls", "json") if kind in members}, name)
                if suffix is not None:
                    yield Sample(name, members[suffix], label if isinstance(label, int) else None)
        except (OSError, ValueError, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or error.args[0]
            raise UserError(f"The shard {self._path} can't be read behind sample {self._number}: {reason}.") from error

    def _members(self) -> Iterator[dict[str, Any]]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        # The library's own chain of these three leaves the file open.
        with contextlib.closing(gopen(self._path)) as file:
            watched = _Watched(file)
            yield from group_by_keys(tar_file_expander([{"url": self._path, "stream": watched}]))
            watched.check_end()


class _Watched:
    """A stream of which the end is looked at: tarfile takes one that is cut off in a header for a whole one."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._head = b""
        self._tail = b""

    def read(self, size: int) -> bytes:
        content: bytes = self._file.read(size)
        self._head = self._head or content[:6]
        self._tail = (self._tail + content)[-tarfile.BLOCKSIZE :]
        return content

    def check_end(self) -> None:
        while self.read(tarfile.RECORDSIZE):
            pass
        if not self._head.startswith(COMPRESSED):  # those carry a checksum
            check_tail(self._tail)


class TarStream(Stream):
    """WebDataset shards: files, or whatever the webdataset library opens (``http://``, ``s3://``, ``pipe:``).

    Args:
        paths: the shards.

    Raises:
        UserError: the library is not installed.
    """

    def __init__(self, paths: list[str]) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise UserError(
                'Streams of tar shards need one more package: pip install "contrastive_mm[stream]".'
            ) from error
        self.paths = paths
        self.num_shards = len(paths)

    def open_shard(self, number: int, state: Any) -> Shard:
        """See ``Stream``."""
        return _TarShard(self.paths[number], state or 0)


class _HubShard(Shard):
    def __init__(self, dataset: Any, number: int, columns: tuple[str, str | None], state: Any) -> None:
        self._dataset = dataset
        self._shard = number
        self._columns = columns
        self._number = 0
        if state is not None:
            self._number = state["number"]
            dataset.load_state_dict(state["dataset"])

    def state(self) -> dict[str, Any]:
        return {"number": self._number, "dataset": self._dataset.state_dict()}

    def __iter__(self) -> Iterator[Sample]:
        image, label = self._columns
        for row in self._dataset:
            name = f"shard {self._shard}, row {self._number}"
            self._number += 1
            yield Sample(name, _content(row[image]), None if label is None else row[label])


class HubStream(Stream):
    """A split of a Hugging Face data set, without downloading it first.

    Args:
        name: the data set, ``owner/name`` or a folder.
        split: which part.

    Raises:
        UserError: as ``load_hub`` and ``hub_columns``; or its columns can't be told without reading it.
    """

    def __init__(self, name: str, split: str) -> None:
        dataset = load_hub(name, split, streaming=True)
        if dataset.features is None:
            raise UserError(f"Hugging Face data set {name!r} does not say what its columns hold; leave out 'stream:'.")
        image, label, _ = hub_columns(name, dataset.features)
        self._columns = (image, label)
        self._dataset = dataset.cast_column(image, import_datasets().Image(decode=False))
        self.num_shards = int(dataset.num_shards)

    def open_shard(self, number: int, state: Any) -> Shard:
        """See ``Stream``."""
        return _HubShard(self._dataset.shard(self.num_shards, number), number, self._columns, state)


def _content(cell: Any) -> bytes | None:
    path = cell.get("path") if isinstance(cell, dict) else None
    try:
        if path and "://" in path and cell.get("bytes") is None:
            import fsspec

            with fsspec.open(path, "rb") as file:
                content: bytes = file.read()
                return content
        return cell_bytes(cell)
    except (ValueError, OSError):  # counted as a broken image where it is opened
        return None


def open_stream(data: str) -> Stream:
    """The stream of ``stream:hf:owner/name`` (``:test`` for another split), or of tar shards by a pattern.

    Raises:
        UserError: it is neither, or can't be opened.
    """
    source = data.removeprefix(STREAM)
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        return HubStream(name, split or "train")
    if ".tar" not in source:
        raise UserError(f"--data {data}: a stream is hf:owner/name, or tar shards such as train-{{000..015}}.tar.")
    return TarStream(expand_shards(source))


def stream_sample(stream: Stream) -> ImageSource:
    """The first images of a stream, without labels.

    Raises:
        UserError: it holds none.
    """
    samples = StreamReader(stream, list(range(stream.num_shards))).read(SAMPLED)
    if not samples:
        raise UserError("The stream holds no images.")
    if len(samples) == SAMPLED:
        tqdm.write(f"The stream's first {SAMPLED} images stand in for it where scores and embeddings are wanted.")
    names = [sample.name for sample in samples]
    contents = [sample.content for sample in samples]
    return ImageSource(names, lambda i: open_cell(contents[i]), ends=lambda i: ends_of(contents[i] or b""))


def shard_order(num_shards: int, seed: int, epoch: int) -> list[int]:
    """The shards of an epoch, in an order of its own."""
    order: list[int] = np.random.default_rng([seed, epoch, 0, SHARD_STREAM]).permutation(num_shards).tolist()
    return order
