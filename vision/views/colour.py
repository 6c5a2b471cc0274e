"""Changes of colour, each image with a strength of its own; values as torchvision and PIL compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from contrastive_mm.vision.views.draws import Images, change_some_

LUMA = (0.2989, 0.587, 0.114)


def to_float(images: UInt8[Tensor, "batch channels height width"] | Images) -> Images:
    """Bring uint8 images in 0..255 to floats in 0..1; floats stay."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Luminance (ITU-R 601), as PIL and torchvision compute it."""
    grey = images[:, :1] * LUMA[0]
    return grey.add_(images[:, 1:2], alpha=LUMA[1]).add_(images[:, 2:3], alpha=LUMA[2])


def blend(images: Images, other: Tensor, factor: Float[Tensor, " batch"]) -> Images:
    """Mix images by a factor each; a factor above 1 goes beyond the first."""
    return torch.lerp(other, images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Scale each image's values by its factor."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with the mean of its luminance."""
    return blend(images, to_grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with its grey form."""
    return blend(images, to_grey(images), factor)


def adjust_hue(images: Images, shift: Float[Tensor, " batch"]) -> Images:
    """Turn each image's hue by a share of the colour circle, exactly, in HSV.

    The value v and the chroma c of a pixel stay and only its place h on the circle of six sectors moves, so each
    channel comes straight from it: ``v - c * clamp(2 - |h + n - 2|, 0, 1)``, taken round the circle, n = 5, 3, 1.
    """
    red, green, blue = images.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # A pixel without colour has differences of 0, whatever they are divided by.
    per_chroma = chroma.clamp_min(1e-8).reciprocal_()
    hue = torch.where(
        red == value,
        (green - blue) * per_chroma,
        torch.where(green == value, (blue - red).mul_(per_chroma).add_(2), (red - green).mul_(per_chroma).add_(4)),
    )
    hue += 6 * shift[:, None, None]
    turned = torch.empty_like(images)
    for channel, offset in enumerate((3.0, 1.0, -1.0)):
        place = hue + offset
        place -= (place / 6).round_().mul_(6)
        fall = place.abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, fall, chroma, value=-1, out=turned[:, channel])
    return turned


CHANGES: tuple[Callable[[Images, Tensor], Images], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)
"""What the colour jitter does, in the order of its strengths."""


def jitter_(
    images: Images,
    jittered: Bool[Tensor, " batch"],
    factors: Float[Tensor, "batch 4"],
    order: Int[Tensor, "batch 4"],
) -> None:
    """Colour jitter in place, each image with its own factors in its own order (``draws.draw_jitter``).

    Args:
        images: (B, 3, H, W) in 0..1.
        jittered: (B,) which images; this and what follows is on the CPU.
        factors: (B, 4).
        order: (B, 4).
    """
    for turn in range(len(CHANGES)):
        for number, change in enumerate(CHANGES):
            strengths = factors[:, number]
            change_some_(images, jittered & (order[:, turn] == number), partial(by_strength, change, strengths))


def by_strength(change: Callable[[Images, Tensor], Images], strengths: Tensor, some: Images, rows: Tensor) -> Images:
    """A change of some images, each with the strength of its row: for ``draws.change_some_``."""
    return change(some, strengths[rows].to(some))


def levels(images: Images) -> UInt8[Tensor, "batch channels height width"]:
    """The nearest of 256 grey levels, for changes that are defined by them."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def solarise(images: Images, threshold: Float[Tensor, " batch"] | float = 128.0) -> Images:
    """Invert all grey levels from a threshold (in 0..256) on: PIL's solarise, 128 in BYOL and MoCo v3."""
    if isinstance(threshold, Tensor):
        threshold = threshold[:, None, None, None]
    # Half a level below, so that floats made of whole levels fall on the right side.
    return torch.where(images * 255 > threshold - 0.5, 1 - images, images)


def posterise(images: Images, bits: Int[Tensor, " batch"]) -> Images:
    """Keep the highest bits of each grey level, 0 to 8 of them."""
    step = 2 ** (8 - bits)[:, None, None, None]
    return to_float((levels(images) // step * step).to(torch.uint8))


def autocontrast(images: Images) -> Images:
    """Stretch each channel of each image to 0..1; a channel of one value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def equalise(images: Images) -> Images:
    """Map each channel's grey levels so that all come up about equally often, as PIL does."""
    batch, channels, height, width = images.shape
    level = levels(images).view(batch * channels, -1).long()
    counts = level.new_zeros(batch * channels, 256).scatter_add_(1, level, torch.ones_like(level))
    numbers = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, numbers, 0).amax(dim=1, keepdim=True)
    step = (height * width - counts.gather(1, last)) // 255
    # Each level goes where the pixels below it end.
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step > 0, table, numbers)
    return table.gather(1, level).view(images.shape).to(images.dtype) / 255


def adjust_sharpness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with a smoothed form of itself; its border stays."""
    if min(images.shape[2:]) < 3:
        return images
    kernel = images.new_tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    channels = images.shape[1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel.expand(channels, 1, 3, 3), groups=channels)
    return blend(images, smooth, factor)
