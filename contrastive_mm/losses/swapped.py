"""SwAV: the cluster that one view is assigned to is predicted from the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import all_reduce_sum, process_count, refuse_together
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_columns, check_features, check_pair
from contrastive_mm.losses.similarity import Temperature, check_temperature, full_precision, scale_of, widen
from contrastive_mm.losses.statistics import check_several_rows, total_rows


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "batch prototypes"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "batch prototypes"]:
    r"""Soft assignments of samples to prototypes that use every prototype equally (SwAV, equations 3 and 4).

    :math:`\mathrm{Diag}(u) \exp(S / \epsilon) \mathrm{Diag}(v)`, where each iteration first gives all prototypes the
    same weight over the batch and then each sample a weight of 1, as the released code does (the paper's
    assignments, and the code's until its last line, sum to 1 over the whole batch). Computed with logarithms, so that
    any epsilon above 0 is safe where the released code's ``exp`` overflows; O(B K) memory.

    In several processes the weight of a prototype is summed over all of them, and the assignments are those of one
    process on the whole batch. Every process must call it, with any number of rows.

    Args:
        scores: (B, K) dot products of features with prototypes.
        epsilon: smoothness: large values give equal assignments, small ones hard assignments.
        iterations: of the Sinkhorn-Knopp algorithm.

    Returns:
        (B, K) in float32 (float64 for float64 scores), without gradient; each row sums to 1.

    Raises:
        UserError: scores that are not finite floating point, epsilon not above 0, or fewer than 1 iteration.
    """
    check_features(scores, "scores")
    if not epsilon > 0:
        raise UserError(f"epsilon = {epsilon}; it divides the scores and must be above 0.")
    if iterations < 1:
        raise UserError(f"iterations = {iterations}; Sinkhorn-Knopp needs at least 1.")
    with full_precision(scores):
        logarithms = widen(scores) / epsilon
        for _ in range(iterations):
            logarithms -= _log_sum_over_batch(logarithms)
            logarithms -= logarithms.logsumexp(1, keepdim=True)
        return logarithms.exp_()


def _log_sum_over_batch(logarithms: Tensor) -> Tensor:
    """Log-sum-exp of each column over the rows of all processes."""
    if process_count() == 1:
        return logarithms.logsumexp(0)
    largest = logarithms.amax(0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (logarithms - largest).exp_().sum(0)
    dist.all_reduce(total)
    return total.log_() + largest


def swapped_prediction(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    num_global: int = 2,
    temperature: Temperature = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_scores: Sequence[Float[Tensor, "queued prototypes"]] | None = None,
) -> Float[Tensor, ""]:
    r"""Swapped prediction (Caron et al. 2020, equations 2 to 5, and multi-crop).

    The codes q of each full view come from ``sinkhorn``, without gradient. Every other view predicts them:
    :math:`-\sum_k q_k \log \mathrm{softmax}(s / T)_k`.

    The paper adds up all pairs of a full view and another view; the released code takes their mean, which does not
    grow with the number of crops. The mean is used here. It is also the mean over samples, of all processes; after
    DistributedDataParallel's average the gradient is exact.

    Args:
        scores: for each view the (B, K) dot products of normalised features with normalised prototypes, the full
            views first.
        num_global: how many views are full ones, from which codes are taken.
        temperature: T, divides the scores in the prediction.
        epsilon: as in ``sinkhorn``.
        iterations: as in ``sinkhorn``.
        queue_scores: for each full view the (Q, K) scores of earlier features. They take part in the equal use of
            prototypes, which a batch smaller than K can't meet by itself, and are predicted by nobody. In several
            processes each brings its own share.

    Returns:
        The loss, a scalar in float32 (float64 for float64 scores).

    Raises:
        UserError: fewer than 2 views, ``num_global`` out of range, shapes that don't fit, a lone sample without a
            queue, values that are not finite floating point, or temperature or epsilon not above 0.
    """
    with refuse_together(scores[0] if scores else torch.empty(0)):
        _check(scores, num_global, queue_scores)
        check_temperature(temperature)
    with full_precision(scores[0]):
        rows = total_rows(widen(scores[0]))
        codes = [
            _codes(scores[view], None if queue_scores is None else queue_scores[view], epsilon, iterations)
            for view in range(num_global)
        ]
        total = codes[0].new_zeros(())
        for view, view_scores in enumerate(scores):
            wanted = [code for number, code in enumerate(codes) if number != view]
            if wanted:
                wide = widen(view_scores)
                prediction = (wide * scale_of(temperature, wide)).log_softmax(1)
                total = total - (torch.stack(wanted).sum(0) * prediction).sum()
        pairs = num_global * (len(scores) - 1)
        return all_reduce_sum(total) / (pairs * rows)


def _codes(scores: Tensor, queued: Tensor | None, epsilon: float, iterations: int) -> Tensor:
    scores = widen(scores.detach())
    if queued is None:
        return sinkhorn(scores, epsilon, iterations)
    both = torch.cat([scores, queued.detach().to(scores)])
    return sinkhorn(both, epsilon, iterations)[: len(scores)]


def _check(scores: Sequence[Tensor], num_global: int, queue_scores: Sequence[Tensor] | None) -> None:
    if len(scores) < 2:
        raise UserError(f"swapped_prediction compares views: `scores` holds {len(scores)}, give at least 2.")
    if not 1 <= num_global <= len(scores):
        raise UserError(f"num_global = {num_global}, but `scores` holds {len(scores)} views.")
    for view, other in enumerate(scores[1:], 1):
        check_pair(scores[0], other, "scores[0]", f"scores[{view}]")
    if queue_scores is None:
        check_several_rows(len(scores[0]), "scores[0]", "swapped_prediction without a queue")
        return
    if len(queue_scores) != num_global:
        raise UserError(f"`queue_scores` holds {len(queue_scores)} matrices; give one for each of {num_global} views.")
    for view, queued in enumerate(queue_scores):
        check_columns(queued, f"queue_scores[{view}]", scores[0], "scores[0]")
