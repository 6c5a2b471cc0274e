"""Barlow Twins: each dimension agrees between views and with no other dimension."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import all_reduce_sum, refuse_together
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.similarity import full_precision, widen
from contrastive_mm.losses.statistics import centred, check_several_rows, off_diagonal, total_rows

EPSILON = 1e-5
"""Added to a dimension's variance, as by BatchNorm in the released code; the paper has none."""


def barlow_twins(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    offdiagonal_weight: float = 5e-3,
) -> Float[Tensor, ""]:
    r"""Redundancy reduction (Zbontar et al. 2021, equations 1 and 2).

    :math:`\sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2`, with C the correlation over the batch between
    the dimensions of the two views. Takes O(N D + D^2) memory.

    Variances are divided by N, not N - 1: BatchNorm without scale and shift does so, and equation 2 says the same.
    The paper's :math:`\lambda` is 0.005, the released code's 0.0051.

    In several processes all moments are those of the whole batch, and so is the value in every process; after
    DistributedDataParallel's average the gradient is exact. The released code sums C over processes where autograd
    does not see it, so that its gradient is smaller by the number of processes (its optimizer, LARS, hides that).

    Args:
        first: (N, D) features of the first view, not normalised.
        second: (N, D) features of the second view; row i belongs with row i of ``first``.
        offdiagonal_weight: :math:`\lambda`.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, fewer than 2 samples, or features that are not finite floating point.
    """
    with refuse_together(first):
        check_pair(first, second, "first", "second")
        check_several_rows(len(first), "first", "barlow_twins")
    with full_precision(first):
        first, second = widen(first), widen(second)
        rows = total_rows(first)
        correlation = all_reduce_sum(_standardised(first, rows).T @ _standardised(second, rows)) / rows
        agreement = (1 - correlation.diagonal()).square().sum()
        return agreement + offdiagonal_weight * off_diagonal(correlation).square().sum()


def _standardised(features: Tensor, rows: Tensor) -> Tensor:
    centre = centred(features, rows)
    variance = all_reduce_sum(centre.square().sum(0)) / rows
    return centre * (variance + EPSILON).rsqrt()
