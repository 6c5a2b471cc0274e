"""Triplet margin: the positive is nearer than a negative by a margin."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.distributed import Gathered, gather_rows, gather_with_gradient, refuse_together, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_ids, check_pair
from contrastive_mm.losses.similarity import full_precision, widen

Mining: TypeAlias = Literal["semi-hard", "hard", "none"]

MINING_ROWS = 256
"""Anchors that are compared with all candidates at a time."""
EPSILON = 1e-12
"""Under the root of a distance, which has no slope at 0; as in Hermans et al.'s released code."""


def triplet_margin(
    anchor: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    margin: float | None = 0.2,
    labels: Int[Tensor, " batch"] | None = None,
    mining: Mining = "semi-hard",
    normalize: bool = True,
    squared: bool = True,
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""Triplet loss (FaceNet, Schroff et al. 2015, section 3.1), with mining in the batch.

    The mean over anchors of :math:`\max(0, d(a, p) - d(a, n) + m)`. Candidates are the rows of ``positive``; those of
    another sample (with labels: of another class) are negatives. One triplet an anchor is chosen:

    - ``"semi-hard"`` (FaceNet, section 3.2, equation 4): its own positive, and of the negatives farther away than
      that the nearest one. Where none is farther, the farthest of all negatives: the paper does not say what to do
      there, and the nearest one is what section 3.2 warns of.
    - ``"hard"`` (batch-hard, Hermans et al. 2017, equation 5): the farthest positive (with labels: of its class) and
      the nearest negative.
    - ``"none"``: its own positive, and the next row that is a negative: a random one, where batches are shuffled.

    Anchors without a negative are left out. Mining looks at all pairs, in blocks of rows and without gradient; the
    gradient goes through the chosen pairs alone, so the memory it needs is O(N D).

    FaceNet compares normalised features by squared distance and sums over triplets; Hermans et al. compare features
    as they are by the distance itself (``normalize=False, squared=False``) and take the mean, as is done here.

    Args:
        anchor: (N, D) features.
        positive: (N, D) features; row i belongs with row i of ``anchor``. For batch-hard within one batch of
            labelled samples give the same features twice.
        margin: m; None for the soft margin, softplus in the place of max(0, .) (Hermans et al., section 2).
        labels: (N,) class of row i of both.
        mining: how the triplets are chosen.
        normalize: whether features are brought to length 1 first.
        squared: whether distances are squared.
        gather: in several processes, choose among the rows of ``positive`` of all; each process returns the loss of
            its own anchors, and the average of the processes' gradients is the gradient of the whole batch's loss.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, features are not finite floating point, the margin is negative, an unknown
            ``mining``, or no anchor has a negative.
    """
    with refuse_together(anchor, gather):
        check_pair(anchor, positive, "anchor", "positive")
        if margin is not None and not margin >= 0:
            raise UserError(f"margin = {margin}; it must be at least 0, or None for the soft margin.")
        if mining not in ("semi-hard", "hard", "none"):
            raise UserError(f"mining = {mining!r}; it must be 'semi-hard', 'hard' or 'none'.")
        if labels is not None:
            check_ids(labels, "labels", len(anchor), "anchor")
    with full_precision(anchor):
        anchor, positive = widen(anchor), widen(positive)
        if normalize:
            anchor, positive = F.normalize(anchor, dim=1), F.normalize(positive, dim=1)
        candidates = (
            gather_with_gradient(positive) if gather else Gathered(positive, 0, len(positive), [len(positive)])
        )
        if labels is None:
            classes = torch.arange(len(candidates.rows), device=anchor.device)
        else:
            classes = gather_rows(labels, candidates.counts) if gather else labels
        rows, near, far = _mine(anchor.detach(), candidates.rows.detach(), classes, candidates.offset, mining)
        # Anchors with a negative may be spread unevenly: their mean number a process weighs all alike.
        counts = row_counts(rows) if gather else [len(rows)]
        if sum(counts) == 0:
            raise UserError(
                "triplet_margin has no negative to compare with: every row of `anchor` is of the same sample or "
                "class; give at least 2 of them."
            )
        own, others = anchor[rows], candidates.rows
        excess = _distance(own, others[near], squared) - _distance(own, others[far], squared)
        return (F.softplus(excess) if margin is None else F.relu(excess + margin)).sum() * len(counts) / sum(counts)


def _distance(first: Tensor, second: Tensor, squared: bool) -> Tensor:
    square = (first - second).square().sum(1)
    return square if squared else (square + EPSILON).sqrt()


@torch.no_grad()
def _mine(
    anchor: Tensor, candidates: Tensor, labels: Tensor, offset: int, mining: Mining
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the anchors that have a negative, and for each of them the positive's and the negative's row.

    Anchor i belongs with candidate ``i + offset``; ``labels`` are the candidates'.
    """
    # Distances are the same from any origin; from one amid the features the products below cancel least.
    centre = candidates.mean(0)
    anchor, candidates = anchor - centre, candidates - centre
    chosen = []
    for start in range(0, len(anchor), MINING_ROWS):
        rows = torch.arange(start, min(start + MINING_ROWS, len(anchor)), device=anchor.device)
        paired = rows + offset
        same = labels[paired, None] == labels[None]
        # The anchor's own length is the same for all candidates and can't change their order.
        squares = candidates.square().sum(1) - 2 * anchor[rows] @ candidates.T
        positives, negatives = _choose(squares, same, paired, mining)
        kept = ~same.all(1)
        chosen.append((rows[kept], positives[kept], negatives[kept]))
    rows, positives, negatives = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    return rows, positives, negatives


def _choose(squares: Tensor, same: Tensor, paired: Tensor, mining: Mining) -> tuple[Tensor, Tensor]:
    if mining == "hard":
        return squares.masked_fill(~same, -torch.inf).argmax(1), squares.masked_fill(same, torch.inf).argmin(1)
    if mining == "none":
        steps = (torch.arange(squares.shape[1], device=paired.device)[None] - paired[:, None]) % squares.shape[1]
        return paired, steps.masked_fill(same, squares.shape[1]).argmin(1)
    own = squares.gather(1, paired[:, None])
    farther = ~same & (squares > own)
    nearest_farther = squares.masked_fill(~farther, torch.inf).argmin(1)
    farthest = squares.masked_fill(same, -torch.inf).argmax(1)
    return paired, torch.where(farther.any(1), nearest_farther, farthest)
