"""How large images are kept and views are made, and whether images stay in memory."""

from __future__ import annotations

import sys

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import ImageSource

SMALLEST_VIEW = 4
LARGEST_NATIVE = 96
MEMORY_LIMIT = 4 << 30
"""Bytes up to which `--storage auto` keeps images decoded."""


def stored_size(image_size: int) -> int:
    """Side to which images are brought: somewhat more than the views' own, where they are large enough to have it."""
    return image_size if image_size <= LARGEST_NATIVE else image_size * 8 // 7


def memory_limit(storage: str, image_size: int) -> int:
    """Bytes up to which a data set is kept in memory, as decoded squares.

    Large images stay on disk unless asked for: their crops are then taken from the whole image, as the papers' are.
    """
    if storage == "auto":
        return MEMORY_LIMIT if image_size <= LARGEST_NATIVE else 0
    return sys.maxsize if storage == "memory" else 0


def native_size(source: ImageSource, data: str = "the data set") -> int:
    """Side of the views for a data set: the first readable image's shorter side, or 224 where it is over 96.

    Images of less than 4 pixels a side are passed over: a single one, first by chance, is no measure of the rest.

    Raises:
        UserError: no image can be opened, or all are smaller.
    """
    tiny, reason = 0, ""
    for number in range(len(source)):
        try:
            with source.open_image(number) as image:
                side = min(image.size)
        except Exception as error:  # broken; the image set names it
            reason = reason or f" ({error})"
            continue
        if side >= SMALLEST_VIEW:
            return side if side <= LARGEST_NATIVE else 224
        tiny += 1
    if tiny:
        raise UserError(
            f"Not one of the {len(source)} images of {data} has {SMALLEST_VIEW} pixels a side, {source.ids[0]} the "
            "first of them: say with --image-size what they are to be enlarged to."
        )
    raise UserError(
        f"Not one of the {len(source)} images of {data} could be opened, {source.ids[0]} the first of them{reason}."
    )
