"""RandAugment for a whole batch: each image draws its own operations and signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.vision.views.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    by_strength,
    equalise,
    posterise,
    solarise,
)
from contrastive_mm.vision.views.draws import Images, change_some_

LARGEST_MAGNITUDE = 30
"""Magnitudes are 0 to 30, as in torchvision; the paper's scale is 0 to 10."""

Signed = Float[Tensor, " batch"]
"""Strengths in -1..1: a share of an operation's largest, with a sign where it has two directions."""


def warp(images: Images, maps: Float[Tensor, "batch 2 3"]) -> Images:
    """Each image seen through an affine map; nearest pixel, black outside.

    Args:
        images: (B, C, H, W).
        maps: from places of the result to places of the image: (x, y, 1) in pixels from the centre to (x, y).
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device) + 0.5 - height / 2
    x = torch.arange(width, device=images.device) + 0.5 - width / 2
    places = torch.stack(
        [x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x).expand(height, width)]
    )
    seen = torch.einsum("bij,jhw->bhwi", maps, places)
    scale = torch.tensor([2 / width, 2 / height], device=images.device)
    return F.grid_sample(images, seen * scale, mode="nearest", padding_mode="zeros", align_corners=False)


def shear_x(images: Images, strength: Signed) -> Images:
    """Slant by up to 0.3 from the upper border on."""
    one, zero, by = torch.ones_like(strength), torch.zeros_like(strength), 0.3 * strength
    return warp(images, torch.stack([one, by, by * images.shape[2] / 2, zero, one, zero], dim=1).view(-1, 2, 3))


def shear_y(images: Images, strength: Signed) -> Images:
    """Slant by up to 0.3 from the left border on."""
    one, zero, by = torch.ones_like(strength), torch.zeros_like(strength), 0.3 * strength
    return warp(images, torch.stack([one, zero, zero, by, one, by * images.shape[3] / 2], dim=1).view(-1, 2, 3))


def translate_x(images: Images, strength: Signed) -> Images:
    """Shift by up to 150/331 of the width, in whole pixels."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    by = (150 / 331 * images.shape[3] * strength).trunc()
    return warp(images, torch.stack([one, zero, -by, zero, one, zero], dim=1).view(-1, 2, 3))


def translate_y(images: Images, strength: Signed) -> Images:
    """Shift by up to 150/331 of the height, in whole pixels."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    by = (150 / 331 * images.shape[2] * strength).trunc()
    return warp(images, torch.stack([one, zero, zero, zero, one, -by], dim=1).view(-1, 2, 3))


def rotate(images: Images, strength: Signed) -> Images:
    """Turn by up to 30 degrees about the centre."""
    angle, zero = strength * math.radians(30), torch.zeros_like(strength)
    cos, sin = angle.cos(), angle.sin()
    return warp(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3))


def _colours(change: Callable[[Images, Tensor], Images]) -> Callable[[Images, Tensor], Images]:
    return lambda images, strength: change(images, 1 + 0.9 * strength)


SIGNED: dict[str, Callable[[Images, Tensor], Images]] = {
    "shear-x": shear_x,
    "shear-y": shear_y,
    "translate-x": translate_x,
    "translate-y": translate_y,
    "rotate": rotate,
    "brightness": _colours(adjust_brightness),
    "saturation": _colours(adjust_saturation),
    "contrast": _colours(adjust_contrast),
    "sharpness": _colours(adjust_sharpness),
}
"""Operations with two directions, of images and strengths in -1..1."""

UNSIGNED: dict[str, Callable[[Images, Tensor], Images]] = {
    "identity": lambda images, strength: images,
    "posterise": lambda images, strength: posterise(images, 8 - (strength.abs() * 4).round().long()),
    "solarise": lambda images, strength: solarise(images, 255 * (1 - strength.abs())),
    "autocontrast": lambda images, strength: autocontrast(images),
    "equalise": lambda images, strength: equalise(images),
}
"""Operations with one direction, or none."""

OPERATIONS = {**SIGNED, **UNSIGNED}


def rand_augment_(
    images: Images, operations: Int[Tensor, "batch turns"], signs: Float[Tensor, "batch turns"], magnitude: int
) -> None:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719) in place: some operations in turn, all of one strength.

    The 14 operations and their ranges are torchvision's.

    Args:
        images: (B, 3, H, W) in 0..1.
        operations: (B, N) numbers of ``OPERATIONS``, on the CPU.
        signs: (B, N) their directions, 1 or -1, on the CPU.
        magnitude: M, 0 to 30.
    """
    share = magnitude / LARGEST_MAGNITUDE
    for turn in range(operations.shape[1]):
        for number, change in enumerate(OPERATIONS.values()):
            strengths = share * signs[:, turn]
            change_some_(images, operations[:, turn] == number, partial(by_strength, change, strengths))
