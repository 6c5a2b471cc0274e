"""Cropping, resizing and flipping: linear and separable, so one matrix for the rows and one for the columns does all.

They match PIL's antialiased resize to one grey level.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contrastive_mm.vision.draws import Images, Squares, uniform

RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


def random_boxes(
    count: int, height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, "count 4"]:
    """Crop boxes (top, left, height, width) in whole pixels, drawn as torchvision's RandomResizedCrop draws them.

    Area uniform between two shares of the image's, the logarithm of the aspect ratio uniform in [3/4, 4/3]; the
    first of ten draws that fits inside the image counts, else the largest central box of an allowed ratio.
    """
    drawn = count * CROP_ATTEMPTS
    area = height * width * uniform(drawn, *scale, generator)
    ratio = uniform(drawn, math.log(RATIO[0]), math.log(RATIO[1]), generator).exp()
    box_w = (area * ratio).sqrt().round().view(count, CROP_ATTEMPTS)
    box_h = (area / ratio).sqrt().round().view(count, CROP_ATTEMPTS)
    fits = (box_w >= 1) & (box_h >= 1) & (box_w <= width) & (box_h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    box_w, box_h = box_w.gather(1, first).flatten(), box_h.gather(1, first).flatten()
    found = fits.any(dim=1)
    box_w = torch.where(found, box_w, torch.full_like(box_w, min(width, round(height * RATIO[1]))))
    box_h = torch.where(found, box_h, torch.full_like(box_h, min(height, round(width / RATIO[0]))))
    place_y, place_x = uniform(count, 0, 1, generator), uniform(count, 0, 1, generator)
    place_y, place_x = place_y.where(found, 0.5), place_x.where(found, 0.5)
    top = (place_y * (height - box_h + 1)).floor().clamp(max=height - box_h)
    left = (place_x * (width - box_w + 1)).floor().clamp(max=width - box_w)
    return torch.stack([top, left, box_h, box_w], dim=1)


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
    images: Images,
    boxes: Float[Tensor, "batch 4"],
    size: int,
    mirrored: Bool[Tensor, " batch"] | None = None,
) -> Squares:
    """Crop each image to its box (top, left, height, width), resize to (size, size), mirror where asked."""
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def random_resized_crop(
    images: Images, size: int, scale: tuple[float, float], flip: float, generator: torch.Generator
) -> Squares:
    """Random crop, resize and mirror of each image."""
    count, _, height, width = images.shape
    boxes = random_boxes(count, height, width, scale, generator)
    mirrored = uniform(count, 0, 1, generator) < flip
    return crop_and_resize(images, boxes, size, mirrored)
