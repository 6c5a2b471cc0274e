"""InfoNCE: pick each query's key among the keys of the batch, of a queue, or of both."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.distributed import gather_rows, gather_with_gradient, process_count, refuse_together, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_columns, check_ids, check_pair
from contrastive_mm.losses.logsumexp import cross_logsumexp, two_way_logsumexp
from contrastive_mm.losses.similarity import (
    Similarity,
    Temperature,
    check_directions,
    check_temperature,
    full_precision,
    prepare_key,
    prepare_query,
    scale_of,
)
from contrastive_mm.positives import Positives


def info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"] | None = None,
    temperature: Temperature = 0.1,
    symmetric: bool = False,
    similarity: Similarity = "cosine",
    in_batch_negatives: bool = True,
    positives: Positives | None = None,
    ids: Int[Tensor, " batch"] | None = None,
    negative_ids: Int[Tensor, " negatives"] | None = None,
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""InfoNCE (van den Oord et al. 2018, equation 4): pick each query's key among negatives.

    The mean over the queries of :math:`-\log \exp(s(q_i, k_i)) / \sum_{k} \exp(s(q_i, k))`, where k runs over the
    positive key, the other keys of the batch and the given negatives. Exact, in O(N D) memory; negatives that want no
    gradient (a queue) cost a single pass over them.

    Args:
        query: (N, D) features.
        key: (N, D) features; row i is the positive of query i.
        negatives: (K, D) further negatives for every query, such as a queue's content.
        temperature: divides the similarity; above 0. A tensor receives its gradient.
        symmetric: average with the other direction, keys looking for their query among queries (and negatives).
        similarity: ``"cosine"`` (features are normalised here), ``"dot"`` (used as they are), or a map of the queries
            such as ``heads.BilinearSimilarity`` (CURL's q W k).
        in_batch_negatives: whether the other keys of the batch are candidates. MoCo takes its negatives from
            the queue alone (He et al. 2020, algorithm 1).
        positives: which keys belong with a query, and how much: soft targets, groups, mixed samples, neighbours in
            time. By default key i with query i. In several processes each gives the value of its own samples.
        ids: (N,) whole numbers of samples or classes: a key with the query's number, other than key i itself, is no
            negative.
        negative_ids: (K,) the same for ``negatives``; needs ``ids``.
        gather: in several processes, compare with the keys of all; each process returns the loss of its own queries,
            and the average of the processes' gradients is the gradient of the whole batch's loss.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes don't fit, features are not finite floats, the temperature is not above 0, options that
            exclude each other, or no negative is left to compare with.
    """
    with refuse_together(query, gather):
        check_pair(query, key, "query", "key")
        check_temperature(temperature)
        if negatives is not None:
            check_columns(negatives, "negatives", query, "query")
        _check_options(
            query, negatives, symmetric, similarity, in_batch_negatives, positives, ids, negative_ids, gather
        )
    with full_precision(query):
        scale = scale_of(temperature, prepare_key(query[:1], "dot"))
        left, right = prepare_query(query, similarity), prepare_key(key, similarity)
        extra = None if negatives is None else prepare_key(negatives, similarity).to(left.dtype)
        candidates = _Candidates(
            left * scale, right, extra, scale, symmetric, positives, ids, negative_ids, in_batch_negatives, gather
        )
        directions = zip(candidates.logsumexp(), candidates.positive_similarity(), strict=True)
        losses = [logsumexp - positive for logsumexp, positive in directions]
        return candidates.mean((losses[0] + losses[1]) / 2 if symmetric else losses[0])


