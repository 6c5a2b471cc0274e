"""The shape of a cloud of features; needs no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.losses import alignment_loss, uniformity_loss


def alignment(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> float:
    """``losses.alignment_loss`` as a number: mean squared distance of positives on the sphere; lower is closer."""
    return float(alignment_loss(first.detach(), second.detach()))


def uniformity(features: Float[Tensor, "batch dim"]) -> float:
    """``losses.uniformity_loss`` as a number.

    0 where all features are one point; towards -4 where they spread evenly over a sphere of many dimensions.
    """
    return float(uniformity_loss(features.detach()))


def effective_rank(features: Float[Tensor, "batch dim"]) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    1 where features lie on a line, D where every dimension is used alike; the mean is taken off first.
    """
    values = torch.linalg.svdvals(features - features.mean(0))
    share = values / values.sum().clamp_min(1e-12)
    return float(torch.special.entr(share).sum().exp())


def feature_std(features: Float[Tensor, "batch dim"]) -> float:
    """Standard deviation of each dimension of the normalised features, mean over dimensions.

    0 where all features are one point, 1/sqrt(D) where they spread evenly (Chen and He 2021, section 4.1).
    """
    return float(F.normalize(features, dim=1).std(dim=0, correction=0).mean())


def mean_similarity(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "others dim"], paired: bool = False
) -> float:
    """Mean cosine between the rows of one set and the rows of another.

    Args:
        first: (N, D) features.
        second: (M, D) features.
        paired: row i belongs with row i: those N pairs are left out (N = M).
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    total, pairs = first.sum(0) @ second.sum(0), len(first) * len(second)
    if paired:
        total, pairs = total - (first * second).sum(), pairs - len(first)
    return float(total / pairs)
