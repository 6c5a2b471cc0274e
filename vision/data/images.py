"""Data sets of images: labels, which images are whole, and their pixels in memory or on the way from the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress
from contrastive_mm.vision.data.decoding import decode
from contrastive_mm.vision.data.integrity import BrokenImages, Ends, looks_whole

ROWS_AHEAD = 1024
"""Images handed to the threads at a time, so that a million don't wait as a million tasks and results."""
UNLABELLED = -1
"""Class number of an image without a label in a data set that has labels for others."""


@dataclass
class ImageSource:
    """Images that are still encoded.

    Attributes:
        ids: a name for each image: its path, or its row in the file.
        open_image: opens image number i; raises whatever its reader raises where the image is broken.
        labels: (N,) class numbers, -1 (``UNLABELLED``) for an image without one; None where no image has one. A
            class may be without images.
        class_names: name of each class.
        ends: reads the first and last bytes of image number i (see ``looks_whole``), where that is cheap.
    """

    ids: list[str]
    open_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None
    ends: Callable[[int], Ends] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)


def printable(name: str) -> str:
    """A name that can be printed and written into a table: one that is not UTF-8 on the disk can't be."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


Classes = tuple[Tensor, list[str]] | tuple[None, None]


def to_classes(values: Sequence[Any], where: str, names: list[str] | None = None) -> Classes:
    """Class numbers and class names from the labels of a data set.

    None, NaN and -1 mean "not labelled" (-1 is what Hugging Face and torchvision write). If they are all there
    is, the set is unlabelled.

    Args:
        values: a label an image.
        where: what holds them, for the error.
        names: names of the classes 0, 1, ... where the values are their numbers; else each distinct value is a
            class, in sorted order.

    Returns:
        (N,) class numbers, -1 where there is no label, and the classes' names; (None, None) for an unlabelled set.

    Raises:
        UserError: a label is neither a name nor a number, or a number that ``names`` has no name for.
    """
    labelled = [value for value in values if not _is_missing(value)]
    if not labelled:
        return None, None
    if names is None:
        try:
            distinct = sorted(set(labelled))
        except TypeError as error:
            kinds = " beside ".join(sorted({type(value).__name__ for value in labelled}))
            raise UserError(
                f"{where} holds {kinds}; it must hold the classes' names alone or their numbers."
            ) from error
        numbers = {value: number for number, value in enumerate(distinct)}
        names = [str(value) for value in distinct]
    else:
        numbers = {number: number for number in range(len(names))}
        if strange := [value for value in labelled if value not in numbers]:
            raise UserError(
                f"{where} holds the class {strange[0]}, but only classes 0 to {len(names) - 1} have names."
            )
    return torch.tensor([UNLABELLED if _is_missing(value) else numbers[value] for value in values]), names


def _is_missing(value: Any) -> bool:
    return value is None or value != value or value == UNLABELLED


def join_sources(first: ImageSource, second: ImageSource, name: str) -> ImageSource:
    """Images to learn from, and after them images to score on, whose classes are the first's by name.

    Args:
        first: with labels.
        second: with labels.
        name: what the second is called, for errors.

    Raises:
        UserError: one of them has no labels, or the second a class that the first has not.
    """
    if first.labels is None or first.class_names is None:
        raise UserError(f"--data has no labels to learn from, so --test-data {name} can't be scored.")
    if second.labels is None or second.class_names is None:
        raise UserError(f"--test-data {name} has no labels to score by.")
    numbers = {class_name: number for number, class_name in enumerate(first.class_names)}
    held = second.labels.unique()
    strange = [second.class_names[i] for i in held[held >= 0].tolist() if second.class_names[i] not in numbers]
    if strange:
        shown = ", ".join(list(numbers)[:5]) + (", ..." if len(numbers) > 5 else "")
        raise UserError(f"--test-data {name} has the class {strange[0]}, which --data has not (it has {shown}).")
    renumbered = torch.tensor([numbers.get(each, UNLABELLED) for each in second.class_names] + [UNLABELLED])
    labels = torch.cat([first.labels, renumbered[second.labels]])  # -1, for no label, is the last there too
    count, first_ends, second_ends = len(first), first.ends, second.ends
    ends = None
    if first_ends is not None and second_ends is not None:
        ends = lambda row: first_ends(row) if row < count else second_ends(row - count)  # noqa: E731
    return ImageSource(
        first.ids + second.ids,
        lambda row: first.open_image(row) if row < count else second.open_image(row - count),
        labels,
        first.class_names,
        ends=ends,
    )


class ImageSet:
    """Images of one size as bytes: all in memory, or decoded each time they are read.

    Broken images are found at the start, named once and left out for good, as long as their share stays within
    ``max_broken``: image number i, its id and its label always belong together. In memory all are decoded then. On
    disk only the ends of each are read, and those are decoded that don't begin and end as a whole image does: a
    fault in the middle of a file shows when it is read.

    Args:
        source: where the images come from.
        size: side in pixels to which each is brought.
        max_broken: largest share of broken images that is put up with.
        memory_limit: bytes up to which all images are kept decoded; 0 keeps them on disk.
        workers: threads that decode; one a core where None.

    Attributes:
        rows: (N,) numbers in the source of the whole images, ascending.
        broken: what was left out: number in the source -> name and cause.
        in_memory: whether the pixels are kept.

    Raises:
        UserError: more broken images than that, or no whole one.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        max_broken: float = 0.01,
        memory_limit: int = 4 << 30,
        workers: int | None = None,
    ) -> None:
        self.source = source
        self.size = size
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}
        self.broken_later = BrokenImages(max_broken, lambda: len(source))
        self._threads = ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1)
        self.in_memory = len(source) * 3 * size * size <= memory_limit
        if self.in_memory:
            self.rows, self._pixels = self._decode_all()
        else:
            self.rows, self._pixels = self._check_all(), torch.empty(0)
        self._judge_broken()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Int[Tensor, " images"] | None:
        """(N,) class numbers, -1 where an image has none; None where no image has one."""
        return None if self.source.labels is None else self.source.labels[self.rows]

    @property
    def ids(self) -> list[str]:
        """N names."""
        return [self.source.ids[row] for row in self.rows.tolist()]

    def open(self, index: int) -> Image.Image:
        """The encoded image of this number."""
        return self.source.open_image(int(self.rows[index]))

    def note_broken(self, index: int, error: Exception) -> None:
        """Count an image that was found broken after the start.

        Raises:
            UserError: there are more of them than ``max_broken`` allows.
        """
        self.broken_later.note(self.source.ids[int(self.rows[index])], error)

    def read(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch 3 size size"]:
        """The images of these numbers, on the CPU.

        Raises:
            UserError: an image that looked whole at the start can't be read.
        """
        if self.in_memory:
            return self._pixels[indices]
        decoded = list(self._threads.map(self._decode_whole, self.rows[indices].tolist()))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def pixels_on(self, device: torch.device) -> UInt8[Tensor, "images 3 size size"]:
        """All images in memory, on a device; on the CPU where they would take over half of what that has free."""
        if device.type == "cuda" and self._pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self._pixels
        return self._pixels.to(device)

    def _decode(self, row: int) -> NDArray[Any]:
        with self.source.open_image(row) as image:
            return decode(image, self.size)

    def _decode_whole(self, row: int) -> NDArray[Any]:
        try:
            return self._decode(row)
        except Exception as error:
            raise UserError(
                f"{self.source.ids[row]} looked whole at the start and can't be read ({error}). Put a whole copy in "
                "its place, or take it out of the data."
            ) from error

    def _decode_or_note(self, row: int) -> NDArray[Any] | None:
        try:
            return self._decode(row)
        except Exception as error:  # damaged files make Pillow's readers raise nearly every kind there is
            self.broken[row] = f"{self.source.ids[row]} ({error})"
            return None

    def _each_decoded(self) -> Iterator[NDArray[Any] | None]:
        for rows in torch.arange(len(self.source)).split(ROWS_AHEAD):
            yield from self._threads.map(self._decode_or_note, rows.tolist())

    def _decode_all(self) -> tuple[Tensor, Tensor]:
        """The numbers of the whole images, and their pixels."""
        count = len(self.source)
        pixels = torch.empty(count, 3, self.size, self.size, dtype=torch.uint8)
        whole: list[int] = []
        for row, array in enumerate(progress(self._each_decoded(), desc="decode", total=count, unit="image")):
            if array is not None:
                pixels[len(whole)] = torch.from_numpy(array.copy()).permute(2, 0, 1)
                whole.append(row)
        return torch.tensor(whole), pixels[: len(whole)]

    def _is_whole(self, row: int) -> bool:
        try:
            whole = self.source.ends is not None and looks_whole(self.source.ends(row))
        except Exception:  # it can't even be opened: decoding says why
            whole = False
        return whole or self._decode_or_note(row) is not None

    def _check_all(self) -> Tensor:
        """The numbers of the images that look whole."""
        chunks = torch.arange(len(self.source)).split(ROWS_AHEAD)
        checked = self._threads.map(lambda rows: [self._is_whole(row) for row in rows.tolist()], chunks)
        shown = progress(checked, desc="check", total=len(chunks), unit_scale=ROWS_AHEAD, unit="image")
        return torch.tensor(list(chain.from_iterable(shown))).nonzero().flatten()

    def _judge_broken(self) -> None:
        count, names = len(self.source), [self.broken[row] for row in sorted(self.broken)]
        if not names:
            return
        shown = ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
        if len(names) == count:
            raise UserError(f"Not one of the {count} images could be read: {shown}.")
        if len(names) > self.max_broken * count:
            raise UserError(
                f"{len(names)} of {count} images are broken, more than --max-broken {self.max_broken} allows: "
                f"{shown}. Repair them, or raise --max-broken."
            )
        tqdm.write(f"Left out {len(names)} broken of {count} images: {shown}")
