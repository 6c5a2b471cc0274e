"""What can be said of features where there are no labels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.geometry import effective_rank, uniformity


def unlabelled_scores(features: Float[Tensor, "samples dim"]) -> dict[str, float]:
    """``uniformity`` and ``effective_rank``, which need no labels.

    Raises:
        UserError: fewer than two samples, which have no spread.
    """
    if len(features) < 2:
        raise UserError(f"Features of {len(features)} samples have no spread to score; give data with at least 2.")
    return {"uniformity": uniformity(features), "effective_rank": effective_rank(features)}
