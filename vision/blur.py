"""Gaussian blur as two batched matrix products, each image with a width of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.vision.draws import Images, uniform


def blur_matrix(sigma: Float[Tensor, " batch"], size: int, radius: int) -> Float[Tensor, "batch size size"]:
    """Weights of a Gaussian blur along one axis of ``size`` pixels, mirrored at the borders."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    place = torch.arange(size, device=sigma.device)[:, None] + offsets
    mirrored = (size - 1) - ((size - 1) - place.abs()).abs()
    spread = torch.zeros(len(offsets), size, size, device=sigma.device)
    spread.scatter_(2, mirrored.T[:, :, None], 1.0)
    return torch.einsum("bk,kij->bij", kernel, spread)


def random_blur(images: Images, generator: torch.Generator) -> Images:
    """Gaussian blur, sigma uniform in [0.1, 2] pixels, a kernel of a tenth of the image (SimCLR, appendix A)."""
    sigma = uniform(len(images), 0.1, 2.0, generator)
    height, width = images.shape[2:]
    radius = max(1, min(height, width) // 20)
    rows = blur_matrix(sigma, height, radius)[:, None]
    columns = blur_matrix(sigma, width, radius)[:, None]
    return rows @ images @ columns.transpose(2, 3)
