"""Images of one size as bytes: decoding, the broken ones, memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress

ROWS_AHEAD = 1024
"""Images handed to the threads at a time, so that a million don't wait as a million tasks and results."""


@dataclass
class ImageSource:
    """Images that are still encoded.

    Attributes:
        ids: a name for each image: its path, or its row in the file.
        open_image: opens image number i; raises whatever its reader raises where the image is broken.
        labels: (N,) class numbers, or None. A class may be without images.
        class_names: name of each class.
    """

    ids: list[str]
    open_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


Classes = tuple[Tensor, list[str]] | tuple[None, None]


def to_classes(values: Sequence[Any], where: str, names: list[str] | None = None) -> Classes:
    """Class numbers and class names from the labels of a data set.

    None, NaN and -1 mean "not labelled" (-1 is what Hugging Face and torchvision write). If they are all there
    is, the set is unlabelled; among other labels they are an error.

    Args:
        values: a label an image.
        where: what holds them, for the error.
        names: names of the classes 0, 1, ... where the values are their numbers; else each distinct value is a
            class, in sorted order.

    Returns:
        (N,) class numbers and the classes' names; (None, None) for an unlabelled set.

    Raises:
        UserError: some images have a label and some don't, or a label is neither a name nor a number.
    """
    missing = [row for row, value in enumerate(values) if value is None or value != value or value == -1]
    if len(missing) == len(values):
        return None, None
    if missing:
        raise UserError(
            f"Row {missing[0]} of {where} has no label (it holds {values[missing[0]]}), nor have "
            f"{len(missing)} of {len(values)} rows in all. Label them, or leave the labels or these rows out."
        )
    if names is not None:
        return torch.tensor(values), names
    try:
        distinct = sorted(set(values))
    except TypeError as error:
        raise UserError(f"{where} holds {type(values[0]).__name__}, not names or numbers of classes.") from error
    numbers = {value: number for number, value in enumerate(distinct)}
    return torch.tensor([numbers[value] for value in values]), [str(value) for value in distinct]


def decode(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image as a square of RGB bytes: turned upright, its shorter side resized to ``size``, its middle cut out.

    What is transparent lets white through. Grey values of more than 8 bits are rescaled: 0..65535 to 0..255, and
    0..1 to 0..255 for floats; where 32-bit values lie outside that range, the image's own minimum and maximum
    become 0 and 255. NaN counts as the low end of the range and infinity as the high one.

    Raises:
        ValueError: no pixel of a float image is a finite number. Pillow raises errors of many more kinds.
    """
    upright = _to_rgb(ImageOps.exif_transpose(image))
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no pixel is a finite number")
    low, high = float(finite.min()), float(finite.max())
    # A 16-bit file may come as mode "I" (PGM; PNG in older Pillow), so the values tell, not the mode.
    whole_range = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= whole_range:
        low, high = 0.0, whole_range
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    share = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return Image.fromarray((share * 255).round().astype(np.uint8))


class ImageSet:
    """Images of one size as bytes: all in memory where they fit, else decoded each time they are read.

    Broken images are found at the start, named once and left out for good, as long as their share stays within
    ``max_broken``: image number i, its id and its label always belong together. Where the images don't fit into
    memory, that costs one pass over the data before the first read, about as long as the decoding of one epoch:
    a JPEG that is cut off shows only when all of it is decoded.

    Args:
        source: where the images come from.
        size: side in pixels to which each is brought.
        max_broken: largest share of broken images that is put up with.
        memory_limit: bytes up to which all images are kept decoded.

    Attributes:
        rows: (N,) numbers in the source of the whole images, ascending.
        broken: what was left out: number in the source -> name and cause.

    Raises:
        UserError: more broken images than that, or no whole one.
    """

    def __init__(self, source: ImageSource, size: int, max_broken: float = 0.01, memory_limit: int = 4 << 30) -> None:
        self.source = source
        self.size = size
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        in_memory = len(source) * 3 * size * size <= memory_limit
        self.rows, self._pixels = self._decode_all(in_memory)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Int[Tensor, " images"] | None:
        """(N,) class numbers, or None."""
        return None if self.source.labels is None else self.source.labels[self.rows]

    @property
    def ids(self) -> list[str]:
        """N names."""
        return [self.source.ids[row] for row in self.rows.tolist()]

    def read(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch 3 size size"]:
        """The images of these numbers.

        Raises:
            UserError: an image that was whole at the start can't be read any more.
        """
        if self._pixels is not None:
            return self._pixels[indices]
        decoded = list(self._threads.map(self._decode_whole, self.rows[indices].tolist()))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, row: int) -> NDArray[Any]:
        with self.source.open_image(row) as image:
            return decode(image, self.size)

    def _decode_whole(self, row: int) -> NDArray[Any]:
        try:
            return self._decode(row)
        except Exception as error:
            raise UserError(
                f"{self.source.ids[row]} was whole at the start and can't be read any more ({error}). Put it back; "
                "training then goes on with --resume."
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

    def _decode_all(self, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The numbers of the whole images, and their pixels if they are to be kept."""
        count = len(self.source)
        pixels = torch.empty(count if keep else 0, 3, self.size, self.size, dtype=torch.uint8)
        whole: list[int] = []
        task = "decode" if keep else "check"
        for row, array in enumerate(progress(self._each_decoded(), desc=task, total=count, unit="image")):
            if array is None:
                continue
            if keep:
                pixels[len(whole)] = torch.from_numpy(array.copy()).permute(2, 0, 1)
            whole.append(row)
        self._judge_broken()
        return torch.tensor(whole), pixels[: len(whole)] if keep else None

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
