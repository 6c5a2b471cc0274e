"""NT-Xent and what decouples or reweights its negatives (SimCLR and its successors)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import Gathered, gather_rows, gather_with_gradient, process_count, refuse_together
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.logsumexp import cross_logsumexp, self_logsumexp, views_logsumexp
from contrastive_mm.losses.similarity import (
    Similarity,
    Temperature,
    check_symmetric,
    check_temperature,
    full_precision,
    prepare_key,
    scale_of,
)
from contrastive_mm.losses.unrelated import unrelated_logsumexp
from contrastive_mm.positives import Positives

SymmetricSimilarity = Literal["cosine", "dot"]


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.1,
    similarity: SymmetricSimilarity = "cosine",
    positives: Positives | None = None,
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""Normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, section 2.1, equation 1).

    With the 2N views :math:`z` and :math:`s_{ij} = \cos(z_i, z_j) / T`, the loss is the mean over all 2N rows of
    :math:`-\log \exp(s_{ip}) / \sum_{j \ne i} \exp(s_{ij})`, where :math:`p` is the other view of the same sample.
    Exact, in O(N D) memory.

    Args:
        first: (N, D) features of the first view.
        second: (N, D) features of the second view; row i belongs with row i of ``first``.
        temperature: T, above 0; a tensor receives its gradient.
        similarity: ``"cosine"``, or ``"dot"`` (features used as they are).
        positives: which rows of the other view belong with a row, and how much; by default row i with row i. Every
            view but the row itself stays among the candidates. In several processes each gives the value of its own
            samples.
        gather: in several processes, compare with the views of all; each process returns the loss of its own rows,
            and the average of the processes' gradients is the gradient of the whole batch's loss.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, N < 2 (a lone sample has no negative), features are not finite floats, or the
            temperature is not above 0.
    """
    with full_precision(first):
        views = _Views(first, second, temperature, similarity, gather, positives)
        candidates, positive = views.terms(spare_positives=False, positives=positives)
        return views.mean(candidates - positive)


