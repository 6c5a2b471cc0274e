"""Mixup and CutMix of a batch with itself, as views whose positives are soft (i-Mix, Lee et al., arXiv 2010.08887).

i-Mix's released code leaves the larger part to the image itself: it takes the larger of the share that is drawn and of
the rest. Here the share is taken as it is drawn, as Mixup and CutMix take it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.vision.views.draws import Images, uniform


def draw_shares(count: int, alpha: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Shares from Beta(alpha, alpha), one an image."""
    # Of two Gamma(alpha) variables the share of the first; torch's own Beta takes no generator.
    shape = torch.full((2, count), alpha, device=generator.device)
    parts = torch._standard_gamma(shape, generator=generator)
    # Where both vanish, as they may for a small alpha, the share is 0 or 1 by the toss of a coin.
    coin = torch.rand(count, generator=generator, device=generator.device).round()
    total = parts.sum(0)
    return torch.where(total > 0, parts[0] / total, coin)


class Mixing(ABC):
    """Who is mixed with whom, and how; drawn once, applied to one view or to several.

    Attributes:
        partner: (B,) the row that is laid into each row.
        share: (B,) what is left of the row itself.
    """

    partner: Int[Tensor, " batch"]
    share: Float[Tensor, " batch"]

    @classmethod
    @abstractmethod
    def draw(cls, shape: Sequence[int], alpha: float, generator: torch.Generator) -> Mixing:
        """Draw for a batch of images.

        Args:
            shape: of the images, (B, C, H, W).
            alpha: of the Beta distribution of shares; 1 is uniform.
            generator: random source on the images' device.
        """

    @abstractmethod
    def apply(self, images: Images) -> Images:
        """The mixed images."""


class Mixup(Mixing):
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): each image with another one of the batch laid over it."""

    def __init__(self, partner: Int[Tensor, " batch"], share: Float[Tensor, " batch"]) -> None:
        self.partner, self.share = partner, share

    @classmethod
    def draw(cls, shape: Sequence[int], alpha: float, generator: torch.Generator) -> Mixup:
        """Draw for a batch of images, each with a share of its own."""
        partner = torch.randperm(shape[0], generator=generator, device=generator.device)
        return cls(partner, draw_shares(shape[0], alpha, generator))

    def apply(self, images: Images) -> Images:
        """Each image weighed with its partner."""
        weight = self.share.to(images.dtype)[:, None, None, None]
        return torch.lerp(images[self.partner], images, weight)


class CutMix(Mixing):
    """CutMix (Yun et al. 2019, arXiv 1905.04899): a rectangle of each image comes from another one of the batch.

    The rectangle has the image's proportions and its centre anywhere, so that part of it may lie outside; the share
    is what is then left of the image itself (the paper's released code does so too).
    """

    def __init__(self, partner: Int[Tensor, " batch"], cut: Bool[Tensor, "batch height width"]) -> None:
        self.partner, self.cut = partner, cut
        self.share = 1 - cut.float().mean(dim=(1, 2))

    @classmethod
    def draw(cls, shape: Sequence[int], alpha: float, generator: torch.Generator) -> CutMix:
        """Draw for a batch of images, each with a rectangle of its own."""
        count = shape[0]
        partner = torch.randperm(count, generator=generator, device=generator.device)
        side = (1 - draw_shares(count, alpha, generator)).clamp_min(0).sqrt()
        inside = []
        for length in shape[2:]:
            centre = (uniform(count, 0, 1, generator) * length).floor()
            half = (side * length).trunc().div(2).floor()
            place = torch.arange(length, device=generator.device)
            inside.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
        return cls(partner, inside[0][:, :, None] & inside[1][:, None, :])

    def apply(self, images: Images) -> Images:
        """Each image with its partner's rectangle."""
        return torch.where(self.cut[:, None], images[self.partner], images)


MIXINGS: dict[str, type[Mixing]] = {"mixup": Mixup, "cutmix": CutMix}