class _Candidates:
    """What each query is compared with, its positive included."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        scale: float | Tensor,
        symmetric: bool,
        positives: Positives | None,
        ids: Tensor | None,
        negative_ids: Tensor | None,
        in_batch: bool,
        gather: bool,
    ) -> None:
        # The queries carry the scale, so that neither keys nor a long queue have to be copied for it.
        self.query, self.key, self.negatives, self.scale = query, key, negatives, scale
        self.symmetric, self.in_batch, self.positives = symmetric, in_batch, positives
        self.ids = self.all_ids = ids
        self.negative_ids = negative_ids
        self.paired = (query * key).sum(1)
        self.all_queries, self.all_keys = query, key
        self.mean_rows: float = len(query)
        self.gathered = False
        if gather and process_count() > 1:
            counts = row_counts(query)
            self.mean_rows = sum(counts) / len(counts)
            # Nothing is gathered where the batch's other keys are no candidates.
            self.gathered = in_batch
        if self.gathered:
            self.all_keys = gather_with_gradient(key, counts).rows
            if symmetric:
                self.all_queries = gather_with_gradient(query, counts).rows
            if ids is not None:
                self.all_ids = gather_rows(ids, counts)
            if positives is not None:
                self.positives = positives.gathered(counts)

    def logsumexp(self) -> list[Tensor]:
        """(N,) for queries over keys and, where symmetric, (N,) for keys over queries."""
        forth, *back = self._in_batch()
        return [
            self._with_negatives(forth, self.query),
            *(self._with_negatives(each, self.key * self.scale) for each in back),
        ]

    def positive_similarity(self) -> list[Tensor]:
        """(N,) mean similarity over T of each query with its positive keys; where symmetric, of each key too."""
        if self.positives is None:
            return [self.paired] * (1 + self.symmetric)
        forth = (self.query * self.positives.mean(self.all_keys)).sum(1)
        if not self.symmetric:
            return [forth]
        return [forth, (self.key * self.positives.transposed().mean(self.all_queries)).sum(1)]

    def _in_batch(self) -> list[Tensor]:
        if not self.in_batch:
            return [self.paired] * (1 + self.symmetric)
        if self.symmetric and not self.gathered:
            found = list(two_way_logsumexp(self.query, self.key, self.ids, self.ids))
        else:
            # A second direction shares no matrix here: own rows stand against all columns both times.
            found = [cross_logsumexp(self.query, self.all_keys, self.ids, self.all_ids)]
            if self.symmetric:
                found.append(cross_logsumexp(self.key, self.all_queries, self.ids, self.all_ids))
        # Leaving out equal numbers has left out the positive too.
        return found if self.ids is None else [torch.logaddexp(each, self.paired) for each in found]

    def _with_negatives(self, found: Tensor, rows: Tensor) -> Tensor:
        if self.negatives is None:
            return found
        ids = None if self.negative_ids is None else self.ids
        return torch.logaddexp(found, cross_logsumexp(rows, self.negatives, ids, self.negative_ids))

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over own rows; with unequal numbers in several processes every row weighs the same."""
        return losses.sum() / self.mean_rows


def _check_options(
    query: Tensor,
    negatives: Tensor | None,
    symmetric: bool,
    similarity: Similarity,
    in_batch: bool,
    positives: Positives | None,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    gather: bool,
) -> None:
    rows = query.shape[0]
    others = rows * process_count() if gather else rows
    if (others - 1 if in_batch else 0) + (0 if negatives is None else len(negatives)) == 0:
        raise UserError(
            "info_nce has no negative to compare with: give `negatives` (is the queue still empty?), "
            "or a batch of at least 2 with in_batch_negatives=True."
        )
    check_directions(symmetric, similarity)
    if ids is not None:
        check_ids(ids, "ids", rows, "query")
    if negative_ids is not None:
        if ids is None or negatives is None:
            raise UserError("`negative_ids` needs `ids` and `negatives`: pairs of equal numbers are left out.")
        check_ids(negative_ids, "negative_ids", len(negatives), "negatives")
    if positives is None:
        return
    positives.check(rows)
    if not in_batch:
        raise UserError("`positives` names keys of the batch as positives; it needs in_batch_negatives=True.")
    if ids is not None:
        raise UserError("`ids` leaves keys out of the candidates that `positives` may name; give one of the two.")