def dcl(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.1,
    similarity: SymmetricSimilarity = "cosine",
    weight_concentration: float | None = None,
    positives: Positives | None = None,
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""Decoupled contrastive loss (Yeh et al. 2022, arXiv 2110.06848, section 3).

    NT-Xent without the positive in the denominator, so that its gradient no longer fades where the positive is easy.
    The paper sums over rows; here, as in the released code, their mean is taken.

    Args:
        first: (N, D) features of the first view.
        second: (N, D) features of the second view.
        temperature: T, above 0.
        similarity: ``"cosine"`` or ``"dot"``.
        weight_concentration: sigma of DCLW: positives weigh :math:`2 - e^{c_i / \sigma} / \mathrm{mean}_j e^{c_j /
            \sigma}` with the cosine c of sample i (0.5 in the paper); None weighs all alike. Weights
            carry no gradient.
        positives: as in ``nt_xent``, with the mean cosine of its positives as c. No view of a sample that belongs with
            a row by a weight above 0 is among its candidates, nor is any of its own sample.
        gather: as in ``nt_xent``.

    Returns:
        The loss, a scalar.

    Raises:
        UserError: as ``nt_xent``, a concentration not above 0, or a row with which all samples belong.
    """
    if weight_concentration is not None and not weight_concentration > 0:
        raise UserError(f"weight_concentration = {weight_concentration}; it must be above 0.")
    with full_precision(first):
        views = _Views(first, second, temperature, similarity, gather, positives)
        candidates, positive = views.terms(spare_positives=True, positives=positives)
        if weight_concentration is not None:
            cosines = _Views(first.detach().double(), second.detach().double(), 1.0, "cosine", gather)
            positive = cosines.distant_weights(positives, weight_concentration).to(positive) * positive
        return views.mean(candidates - positive)


def hard_negative_nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.5,
    concentration: float = 1.0,
    positive_prior: float = 0.1,
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""NT-Xent with debiased negatives, hard ones weighted up (Robinson et al. 2021, arXiv 2010.04592, section 4).

    The sum over the M = 2N - 2 negatives becomes :math:`N_g = (M \cdot E - \tau M e^{s_p}) / (1 - \tau)`, at least
    :math:`M e^{-1/T}`, with :math:`E = \sum_k e^{(1 + \beta) s_k} / \sum_k e^{\beta s_k}`. With
    ``concentration`` 0 it is the debiased loss of Chuang et al. 2020 (arXiv 2007.00224). As in the released code, the
    weights :math:`e^{\beta s}` carry gradient too. It takes no ``Positives``: the prior stands for the positives that
    nobody has named, and both papers define the estimate for one named positive a row.

    Args:
        first: (N, D) features of the first view.
        second: (N, D) features of the second view.
        temperature: T, above 0; a tensor receives its gradient.
        concentration: beta, at least 0; larger weighs hard negatives more.
        positive_prior: tau, the probability that a random sample is of the anchor's class, in [0, 1).
        gather: as in ``nt_xent``.

    Returns:
        The loss, a scalar.

    Raises:
        UserError: as ``nt_xent``, or concentration or prior out of range.
    """
    if not concentration >= 0:
        raise UserError(f"concentration = {concentration}; it must be at least 0.")
    if not 0 <= positive_prior < 1:
        raise UserError(f"positive_prior = {positive_prior}; a probability below 1 is needed.")
    with full_precision(first):
        views = _Views(first, second, temperature, "cosine", gather)
        negatives = 2 * views.total - 2
        weighted = views.logsumexp(spare_positives=True, sharpness=1 + concentration)
        if concentration > 0:
            weighted = weighted - views.logsumexp(spare_positives=True, sharpness=concentration)
        else:
            weighted = weighted - math.log(negatives)
        positive = views.positive_similarity(None)
        # In logarithms, of which none overflows or vanishes at any temperature: E - tau e^s = E (1 - e^gap).
        gap = positive + (math.log(positive_prior) if positive_prior > 0 else -math.inf) - weighted
        left = gap < -1e-6
        debiased = weighted + torch.log(-torch.expm1(torch.where(left, gap, -1.0))) - math.log1p(-positive_prior)
        mean = torch.maximum(torch.where(left, debiased, -math.inf), -views.scale)
        return views.mean(torch.logaddexp(positive, mean + math.log(negatives)) - positive)


class _Views:
    """Both views below each other, prepared so that dot products are similarities over T."""

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        temperature: Temperature,
        similarity: Similarity,
        gather: bool,
        positives: Positives | None = None,
    ) -> None:
        with refuse_together(first, gather):
            check_pair(first, second, "first", "second")
            check_temperature(temperature)
            check_symmetric(similarity)
            if positives is not None:
                positives.check(len(first))
        self.similarity: Similarity = similarity
        self.features = torch.cat([first, second])
        like = prepare_key(first[:1], "dot")
        scale = scale_of(temperature, like)
        self.scale = scale.reshape(1) if isinstance(scale, Tensor) else like.new_full((1,), scale)
        self.count = len(first)
        self._own: Tensor | None = None
        self.gathered: tuple[Gathered, Gathered] | None = None
        if gather and process_count() > 1:
            gathered = gather_with_gradient(self.own[: self.count])
            self.gathered = gathered, gather_with_gradient(self.own[self.count :], gathered.counts)
        elif self.count < 2:
            raise UserError("NT-Xent needs at least 2 samples: `first` has 1, which leaves it without negatives.")

    @property
    def own(self) -> Tensor:
        """(2n, D) this process's rows, prepared so that dot products are similarities over T."""
        # Kept by hand: functools.cached_property locks, which torch.compile can't follow.
        if self._own is None:
            self._own = prepare_key(self.features, self.similarity) * self.scale.sqrt()
        return self._own

    def terms(self, spare_positives: bool, positives: Positives | None = None) -> tuple[Tensor, Tensor]:
        """(2n,) log-sum-exps over all views but the row itself, or but all views of its sample; (2n,) similarities."""
        if self.gathered is None and positives is None:
            period = self.count if spare_positives else 2 * self.count
            logsumexp, similarity = views_logsumexp(self.features, self.scale, self.similarity == "cosine", period)
            return logsumexp, similarity.repeat(2)
        positives = self.whole(positives)
        if spare_positives and positives is not None:
            return self._unrelated(positives), self.positive_similarity(positives)
        return self.logsumexp(spare_positives), self.positive_similarity(positives)

    def whole(self, positives: Positives | None) -> Positives | None:
        """The value for the views of all processes."""
        if positives is None or self.gathered is None:
            return positives
        return positives.gathered(self.gathered[0].counts)

    def _columns(self) -> tuple[Tensor, Tensor]:
        """The views of all processes, first and second."""
        if self.gathered is None:
            return self.own[: self.count], self.own[self.count :]
        return self.gathered[0].rows, self.gathered[1].rows

    def _unrelated(self, positives: Positives) -> Tensor:
        first, second = self.own.chunk(2)
        columns = torch.cat(self._columns())
        count = len(columns) // 2
        forth = unrelated_logsumexp(first, columns, count, positives)
        return torch.cat([forth, unrelated_logsumexp(second, columns, count, positives.transposed())])

    @property
    def total(self) -> int:
        """Samples of all processes."""
        return self.count if self.gathered is None else len(self.gathered[0].rows)

    def logsumexp(self, spare_positives: bool, sharpness: float = 1.0) -> Tensor:
        """(2n,) log of the sum of exp(sharpness s) over all views but the row, or but both views of its sample."""
        root = sharpness**0.5
        own = self.own if sharpness == 1.0 else self.own * root
        if self.gathered is None:
            return self_logsumexp(own, self.count if spare_positives else None)
        columns, offset = torch.cat(self._columns()), self.gathered[0].offset
        columns = columns if sharpness == 1.0 else columns * root
        period = self.total if spare_positives else 2 * self.total
        return torch.cat(
            [
                cross_logsumexp(own[: self.count], columns, period=period, shift=offset),
                cross_logsumexp(own[self.count :], columns, period=period, shift=self.total + offset),
            ]
        )

    def positive_similarity(self, positives: Positives | None) -> Tensor:
        """(2n,) mean similarity over T of each row with its positives (as ``whole`` gives them) in the other view."""
        first, second = self.own.chunk(2)
        if positives is None:
            return (first * second).sum(1).repeat(2)
        all_first, all_second = self._columns()
        forth = (first * positives.mean(all_second)).sum(1)
        return torch.cat([forth, (second * positives.transposed().mean(all_first)).sum(1)])

    def distant_weights(self, positives: Positives | None, concentration: float) -> Tensor:
        """(2n,) DCLW's weights, from similarities that are cosines: largest for the most distant positives."""
        weights = []
        for cosine in self.positive_similarity(self.whole(positives)).chunk(2):
            everyone = cosine if self.gathered is None else gather_rows(cosine, self.gathered[0].counts)
            share = (cosine / concentration - (everyone / concentration).logsumexp(0)).exp()
            weights.append(2 - share * len(everyone))
        return torch.cat(weights)

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over own rows; with unequal numbers in several processes every row weighs the same."""
        rows = self.count if self.gathered is None else self.gathered[0].mean_rows
        return losses.sum() / (2 * rows)
