"""Log-sum-exp of all dot products, tile by tile: exact, and no matrix larger than one tile is ever held.

With x the rows and G the gradient of the loss by the dot products, the gradient of x is G x, and a tile of G follows
from a tile of dot products and the log-sum-exps alone. So the backward pass computes the tiles again; that is cheaper
than to keep them, and where rows are compared with each other only half of the tiles is needed, as s_ij = s_ji.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from contrastive_mm.losses.exclusion import Exclusion

BLOCKS = {"cpu": 320}
"""Rows of a tile: 320 x 320 floats stay in a core's second cache. A GPU wants larger ones."""
GPU_BLOCK = 4096

LARGEST_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
"""Up to this bound of all dot products, exp needs no maximum taken off: neither it nor a sum of a million of its
values overflows, and the smallest value is still normal. For cosines it is T >= 0.025."""


def _block(features: Tensor) -> int:
    return BLOCKS.get(features.device.type, GPU_BLOCK)


def _starts(rows: int, block: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, block):
        yield start, min(start + block, rows)


class _Tiles:
    """Exponentials of dot products, one tile at a time, in a buffer that is used again for each.

    ``shifted`` tells whether exponents may be taken as they are.
    """

    def __init__(self, left: Tensor, right: Tensor, exclusion: Exclusion) -> None:
        self.left, self.right_t = left, right.T
        self.exclusion = exclusion
        self.block = _block(left)
        rows, columns = min(self.block, len(left)), min(self.block, len(right))
        self._buffer = left.new_empty(rows * columns)
        self._second = self._buffer.new_empty(0)
        bound = math.sqrt(_largest_square(left) * _largest_square(right))
        self.safe = bound <= LARGEST_EXPONENT[left.dtype]

    def logits(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        """Dot products of rows i with columns j."""
        rows, columns = i[1] - i[0], j[1] - j[0]
        tile = self._buffer[: rows * columns].view(rows, columns)
        return torch.mm(self.left[i[0] : i[1]], self.right_t[:, j[0] : j[1]], out=tile)

    def exponentials(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        """Their exponentials, 0 for excluded pairs."""
        tile = self.logits(i, j).exp_()
        self.exclusion.fill_(tile, i, j, 0.0)
        return tile

    def masked_logits(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        """The dot products, minus infinity for excluded pairs."""
        tile = self.logits(i, j)
        self.exclusion.fill_(tile, i, j, -math.inf)
        return tile

    def like(self, tile: Tensor) -> Tensor:
        """A second buffer of a tile's shape."""
        if len(self._second) < tile.numel():
            self._second = self._buffer.new_empty(len(self._buffer))
        return self._second[: tile.numel()].view(tile.shape)


def _largest_square(features: Tensor) -> float:
    if len(features) == 0:
        return 0.0
    # Row norms without a squared copy of the features.
    return float(torch.linalg.vector_norm(features, dim=1).max()) ** 2


def _weights(logsumexp: Tensor, gradient: Tensor) -> Tensor:
    """The gradient times exp(-logsumexp), 0 for rows that were compared with nothing."""
    return torch.where(logsumexp == -math.inf, 0.0, gradient * (-logsumexp).exp())


def _finite(logsumexp: Tensor) -> Tensor:
    """Rows that were compared with nothing have only excluded pairs: exp(-inf - 0) is 0, exp(-inf + inf) is not."""
    return logsumexp.masked_fill(logsumexp == -math.inf, 0.0)


def self_forward(features: Tensor, exclusion: Exclusion) -> Tensor:
    """Log-sum-exp of each row with the others: (M, D) -> (M,). Half of the tiles."""
    tiles = _Tiles(features, features, exclusion)
    blocks = list(_starts(len(features), tiles.block))
    if tiles.safe:
        total = features.new_zeros(len(features))
        for number, i in enumerate(blocks):
            for j in blocks[number:]:
                tile = tiles.exponentials(i, j)
                total[i[0] : i[1]] += tile.sum(1)
                if i != j:
                    total[j[0] : j[1]] += tile.sum(0)
        return total.log_()
    total = features.new_full((len(features),), -math.inf)
    for number, i in enumerate(blocks):
        for j in blocks[number:]:
            tile = tiles.masked_logits(i, j)
            _log_add_(total, i, tile.logsumexp(1))
            if i != j:
                _log_add_(total, j, tile.logsumexp(0))
    return total


def _log_add_(total: Tensor, rows: tuple[int, int], more: Tensor) -> None:
    part = total[rows[0] : rows[1]]
    torch.logaddexp(part, more, out=part)


def self_backward(features: Tensor, logsumexp: Tensor, gradient: Tensor, exclusion: Exclusion) -> Tensor:
    """Gradient of ``self_forward``: row i gets sum_j (g_i p_ij + g_j p_ji) x_j."""
    tiles = _Tiles(features, features, exclusion)
    result = torch.zeros_like(features, memory_format=torch.contiguous_format)
    weights, ends = _weights(logsumexp, gradient), _finite(logsumexp)
    blocks = list(_starts(len(features), tiles.block))
    for number, i in enumerate(blocks):
        for j in blocks[number:]:
            if tiles.safe:
                # exp(s - lse_i) g_i + exp(s - lse_j) g_j with a single exp.
                tile = tiles.exponentials(i, j)
                both = torch.add(weights[i[0] : i[1], None], weights[None, j[0] : j[1]], out=tiles.like(tile))
                tile.mul_(both)
            else:
                tile = tiles.masked_logits(i, j)
                along = torch.sub(tile, ends[None, j[0] : j[1]], out=tiles.like(tile)).exp_()
                along.mul_(gradient[None, j[0] : j[1]])
                tile.sub_(ends[i[0] : i[1], None]).exp_().mul_(gradient[i[0] : i[1], None]).add_(along)
            result[i[0] : i[1]].addmm_(tile, features[j[0] : j[1]])
            if i != j:
                result[j[0] : j[1]].addmm_(tile.T, features[i[0] : i[1]])
    return result


def row_factors(features: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    """(M,) by which rows are multiplied: the root of 1/T, over the row's length; 0 for a row of zeros."""
    factors = scale.sqrt().expand(len(features))
    if normalize:
        lengths = torch.linalg.vector_norm(features, dim=1, dtype=scale.dtype)
        factors = factors / lengths.masked_fill(lengths == 0, math.inf)
    return factors.contiguous()


def views_forward(features: Tensor, scale: Tensor, normalize: bool, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """All that NT-Xent needs of two views below each other, from the encoder's own features.

    Args:
        features: (2N, D) in any type, row i with row i + N.
        scale: (1,) 1/T, in the type to compute in.
        normalize: cosine instead of dot products.
        period: 2N leaves out each row's pair with itself, N all views of its sample.

    Returns:
        Log-sum-exps (2N,), similarities of the pairs (N,), and the factors (2N,) by which rows were multiplied.
    """
    factors = row_factors(features, scale, normalize)
    prepared = features * factors[:, None]
    first, second = prepared.chunk(2)
    return self_forward(prepared, Exclusion(period)), (first * second).sum(1), factors


def views_backward(
    features: Tensor,
    scale: Tensor,
    normalize: bool,
    period: int,
    saved: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``views_forward`` by the features, in their type, and by the scale (1,).

    Args:
        features: as in the forward pass, and so are scale, normalize and period.
        scale: (1,).
        normalize: as there.
        period: as there.
        saved: log-sum-exps and factors of the forward pass.
        gradients: (2N,) of the log-sum-exps and (N,) of the pairs' similarities.
    """
    logsumexp, factors = saved
    prepared = features * factors[:, None]
    gradient = self_backward(prepared, logsumexp, gradients[0], Exclusion(period))
    pairs = len(features) // 2
    gradient[:pairs].addcmul_(gradients[1][:, None], prepared[pairs:])
    gradient[pairs:].addcmul_(gradients[1][:, None], prepared[:pairs])
    along = torch.linalg.vecdot(gradient, prepared)
    if normalize:
        gradient.addcmul_(prepared, (along / scale)[:, None], value=-1)
    gradient.mul_(factors[:, None])
    return gradient.to(features.dtype), along.sum().div(2 * scale)


def cross_forward(
    query: Tensor, key: Tensor, exclusion: Exclusion, columns: bool, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of queries over keys, of keys over queries where asked, and the expected key of each query.

    The expected key sum_k p_k k is the gradient of a query's log-sum-exp. Where keys want no gradient (a queue),
    taking it in this pass spares the second one.

    Returns:
        (N,), (K,) or empty, (N, D) or empty.
    """
    tiles = _Tiles(query, key, exclusion)
    safe = tiles.safe
    start = 0.0 if safe else -math.inf
    over_keys = query.new_full((len(query),), start)
    over_queries = query.new_full((len(key) if columns else 0,), start)
    expected = query.new_zeros((len(query), query.shape[1]) if expectation else (0, query.shape[1]))
    for i in _starts(len(query), tiles.block):
        for j in _starts(len(key), tiles.block):
            if safe:
                tile = tiles.exponentials(i, j)
                over_keys[i[0] : i[1]] += tile.sum(1)
                if columns:
                    over_queries[j[0] : j[1]] += tile.sum(0)
            else:
                tile = tiles.masked_logits(i, j)
                if columns:
                    _log_add_(over_queries, j, tile.logsumexp(0))
                before = over_keys[i[0] : i[1]].clone()
                _log_add_(over_keys, i, tile.logsumexp(1))
                if expectation:
                    now = _finite(over_keys[i[0] : i[1]])
                    expected[i[0] : i[1]] *= (before - now).exp_()[:, None]
                    tile.sub_(now[:, None]).exp_()
            if expectation:
                expected[i[0] : i[1]].addmm_(tile, key[j[0] : j[1]])
    if not safe:
        return over_keys, over_queries, expected
    if expectation:
        expected /= over_keys.clamp_min(torch.finfo(query.dtype).tiny)[:, None]
    return over_keys.log_(), over_queries.log_(), expected


def cross_backward(
    query: Tensor,
    key: Tensor,
    over_keys: tuple[Tensor, Tensor],
    over_queries: tuple[Tensor, Tensor] | None,
    exclusion: Exclusion,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``cross_forward`` by queries and keys.

    Args:
        query: (N, D).
        key: (K, D).
        over_keys: log-sum-exps (N,) and their gradients (N,).
        over_queries: the same for the other direction (K,), or None.
        exclusion: as in the forward pass.
    """
    tiles = _Tiles(query, key, exclusion)
    by_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    by_key = torch.zeros_like(key, memory_format=torch.contiguous_format)
    row_weights, row_ends = _weights(*over_keys), _finite(over_keys[0])
    column_weights = None if over_queries is None else _weights(*over_queries)
    for i in _starts(len(query), tiles.block):
        for j in _starts(len(key), tiles.block):
            a, b = slice(*i), slice(*j)
            if tiles.safe:
                tile = tiles.exponentials(i, j)
                if column_weights is None:
                    tile.mul_(row_weights[a, None])
                else:
                    both = torch.add(row_weights[a, None], column_weights[None, b], out=tiles.like(tile))
                    tile.mul_(both)
            else:
                tile = tiles.masked_logits(i, j)
                along = None
                if over_queries is not None:
                    ends = _finite(over_queries[0][b])[None]
                    along = torch.sub(tile, ends, out=tiles.like(tile)).exp_().mul_(over_queries[1][None, b])
                tile.sub_(row_ends[a, None]).exp_().mul_(over_keys[1][a, None])
                if along is not None:
                    tile.add_(along)
            by_query[a].addmm_(tile, key[b])
            by_key[b].addmm_(tile.T, query[a])
    return by_query, by_key
