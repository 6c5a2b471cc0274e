"""Gaussian blur as two batched matrix products, each image with a width of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.vision.views.draws import Images

BLOCK = 32
"""Pixels that one product blurs at a time: a matrix for a whole large image would hold zeros for the most part."""


def blur_matrix(sigma: Float[Tensor, " batch"], size: int, radius: int) -> Float[Tensor, "batch size padded"]:
    """Weights that blur ``size`` pixels of a line from them and the ``radius`` ones on either side.

    Args:
        sigma: (B,) standard deviations in pixels.
        size: pixels blurred.
        radius: of the kernel, which sums to 1.

    Returns:
        (B, size, size + 2 radius).
    """
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    place = torch.arange(size, device=sigma.device)[:, None] + offsets + radius
    weights = sigma.new_zeros(len(sigma), size, size + 2 * radius)
    return weights.scatter_(2, place.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


def blur(images: Images, sigma: Float[Tensor, " batch"], radius: int | None = None) -> Images:
    """Gaussian blur, mirrored at the borders.

    Args:
        images: (B, C, H, W).
        sigma: (B,) standard deviations in pixels.
        radius: of the kernel; by default the kernel is a tenth of the image (SimCLR, appendix A).
    """
    height, width = images.shape[2:]
    radius = max(1, min(height, width) // 20) if radius is None else radius
    sigma = sigma.to(images)
    rows = _blur_rows(images, sigma, radius)
    return _blur_rows(rows.transpose(2, 3), sigma, radius).transpose(2, 3).contiguous()


def _blur_rows(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur along the height."""
    count, channels, height, width = images.shape
    block = min(BLOCK, height)
    whole = -(-height // block) * block
    padded = F.pad(F.pad(images, (0, 0, radius, radius), mode="reflect"), (0, 0, 0, whole - height))
    # (B, C, blocks, width, block + 2 radius): a view, in which neighbouring blocks overlap.
    windows = padded.unfold(2, block + 2 * radius, block)
    weights = blur_matrix(sigma, block, radius)[:, None, None]
    blurred = weights @ windows.transpose(3, 4)
    return blurred.reshape(count, channels, whole, width)[:, :, :height]
