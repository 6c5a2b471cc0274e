"""Alignment and uniformity: what a contrastive loss asks of the shape of a cloud of features, as losses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_features, check_pair
from contrastive_mm.losses.logsumexp import self_logsumexp
from contrastive_mm.losses.similarity import full_precision, unit_rows, widen


def alignment_loss(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"], power: float = 2.0
) -> Float[Tensor, ""]:
    """Mean distance of positives on the unit sphere (Wang and Isola 2020, arXiv 2005.10242, section 4.1).

    Args:
        first: (N, D) features.
        second: (N, D) features of the other view.
        power: alpha, to which the distance is raised.

    Returns:
        A scalar, 0 where all positives coincide.

    Raises:
        UserError: shapes differ, or features are not finite floats.
    """
    check_pair(first, second, "first", "second")
    with full_precision(first):
        squares = (unit_rows(widen(first)) - unit_rows(widen(second))).square().sum(1)
        # A root has no finite slope at 0, where a pair coincides and there is nothing to align.
        apart = squares > 0
        return torch.where(apart, torch.where(apart, squares, 1.0).pow(power / 2), 0.0).mean()


def uniformity_loss(features: Float[Tensor, "batch dim"], concentration: float = 2.0) -> Float[Tensor, ""]:
    """Log of the mean Gaussian potential of all pairs (Wang and Isola 2020, section 4.2), in O(N D) memory.

    On the unit sphere exp(-t |x - y|^2) is exp(2 t x.y - 2 t), a log-sum-exp of dot products.

    Args:
        features: (N, D) features.
        concentration: t, above 0.

    Returns:
        A scalar, 0 where all features are one point, towards -2 t where they spread over many dimensions.

    Raises:
        UserError: fewer than 2 rows, features that are not finite floats, or a concentration not above 0.
    """
    check_features(features, "features")
    if features.shape[0] < 2:
        raise UserError("uniformity_loss compares pairs: `features` needs at least 2 rows.")
    if not concentration > 0:
        raise UserError(f"concentration = {concentration}; it must be above 0.")
    with full_precision(features):
        unit = unit_rows(widen(features)) * math.sqrt(2 * concentration)
        pairs = self_logsumexp(unit).logsumexp(0)
        return pairs - 2 * concentration - math.log(len(features) * (len(features) - 1))
