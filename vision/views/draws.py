"""Random numbers for a batch of images, drawn before anything is done to the images.

They come from the CPU whatever the images' device is: views are the same there and on a GPU, and which rows a change
concerns is known without waiting for a device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.vision.views.presets import Jitter, Recipe

Images = Float[Tensor, "batch channels height width"]
Squares = Float[Tensor, "batch channels size size"]

RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
SIGMA = (0.1, 2.0)
"""Pixels: standard deviations of the Gaussian blur (SimCLR, appendix A)."""


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Numbers between two bounds, on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


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


def draw_jitter(
    count: int, strengths: Jitter, generator: torch.Generator
) -> tuple[Float[Tensor, "count 4"], Int[Tensor, "count 4"]]:
    """Factors of brightness, contrast, saturation and the hue's shift, and the order in which each image gets them.

    Args:
        count: images.
        strengths: b, c, s, h as torchvision's ColorJitter takes them: factors in [1 - b, 1 + b] (not below 0) and so
            on, the hue's shift in [-h, h] of the circle.
        generator: random source.
    """
    factors = [uniform(count, max(0.0, 1 - s), 1 + s, generator) for s in strengths[:3]]
    factors.append(uniform(count, -strengths[3], strengths[3], generator))
    order = torch.rand(count, 4, generator=generator, device=generator.device).argsort(dim=1)
    return torch.stack(factors, dim=1), order


@dataclass(frozen=True)
class Plan:
    """What is to be done to each image of a batch to make one view of it; B rows each.

    Attributes:
        boxes: (B, 4) top, left, height, width of the crop in pixels.
        mirrored: (B,).
        operations: (B, N) numbers of RandAugment's operations, in the order of their turns.
        signs: (B, N) direction of each, 1 or -1.
        jittered: (B,).
        factors: (B, 4) of the colour jitter.
        order: (B, 4) in which they are applied.
        grey: (B,).
        blurred: (B,).
        sigma: (B,) pixels.
        solarised: (B,).
    """

    boxes: Float[Tensor, "batch 4"]
    mirrored: Bool[Tensor, " batch"]
    operations: Int[Tensor, "batch turns"]
    signs: Float[Tensor, "batch turns"]
    jittered: Bool[Tensor, " batch"]
    factors: Float[Tensor, "batch 4"]
    order: Int[Tensor, "batch 4"]
    grey: Bool[Tensor, " batch"]
    blurred: Bool[Tensor, " batch"]
    sigma: Float[Tensor, " batch"]
    solarised: Bool[Tensor, " batch"]

    def part(self, rows: slice) -> Plan:
        """The plan of some of the images."""
        return Plan(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def draw_plan(recipe: Recipe, count: int, height: int, width: int, kinds: int, generator: torch.Generator) -> Plan:
    """Draw one view of each image.

    Args:
        recipe: of the view.
        count: images.
        height: of the images, in pixels.
        width: of the images.
        kinds: how many operations RandAugment chooses from.
        generator: random source on the CPU.
    """

    def chosen(probability: float) -> Tensor:
        return uniform(count, 0, 1, generator) < probability

    turns = (count, recipe.rand_augment[0])
    boxes = random_boxes(count, height, width, recipe.crop_scale, generator)
    mirrored = chosen(recipe.flip)
    operations = torch.randint(kinds, turns, generator=generator)
    signs = torch.randint(2, turns, generator=generator) * 2.0 - 1
    jittered = chosen(recipe.jitter)
    factors, order = draw_jitter(count, recipe.jitter_strengths, generator)
    return Plan(
        boxes,
        mirrored,
        operations,
        signs,
        jittered,
        factors,
        order,
        grey=chosen(recipe.greyscale),
        blurred=chosen(recipe.blur),
        sigma=uniform(count, *SIGMA, generator),
        solarised=chosen(recipe.solarise),
    )


def change_some_(images: Images, chosen: Bool[Tensor, " batch"], change: Callable[[Images, Tensor], Images]) -> None:
    """Change the chosen images in place; the work is done for these only.

    Args:
        images: (B, C, H, W).
        chosen: which, on the CPU.
        change: of the chosen images and their row numbers (on the CPU).
    """
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return
    if len(rows) == len(images):
        images.copy_(change(images, rows))
        return
    places = rows.to(images.device)
    images.index_copy_(0, places, change(images.index_select(0, places), rows))
