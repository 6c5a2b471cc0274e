"""Supervised contrastive loss: every other view of the same class is a positive."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.distributed import Gathered, gather_rows, gather_with_gradient, process_count, refuse_together
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_features, check_ids, check_pair
from contrastive_mm.losses.logsumexp import cross_logsumexp, self_logsumexp
from contrastive_mm.losses.nt_xent import SymmetricSimilarity
from contrastive_mm.losses.similarity import (
    Temperature,
    check_symmetric,
    check_temperature,
    full_precision,
    prepare_key,
    scale_of,
)
from contrastive_mm.positives import Positives


def supcon(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"] | None,
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch batch"] | Bool[Tensor, "batch batch"] | Positives,
    temperature: Temperature = 0.1,
    similarity: SymmetricSimilarity = "cosine",
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2, L_out).

    The mean over all views i of :math:`-1/|P(i)| \sum_{p \in P(i)} \log \exp(s_{ip}) / \sum_{a \ne i} \exp(s_{ia})`,
    where P(i) are the other views of i's sample and all views of samples that belong with it. Views without any
    positive are left out of the mean. Exact, in O(N D) memory: positives are summed as features.

    The paper's equation has no factor; its released code multiplies the loss by ``temperature / base_temperature``
    (0.07 / 0.07 = 1 by default), which is left out here.

    Args:
        first: (N, D) features of the first view.
        second: (N, D) features of the second view; None where there is one view a sample.
        labels: (N,) classes; or an (N, N) matrix, boolean or of weights of at least 0, of which samples belong
            together (its diagonal weighs the other view of the same sample); or ``Positives``.
        temperature: T, above 0; a tensor receives its gradient.
        similarity: ``"cosine"`` or ``"dot"``.
        gather: in several processes, compare with the views of all. Each process gives labels or positives of its
            own samples; a matrix says nothing of other processes' samples, which do not belong then.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes don't fit, features are not finite floats, the temperature is not above 0, or no view has
            a positive.
    """
    with refuse_together(first, gather):
        if second is None:
            check_features(first, "first")
        else:
            check_pair(first, second, "first", "second")
        check_temperature(temperature)
        check_symmetric(similarity)
        if first.shape[0] < 2 and not (gather and process_count() > 1):
            raise UserError("supcon needs at least 2 samples: `first` has 1, which leaves it without negatives.")
        positives = _as_positives(labels, first.shape[0])
    with full_precision(first):
        scale = scale_of(temperature, prepare_key(first[:1], "dot"))
        root = scale.sqrt() if isinstance(scale, Tensor) else scale**0.5
        views = [prepare_key(view, similarity) * root for view in (first, second) if view is not None]
        gathered = _gather(views) if gather and process_count() > 1 else None
        sums, totals = _sums_of_positives(views, positives, gathered)
        similarity_sum = (torch.cat(views) * sums).sum(1)
        known = totals > 0
        counted = known.sum().to(similarity_sum.dtype)
        if gathered is not None:
            # Views with a positive may be spread unevenly: the mean number a process keeps every view's weight alike.
            counted = gather_rows(counted[None]).sum() / process_count()
        if first.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(counted > 0):
            raise UserError(
                "No view has a positive: each of `labels` occurs once and there is one view a sample. Draw batches "
                "with several samples a class, or give a second view."
            )
        losses = torch.where(
            known, _candidates(views, gathered) - similarity_sum / torch.where(known, totals, 1.0), 0.0
        )
        return losses.sum() / counted.clamp_min(1e-12)


def _as_positives(labels: Tensor | Positives, rows: int) -> Positives:
    if isinstance(labels, Positives):
        positives = labels
    elif labels.ndim == 1:
        check_ids(labels, "labels", rows, "first")
        positives = Positives.of_groups(labels)
    elif labels.shape == (rows, 1) and rows > 1:
        raise UserError(f"`labels` has shape ({rows}, 1); give one class a row, ({rows},): call .flatten().")
    else:
        positives = Positives.weighted(labels)
    positives.check(rows)
    return positives


def _gather(views: list[Tensor]) -> list[Gathered]:
    first = gather_with_gradient(views[0])
    return [first, *(gather_with_gradient(view, first.counts) for view in views[1:])]


def _sums_of_positives(
    views: list[Tensor], positives: Positives, gathered: list[Gathered] | None
) -> tuple[Tensor, Tensor]:
    """For each own view the weighted sum of its positives, and the sum of the weights."""
    columns = views
    if gathered is not None:
        columns = [part.rows for part in gathered]
        positives = positives.gathered(gathered[0].counts)
    summed = sum(columns[1:], columns[0])
    if len(views) == 1 and positives.matrix is not None:
        # Not taken off below but left out: small weights beside the view's own would be lost.
        positives = dataclasses.replace(positives, matrix=positives.matrix.clone().fill_diagonal_(0))
    elif len(views) == 1 and positives.partner is not None:
        summed = summed.double()  # for the same reason
    # A view is no positive of itself: its own weight is taken off, its other views' stays.
    own = positives.diagonal(views[0].to(summed))
    shared = positives.weighted_sum(summed)
    sums = torch.cat([shared - own[:, None] * view for view in views])
    totals = (positives.totals(summed) * len(views) - own).repeat(len(views))
    return sums.to(views[0]), totals.to(views[0])


def _candidates(views: list[Tensor], gathered: list[Gathered] | None) -> Tensor:
    """For each own view the log-sum-exp of all other views."""
    if gathered is None:
        return self_logsumexp(torch.cat(views))
    columns, total, offset = torch.cat([part.rows for part in gathered]), len(gathered[0].rows), gathered[0].offset
    return torch.cat(
        [
            cross_logsumexp(view, columns, period=len(columns), shift=number * total + offset)
            for number, view in enumerate(views)
        ]
    )
