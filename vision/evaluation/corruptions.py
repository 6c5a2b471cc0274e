"""Corruptions of images at five severities, to see how much of a representation survives them.

Six kinds of Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", arXiv 1903.12261, with the constants of their scripts: those of CIFAR-10-C for images of a side of at
most 96 pixels, those of ImageNet-C for larger ones. (Tiny ImageNet-C, of 64 pixels, has constants of its own, mostly
between the two, which are not used.)

| kind | constant | small images, severity 1 to 5 | large images, severity 1 to 5 |
| --- | --- | --- | --- |
| gaussian_noise | standard deviation, of 0..1 | 0.04 0.06 0.08 0.09 0.10 | 0.08 0.12 0.18 0.26 0.38 |
| gaussian_blur | sigma in pixels | 0.4 0.6 0.7 0.8 1 | 1 2 3 4 6 |
| brightness | added to HSV's value, of 0..1 | 0.05 0.1 0.15 0.2 0.3 | 0.1 0.2 0.3 0.4 0.5 |
| contrast | factor of the distance from the channel's mean | 0.75 0.5 0.4 0.3 0.15 | 0.4 0.3 0.2 0.1 0.05 |
| pixelate | side after shrinking, of the side | 0.95 0.9 0.85 0.75 0.65 | 0.6 0.5 0.4 0.3 0.25 |
| jpeg | quality | 80 65 58 50 40 | 25 18 15 10 7 |

Results are rounded to whole grey levels, where the original scripts cut the fraction off. `gaussian_blur` is one of
their four additional kinds; ImageNet-C was saved as JPEG once more, which is left out here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from contrastive_mm.errors import UserError, unknown_name

Bytes = UInt8[Tensor, "batch 3 height width"]
Levels = Float[Tensor, "batch 3 height width"]

SEVERITIES = 5
LARGEST_SMALL = 96

SMALL: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
}
LARGE: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg": (25, 18, 15, 10, 7),
}
KINDS = tuple(SMALL)


def corrupt(
    images: Bytes, kind: str, severity: int, indices: Int[Tensor, " batch"] | None = None, seed: int = 0
) -> Bytes:
    """Corrupt a batch of images.

    Args:
        images: (B, 3, H, W) in 0..255.
        kind: one of ``KINDS``.
        severity: 1 to 5; 0 gives the images back as they are.
        indices: a number for each image, by default its place in the batch. An image's noise depends on its
            number and the seed alone: not on its batch, and at each severity it is the same noise, scaled.
        seed: of the noise.

    Returns:
        (B, 3, H, W) on the same device.

    Raises:
        UserError: another kind, or a severity out of range.
    """
    if kind not in KINDS:
        raise unknown_name("corruption", kind, KINDS)
    if not 0 <= severity <= SEVERITIES:
        raise UserError(f"Severity {severity} of {kind}; it must be a whole number from 0 to {SEVERITIES}.")
    if severity == 0 or len(images) == 0:
        return images
    constants = SMALL if max(images.shape[2:]) <= LARGEST_SMALL else LARGE
    constant = constants[kind][severity - 1]
    if kind == "jpeg":
        return jpeg(images, int(constant))
    if kind == "gaussian_noise":
        rows = torch.arange(len(images)) if indices is None else indices
        return _to_bytes(images + 255 * constant * _noise(images, rows, seed))
    return _to_bytes(_CHANGES[kind](images.float(), constant))


def _to_bytes(levels: Levels) -> Bytes:
    return levels.round().clamp(0, 255).to(torch.uint8)


def _noise(images: Bytes, indices: Int[Tensor, " batch"], seed: int) -> Levels:
    """Normal noise for each image from a generator of its own."""
    drawn = []
    for index in indices.tolist():
        # NumPy's SeedSequence mixes both numbers: neighbouring seeds and images share nothing.
        mixed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        drawn.append(torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(mixed)))
    return torch.stack(drawn).to(images.device)


def blur(images: Levels, sigma: float) -> Levels:
    """Gaussian blur, the kernel cut at 4 sigma, the border's pixels repeated outside."""
    return _separable(images, lambda size: _blur_matrix(size, sigma))


def brighten(images: Levels, added: float) -> Levels:
    """Add to HSV's value, hue and saturation kept: all three channels grow in proportion; black becomes grey."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + 255 * added).clamp(max=255)
    return torch.where(value > 0, images * raised / value.clamp_min(1), raised)


def reduce_contrast(images: Levels, factor: float) -> Levels:
    """Draw each channel towards its own mean over the image."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (images - mean)


def pixelate(images: Levels, share: float) -> Levels:
    """Shrink to a share of the side and enlarge again, both with PIL's box filter and its roundings."""

    def side(size: int) -> int:
        return max(1, int(size * share))

    height, width = images.shape[2:]
    small = _resize(images, side(height), side(width))
    return _resize(small, height, width)


def _resize(images: Levels, height: int, width: int) -> Float[Tensor, "batch 3 new_height new_width"]:
    """PIL resizes along the rows first and rounds in between, halves upwards."""
    rows = (images @ _box_matrix(images.shape[3], width).to(images.device).T + 0.5).floor()
    return (_box_matrix(images.shape[2], height).to(images.device) @ rows + 0.5).floor()


def _separable(images: Levels, matrix: Callable[[int], Tensor]) -> Levels:
    rows, columns = (matrix(size).to(images.device) for size in images.shape[2:])
    return rows @ images @ columns.T


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma: float) -> Float[Tensor, "size size"]:
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = (-0.5 * (offsets / sigma).double().square()).exp()
    kernel = (kernel / kernel.sum()).float()
    source = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, source, kernel.expand(size, -1))


@lru_cache(maxsize=64)
def _box_matrix(source: int, target: int) -> Float[Tensor, "target source"]:
    """Weights of PIL's box filter: a pixel counts where its centre lies less than half a step from the target's."""
    scale = source / target
    support = 0.5 * max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    place = (torch.arange(source, dtype=torch.float64)[None] + 0.5 - centre) / max(scale, 1.0)
    first, last = (centre - support + 0.5).floor(), (centre + support + 0.5).floor()
    pixel = torch.arange(source)[None]
    weight = ((place > -0.5) & (place <= 0.5) & (pixel >= first) & (pixel < last)).double()
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def jpeg(images: Bytes, quality: int) -> Bytes:
    """Compress each image as JPEG with PIL, and decode it again."""

    def compress(pixels: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            return np.array(image)

    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with ThreadPoolExecutor() as threads:
        done = np.stack(list(threads.map(compress, pixels)))
    return torch.from_numpy(done).permute(0, 3, 1, 2).contiguous().to(images.device)


_CHANGES: dict[str, Callable[[Levels, float], Levels]] = {
    "gaussian_blur": blur,
    "brightness": brighten,
    "contrast": reduce_contrast,
    "pixelate": pixelate,
}
