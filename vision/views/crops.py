"""Cropping, resizing and flipping, as PIL's antialiased resize does it, to one grey level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from contrastive_mm.vision.views.colour import to_float
from contrastive_mm.vision.views.draws import Images, Squares

LARGEST_BATCHED = 48
"""On a CPU, views of more pixels a side are resized one by one, by torch's own code for bytes."""


def resize_matrix(
    start: Float[Tensor, " batch"], length: Float[Tensor, " batch"], source: int, target: int
) -> Float[Tensor, "batch target source"]:
    """Weights that resize the stretch [start, start + length) of ``source`` pixels to ``target`` pixels.

    The triangle filter of PIL's antialiased bilinear resize: as wide as the shrinking factor, at least one
    pixel, cut at the stretch's ends, rows summing to 1.
    """
    scale = (length / target)[:, None, None]
    place = torch.arange(target, device=start.device) + 0.5
    centre = start[:, None, None] + place[None, :, None] * scale
    pixel = torch.arange(source, device=start.device)[None, None, :] + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp_min(1.0)).clamp_min(0.0)
    begin, end = start[:, None, None], (start + length)[:, None, None]
    weight = weight * ((pixel > begin) & (pixel < end))
    return weight / weight.sum(dim=2, keepdim=True)


def crop_and_resize(
    images: UInt8[Tensor, "batch channels height width"] | Images,
    boxes: Float[Tensor, "batch 4"],
    size: int,
    mirrored: Bool[Tensor, " batch"] | None = None,
) -> Squares:
    """Crop each image to its box, resize to (size, size), mirror where asked.

    All of it is linear and separable: one matrix for the rows and one for the columns do it for a whole batch. Larger
    views of bytes on a CPU are made one by one, without the matrices' many zeros; they are rounded to whole grey
    levels then, as PIL's are.

    Args:
        images: (B, C, H, W), uint8 in 0..255 or float in 0..1.
        boxes: (B, 4) top, left, height, width in pixels, whole ones for bytes.
        size: side of the result in pixels.
        mirrored: (B,) which are mirrored.

    Returns:
        (B, C, size, size) in 0..1.
    """
    if images.dtype == torch.uint8 and images.device.type == "cpu" and size > LARGEST_BATCHED:
        return _one_by_one(images, boxes, size, mirrored)
    boxes = boxes.to(images.device)
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    if mirrored is not None:
        columns = torch.where(mirrored.to(images.device)[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ to_float(images) @ columns[:, None].transpose(2, 3)


def _one_by_one(
    images: UInt8[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "batch 4"],
    size: int,
    mirrored: Bool[Tensor, " batch"] | None,
) -> Squares:
    resized = images.new_empty(len(images), images.shape[1], size, size)
    flips = [False] * len(images) if mirrored is None else mirrored.tolist()
    for row, ((top, left, height, width), flip) in enumerate(zip(boxes.int().tolist(), flips, strict=True)):
        box = images[row : row + 1, :, top : top + height, left : left + width]
        # The layout that torch's code for bytes is fastest on.
        box = box.contiguous(memory_format=torch.channels_last)
        view = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]
        resized[row] = view.flip(2) if flip else view
    return to_float(resized)
