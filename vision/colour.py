"""Changes of colour, each image with a strength of its own; values as torchvision and PIL compute them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from contrastive_mm.vision.draws import Images, uniform

LUMA = (0.2989, 0.587, 0.114)


def to_float(images: UInt8[Tensor, "batch channels height width"] | Images) -> Images:
    """Bring uint8 images in 0..255 to floats in 0..1; floats stay."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Luminance (ITU-R 601), as PIL and torchvision compute it."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def blend(images: Images, other: Tensor, factor: Float[Tensor, " batch"]) -> Images:
    """Mix images by a factor each; a factor above 1 goes beyond the first."""
    share = factor[:, None, None, None]
    return (share * images + (1 - share) * other).clamp(0, 1)


def adjust_brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Scale each image's values by its factor."""
    return (images * factor[:, None, None, None]).clamp(0, 1)


def adjust_contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with the mean of its luminance."""
    return blend(images, to_grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with its grey form."""
    return blend(images, to_grey(images), factor)


def adjust_hue(images: Images, shift: Float[Tensor, " batch"]) -> Images:
    """Turn each image's hue by a share of the colour circle, exactly, in HSV.

    The value and the chroma of a pixel stay and only its place on the circle moves, so each channel comes
    straight from the shifted hue: ``v - c * clamp(min(k, 4 - k), 0, 1)`` with ``k = (n + 6 h) mod 6``, n = 5, 3, 1.
    """
    value, lead = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    red, green, blue = images.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        lead == 0,
        (green - blue) / safe,
        torch.where(lead == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sector + 6 * shift[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    place = (offsets + hue[:, None]) % 6
    fall = torch.minimum(place, 4 - place).clamp(0, 1)
    return value[:, None] - chroma[:, None] * fall


def colour_jitter(images: Images, strengths: tuple[float, float, float, float], generator: torch.Generator) -> Images:
    """Brightness, contrast, saturation and hue, each image with its own factors in its own order.

    Args:
        images: (B, 3, H, W) in 0..1.
        strengths: b, c, s, h as torchvision's ColorJitter takes them: factors in [1 - b, 1 + b] (not below 0) and so
            on, the hue's shift in [-h, h] of the circle.
        generator: random source on the images' device.
    """
    count = len(images)
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    factors = [uniform(count, max(0.0, 1 - s), 1 + s, generator) for s in strengths[:3]]
    factors.append(uniform(count, -strengths[3], strengths[3], generator))
    order: Int[Tensor, "batch 4"] = torch.rand(count, len(changes), generator=generator, device=images.device).argsort(
        dim=1
    )
    for turn in range(len(changes)):
        for number, (change, factor) in enumerate(zip(changes, factors, strict=True)):
            rows = (order[:, turn] == number).nonzero().flatten()
            if len(rows):
                images = images.index_copy(0, rows, change(images[rows], factor[rows]))
    return images


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
