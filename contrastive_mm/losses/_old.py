"""Contrastive losses as pure functions of features; no model, no state.

Every loss computes in float32 or wider, whatever the features' type: under mixed precision the features come
in half precision, where ``exp(similarity / temperature)`` loses the digits that the gradient needs.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.errors import UserError

Similarity: TypeAlias = Literal["cosine", "dot"]


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    r"""Normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, section 2.1, equation 1).

    With the 2N views :math:`z` and :math:`s_{ij} = \cos(z_i, z_j) / T`, the loss is the mean over all 2N rows of
    :math:`-\log \exp(s_{ip}) / \sum_{j \ne i} \exp(s_{ij})`, where :math:`p` is the other view of the same sample.

    Args:
        first: (N, D) features of the first view.
        second: (N, D) features of the second view; row i belongs with row i of ``first``.
        temperature: T, above 0.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, N < 2 (a lone sample has no negative), features are not floating point, or
            the temperature is not above 0.
    """
    _check_pair(first, second, "first", "second")
    _check_temperature(temperature)
    count = first.shape[0]
    if count < 2:
        raise UserError("nt_xent needs at least 2 samples: `first` has 1, which leaves it without negatives.")
    with _full_precision(first):
        features = F.normalize(torch.cat([_widen(first), _widen(second)]), dim=1)
        logits = features @ features.T / temperature
        itself = torch.eye(2 * count, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(itself, float("-inf"))
        positive = torch.arange(2 * count, device=logits.device).roll(count)
        return F.cross_entropy(logits, positive)


def info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"] | None = None,
    temperature: float = 0.1,
    symmetric: bool = False,
    similarity: Similarity = "cosine",
    in_batch_negatives: bool = True,
) -> Float[Tensor, ""]:
    r"""InfoNCE (van den Oord et al. 2018, equation 4): pick each query's key among negatives.

    The mean over the queries of :math:`-\log \exp(s(q_i, k_i)) / \sum_{k} \exp(s(q_i, k))`, where k runs over the
    positive key, the other keys of the batch and the given negatives.

    Args:
        query: (N, D) features.
        key: (N, D) features; row i is the positive of query i.
        negatives: (K, D) further negatives for every query, such as a queue's content.
        temperature: divides the similarity; above 0.
        symmetric: average with the other direction, keys looking for their query among queries.
        similarity: ``"cosine"`` (features are normalised here) or ``"dot"`` (used as they are; CURL's bilinear
            similarity is the dot product after ``heads.BilinearSimilarity``).
        in_batch_negatives: whether the other keys of the batch are negatives. MoCo takes its negatives from
            the queue alone (He et al. 2020, algorithm 1).

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes don't fit, features are not floating point, the temperature is not above 0, or no
            negative is left to compare with.
    """
    _check_pair(query, key, "query", "key")
    _check_temperature(temperature)
    if negatives is not None and negatives.shape[1] != query.shape[1]:
        raise UserError(f"`negatives` has {negatives.shape[1]} dimensions, but `query` has {query.shape[1]}.")
    available = (query.shape[0] - 1 if in_batch_negatives else 0) + (0 if negatives is None else len(negatives))
    if available == 0:
        raise UserError(
            "info_nce has no negative to compare with: give `negatives` (is the queue still empty?), "
            "or a batch of at least 2 with in_batch_negatives=True."
        )
    with _full_precision(query):
        query, key = _prepare(query, similarity), _prepare(key, similarity)
        extra = None if negatives is None else _prepare(negatives, similarity)
        loss = _one_direction(query, key, extra, temperature, in_batch_negatives)
        if symmetric:
            loss = (loss + _one_direction(key, query, extra, temperature, in_batch_negatives)) / 2
        return loss


def _one_direction(
    query: Tensor, key: Tensor, extra: Tensor | None, temperature: float, in_batch_negatives: bool
) -> Tensor:
    count = query.shape[0]
    if in_batch_negatives:
        columns = [query @ key.T]
        positive = torch.arange(count, device=query.device)
    else:
        columns = [(query * key).sum(dim=1, keepdim=True)]
        positive = torch.zeros(count, dtype=torch.long, device=query.device)
    if extra is not None:
        columns.append(query @ extra.T)
    return F.cross_entropy(torch.cat(columns, dim=1) / temperature, positive)


def _widen(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _prepare(features: Tensor, similarity: Similarity) -> Tensor:
    wide = _widen(features)
    return F.normalize(wide, dim=1) if similarity == "cosine" else wide


def _full_precision(features: Tensor) -> torch.autocast:
    """Autocast would turn the similarity product back to half precision; switch it off inside the loss."""
    return torch.autocast(features.device.type, enabled=False)


def _check_pair(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        raise UserError(
            f"`{first_name}` has shape {tuple(first.shape)} and `{second_name}` {tuple(second.shape)}; "
            "they need the same number of rows and dimensions, row i with row i."
        )
    for name, features in ((first_name, first), (second_name, second)):
        if not features.is_floating_point():
            raise UserError(f"`{name}` holds {features.dtype}; features must be floating point: call .float().")
    if first.shape[0] == 0:
        raise UserError(f"`{first_name}` has no rows.")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"temperature = {temperature}; it divides the similarity and must be above 0.")
