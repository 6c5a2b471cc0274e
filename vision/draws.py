"""Random numbers for a batch of images, and changes to some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
Squares = Float[Tensor, "batch channels size size"]


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Numbers between two bounds, on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def on_some(
    images: Images, probability: float, generator: torch.Generator, change: Callable[[Images], Images]
) -> Images:
    """Apply a change to each image with a probability; the work is done for the chosen ones only."""
    if probability == 0:
        return images
    chosen = torch.rand(len(images), generator=generator, device=images.device) < probability
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return images
    return images.index_copy(0, rows, change(images[rows]))
