"""SigLIP: every pair of the batch is a yes-or-no question of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import gather_with_gradient, process_count, refuse_together
from contrastive_mm.errors import UserError
from contrastive_mm.losses import tiled
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.logsumexp import is_plain
from contrastive_mm.losses.operation import Operation
from contrastive_mm.losses.similarity import (
    Similarity,
    Temperature,
    check_temperature,
    full_precision,
    prepare_key,
    prepare_query,
    scale_of,
)


def sigmoid_loss(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.1,
    bias: float | Float[Tensor, ""] = -10.0,
    similarity: Similarity = "cosine",
    gather: bool = False,
) -> Float[Tensor, ""]:
    r"""Sigmoid loss of all pairs (SigLIP, Zhai et al. 2023, section 3.2).

    :math:`-\frac{1}{N} \sum_i \sum_j \log \sigma(z_{ij} (x_i \cdot y_j / T + b))`, with z = 1 for i = j and -1
    otherwise: the sum over all pairs is divided by N, not by their number. The paper's equation has ``-b`` where its
    algorithm 1 and the released code have ``+b``; only ``+b`` goes with the published start at -10.

    Exact in O(N D) memory: the gradient of a pair needs no normaliser, so that one pass over tiles of pairs gives the
    loss and all gradients.

    Args:
        first: (N, D) features, of images say.
        second: (N, D) features, of texts say; row i belongs with row i of ``first``.
        temperature: T, a number or a scalar tensor with gradient. The paper learns log(1/T), starting at T = 0.1.
        bias: b, a number or a scalar tensor with gradient. The paper learns it, starting at -10, where the many
            negatives cost almost nothing.
        similarity: ``"cosine"``, ``"dot"`` or a map of ``first``.
        gather: in several processes, pair own rows of ``first`` with the rows of ``second`` of all; the average of
            the processes' gradients is the gradient of the whole batch's loss.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, N < 2 (a lone pair has no negative), features are not finite floating point, the
            temperature is not above 0, or the bias is no single number.
    """
    with refuse_together(first, gather):
        check_pair(first, second, "first", "second")
        check_temperature(temperature)
        if len(first) < 2 and not (gather and process_count() > 1):
            raise UserError("sigmoid_loss needs at least 2 samples: `first` has 1, which leaves it without negatives.")
        if isinstance(bias, Tensor) and bias.numel() != 1:
            raise UserError(f"`bias` has shape {tuple(bias.shape)}; give one number or a scalar tensor.")
    with full_precision(first):
        query = prepare_query(first, similarity)
        query = query * scale_of(temperature, query)
        wide_bias = bias.to(query).reshape(()) if isinstance(bias, Tensor) else query.new_tensor(bias)
        key = prepare_key(second, similarity)
        if not gather:
            return sum_over_pairs(query, key, wide_bias) / len(first)
        gathered = gather_with_gradient(key)
        return sum_over_pairs(query, gathered.rows, wide_bias, gathered.offset) / gathered.mean_rows


def sum_over_pairs(
    query: Float[Tensor, "queries dim"], key: Float[Tensor, "keys dim"], bias: Float[Tensor, ""], offset: int = 0
) -> Float[Tensor, ""]:
    """Sum over all pairs of -log sigmoid of plus or minus (q . k + bias): plus for a query and its own key.

    Args:
        query: (N, D) prepared features, multiplied by 1/T; float32 or float64.
        key: (K, D) prepared features of the same type.
        bias: scalar of the same type.
        offset: query i belongs with key ``i + offset``, as where the keys of several processes stand in one matrix.
    """
    if is_plain(len(query) * len(key)):
        logits = query @ key.T + bias
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive.diagonal(offset).fill_(True)
        return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()
    wants = torch.is_grad_enabled()
    gradients = wants and query.requires_grad, wants and key.requires_grad
    result: Tensor = _sigmoid_pairs(query, key, bias, offset, *gradients)[0]
    return result


def _pairs_and_gradients(
    query: Tensor, key: Tensor, bias: Tensor, offset: int, by_query: bool, by_key: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum and its gradients by queries, keys and bias; empty where they are not wanted."""
    # Thousands of tiles are added up: their sums in double precision, their values in the features' own.
    total = torch.zeros((), dtype=torch.float64, device=query.device)
    bias_gradient = torch.zeros_like(total)
    query_gradient = query.new_zeros(query.shape if by_query else (0,))
    key_gradient = key.new_zeros(key.shape if by_key else (0,))
    block = tiled._block(query)
    for i in tiled._starts(len(query), block):
        for j in tiled._starts(len(key), block):
            a, b = slice(*i), slice(*j)
            # Positives are negated, so that softplus is the loss and the sigmoid its slope for all pairs alike.
            tile = torch.addmm(bias, query[a], key[b].T)
            positives = _diagonal(tile, offset + i[0] - j[0])
            if positives is not None:
                positives.neg_()
            total -= F.logsigmoid(-tile).sum()
            tile.sigmoid_()
            if positives is not None:
                positives.neg_()
            bias_gradient += tile.sum()
            if by_query:
                query_gradient[a].addmm_(tile, key[b])
            if by_key:
                key_gradient[b].addmm_(tile.T, query[a])
    return total.to(query.dtype), query_gradient, key_gradient, bias_gradient.to(query.dtype)


def _diagonal(tile: Tensor, offset: int) -> Tensor | None:
    """The part of a diagonal that a tile meets, if any."""
    if not -tile.shape[0] < offset < tile.shape[1]:
        return None
    return tile.diagonal(offset)


def _allocate(
    query: Tensor, key: Tensor, bias: Tensor, offset: int, by_query: bool, by_key: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(()),
        query.new_empty(query.shape if by_query else (0,)),
        key.new_empty(key.shape if by_key else (0,)),
        query.new_empty(()),
    )


def _chain(
    gradient: Tensor, query: Tensor, key: Tensor, bias: Tensor, by_query: Tensor, by_key: Tensor, by_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain rule; an operation, with the features among its inputs, so that a second derivative is refused."""
    return gradient * by_query, gradient * by_key, gradient * by_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, bias, _, ctx.by_query, ctx.by_key = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, bias, *output[1:])


def _derivative(ctx: Any, call: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    by_query, by_key, by_bias = call(_sigmoid_pairs_backward, gradient, *ctx.saved_tensors)
    return by_query if ctx.by_query else None, by_key if ctx.by_key else None, by_bias, None, None, None


_sigmoid_pairs_backward = Operation(
    "sigmoid_pairs_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor bias, Tensor by_query, Tensor by_key, Tensor by_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _chain,
    lambda gradient, query, key, bias, *results: tuple(torch.empty_like(each) for each in results),
)

_sigmoid_pairs = Operation(
    "sigmoid_pairs",
    "(Tensor query, Tensor key, Tensor bias, int offset, bool by_query, bool by_key) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _pairs_and_gradients,
    _allocate,
    _save,
    _derivative,
)
