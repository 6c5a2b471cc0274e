"""VICReg: views agree, every dimension varies, no two dimensions vary together."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import all_reduce_sum, refuse_together
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.similarity import full_precision, widen
from contrastive_mm.losses.statistics import centred, check_several_rows, off_diagonal, total_rows

EPSILON = 1e-4
"""Added to a variance under the root, in the paper and in the released code."""


def vicreg(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Variance, invariance and covariance regularisation (Bardes et al. 2022, equations 1 to 6).

    With Z and Z' the two views:

    - invariance: the mean squared difference of Z and Z' (equation 5);
    - variance: :math:`\max(0, 1 - \sqrt{\mathrm{Var} + \epsilon})`, mean over dimensions (equations 1 and 2);
    - covariance: squares of the covariances between different dimensions, summed and divided by D (equations 3, 4).

    Paper and released code weigh the parts differently. The code divides the invariance by D as well as by N, and
    averages the variance of the two views where equation 6 adds them; both add their covariances. The published
    weights 25, 25, 1 were used with the code, so its scale is used here. Variances are divided by N - 1 in both.
    Takes O(N D + D^2) memory.

    In several processes all moments are those of the whole batch, and so is the value in every process; after
    DistributedDataParallel's average the gradient is exact.

    Args:
        first: (N, D) features of the first view, not normalised.
        second: (N, D) features of the second view; row i belongs with row i of ``first``.
        invariance: weight of the first part.
        variance: weight of the second part.
        covariance: weight of the third part.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, fewer than 2 samples, or features that are not finite floating point.
    """
    with refuse_together(first):
        check_pair(first, second, "first", "second")
        check_several_rows(len(first), "first", "vicreg")
    with full_precision(first):
        first, second = widen(first), widen(second)
        rows = total_rows(first)
        dim = first.shape[1]
        difference = all_reduce_sum((first - second).square().sum()) / (rows * dim)
        loss = invariance * difference
        for features in (first, second):
            centre = centred(features, rows)
            together = all_reduce_sum(centre.T @ centre) / (rows - 1)
            deviation = (together.diagonal() + EPSILON).sqrt()
            loss = loss + variance * F.relu(1 - deviation).mean() / 2
            loss = loss + covariance * off_diagonal(together).square().sum() / dim
        return loss
