"""From encoded images to bytes: whole squares for storage, random crops for views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.io  # noqa: F401 - registers torch.ops.image
from jaxtyping import Float64, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

CROP_ATTEMPTS = 10
DRAWS = 2 * CROP_ATTEMPTS + 2
"""Random numbers that a crop is made from: area and ratio of each attempt, and its place."""
RATIO = (3 / 4, 4 / 3)
REDUCING_GAP = 2
"""A JPEG is decoded at a half, a quarter or an eighth of its size only where each crop keeps so many times the
pixels a side that its view needs; it is the gap that Pillow names as close to full decoding (``reducing_gap``)."""
ORIENTATION = 0x0112
RGB = 3
"""The value of ``torchvision.io.ImageReadMode.RGB``."""


@dataclass(frozen=True)
class Crop:
    """The random resized crop that a view starts from (Szegedy et al. 2015; torchvision's RandomResizedCrop).

    Attributes:
        size: side of the view in pixels.
        smallest: smallest share of the image's area.
        largest: largest share of the image's area.
    """

    size: int
    smallest: float = 0.08
    largest: float = 1.0


def view_names(crops: Sequence[Crop]) -> list[str]:
    """The names of the crops in a batch: ``view_0``, ``view_1``, ... in the order of the views."""
    return [f"view_{number}" for number in range(len(crops))]


def decode(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image as a square of RGB bytes: turned upright, its shorter side resized to ``size``, its middle cut out.

    What is transparent lets white through. Grey values of more than 8 bits are rescaled: 0..65535 to 0..255, and
    0..1 to 0..255 for floats; where 32-bit values lie outside that range, the image's own minimum and maximum
    become 0 and 255. NaN counts as the low end of the range and infinity as the high one. Of an animation the first
    frame counts.

    Raises:
        ValueError: no pixel of a float image is a finite number. Pillow raises errors of many more kinds.
    """
    upright = to_rgb(ImageOps.exif_transpose(image))
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(upright)


def decode_crops(
    image: Image.Image, crops: Sequence[Crop], draws: Float64[np.ndarray, "views draws"]
) -> list[UInt8[Tensor, "3 size size"]]:
    """Random crops of one image, decoded once: each cut out, then resized with antialiasing.

    Ordinary JPEGs go through torchvision, which decodes the same bytes as Pillow in less time; all else, and
    what it refuses, through Pillow as in ``decode``.

    Args:
        image: opened and not yet read.
        crops: what to cut for each view.
        draws: for each view, ``DRAWS`` numbers in [0, 1) that decide its box.

    Returns:
        The views' crops, within 2 of 255 levels of what Pillow's crop and resize make (of the reduced image,
        where ``REDUCING_GAP`` allows to decode a reduced one).

    Raises:
        ValueError: as ``decode``.
    """
    turned = image.getexif().get(ORIENTATION, 1)
    width, height = image.size if turned < 5 else image.size[::-1]
    boxes = [random_box(height, width, crop, numbers) for crop, numbers in zip(crops, draws.tolist(), strict=True)]
    reduction = _reduction(boxes, crops) if image.format == "JPEG" else 1
    pixels = _fast_pixels(image) if turned == 1 and reduction == 1 else None
    if pixels is None:
        if reduction > 1:
            image.draft(None, (image.size[0] // reduction, image.size[1] // reduction))
        upright = to_rgb(ImageOps.exif_transpose(image))
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        boxes = [_scaled(box, pixels.shape[2] / width, pixels.shape[1] / height) for box in boxes]
    return [_resized(pixels, box, crop.size) for box, crop in zip(boxes, crops, strict=True)]


def random_box(height: int, width: int, crop: Crop, draws: Sequence[float]) -> Box:
    """A crop's box, as torchvision's RandomResizedCrop draws it.

    Area uniform in the crop's shares of the image, the logarithm of the aspect ratio uniform in [3/4, 4/3]; the
    first of ten draws that fits inside the image counts, else the largest central box of an allowed ratio.

    Args:
        height: of the image.
        width: of the image.
        crop: the shares.
        draws: ``DRAWS`` numbers in [0, 1).
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(CROP_ATTEMPTS):
        area = height * width * (crop.smallest + draws[2 * attempt] * (crop.largest - crop.smallest))
        ratio = math.exp(low + draws[2 * attempt + 1] * (high - low))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = max(1, min(width, round(height * RATIO[1])))
    box_height = max(1, min(height, round(width / RATIO[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _reduction(boxes: Sequence[Box], crops: Sequence[Crop]) -> int:
    """By how much the JPEG may be reduced while it is decoded: 8, 4, 2, or 1 for not at all."""
    spare = min(min(box[2:]) / crop.size for box, crop in zip(boxes, crops, strict=True))
    return next((step for step in (8, 4, 2) if spare >= REDUCING_GAP * step), 1)


def _scaled(box: Box, across: float, down: float) -> Box:
    top, left, height, width = box
    return round(top * down), round(left * across), max(1, round(height * down)), max(1, round(width * across))


def _fast_pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"] | None:
    """A JPEG's pixels by torchvision's decoder; None where it is none, or not an ordinary one."""
    file = getattr(image, "fp", None)  # an image made in memory has none
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or file is None:
        return None
    file.seek(0)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
    except (RuntimeError, AttributeError):  # Pillow then decides whether the image is broken, as everywhere else
        file.seek(0)
        return None


def decode_jpeg(content: UInt8[Tensor, " bytes"]) -> UInt8[Tensor, "3 height width"]:
    """A JPEG's pixels, by the operator behind ``torchvision.io.decode_jpeg``.

    torchvision 0.29 calls that function deprecated. Once the operator is gone, Pillow decodes what this did.

    Raises:
        RuntimeError: the JPEG is broken, or torchvision was built without the decoder.
        AttributeError: torchvision has no such operator any more.
    """
    pixels: Tensor = torch.ops.image.decode_jpeg(content, RGB, False)
    return pixels


def _resized(pixels: UInt8[Tensor, "3 height width"], box: Box, size: int) -> UInt8[Tensor, "3 size size"]:
    top, left, height, width = box
    cut = pixels[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    if (height, width) == (size, size):
        return cut[0]
    return interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, not turned upright; transparency and grey values are treated as in ``decode``."""
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
