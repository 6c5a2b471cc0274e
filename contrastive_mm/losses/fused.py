"""The log-sum-exps on an NVIDIA GPU: what ``tiled`` computes, in Triton kernels that keep each tile on the chip.

The forward pass of rows among themselves computes half of the tiles; the backward pass goes row by row over all of
them, which is deterministic and needs no atomic additions. Under ``torch.use_deterministic_algorithms`` the forward
pass goes over all tiles too. Features in half precision are multiplied as they are and added up in float32. For
float32 features the products follow ``torch.get_float32_matmul_precision()``: with ``highest`` three TensorFloat32
products stand for one in float32 (22 of its 24 bits), otherwise one does.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_mm.losses.exclusion import Exclusion
from contrastive_mm.losses.tiled import row_factors

LARGEST_EXPONENT = 60.0
"""Up to this bound of all dot products exp overflows in no sum of fewer than e^28 of them, and no value is 0."""

PARTS = 16
"""At most so many programs share a block of rows; each holds a result of its own."""

PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}


class _Sizes(NamedTuple):
    """Rows and columns of a tile, threads (in 32) and loads in flight of a program."""

    rows: int
    columns: int
    warps: int
    stages: int


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def self_forward(features: Tensor, exclusion: Exclusion, factors: Tensor | None = None) -> Tensor:
    """Log-sum-exp of each row with the others: (M, D) -> (M,) float32.

    Args:
        features: (M, D) rows.
        exclusion: pairs to leave out.
        factors: (M,) float32 by which the rows are multiplied, without being rounded.
    """
    from contrastive_mm.losses import kernels

    features, exclusion = features.contiguous(), _with_plain_ids(exclusion)
    if torch.are_deterministic_algorithms_enabled():
        return _online(features, features, exclusion, False, factors, factors)[0]
    rows, dim = features.shape
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    bound = (norms if factors is None else norms * factors).max().square()
    totals = torch.zeros(rows, dtype=torch.float32, device=features.device)
    sizes = _sizes(features)
    blocks = -(-rows // sizes.columns)
    group = max(1, min(8, blocks // 8))
    # Which of the two runs is decided on the device, so that nothing waits for it: the other one ends at once.
    _launch(
        kernels.half_forward,
        (blocks, -(-blocks // group)),
        features,
        factors,
        exclusion.row_ids,
        bound,
        totals,
        rows,
        dim,
        exclusion.period,
        group,
        LIMIT=LARGEST_EXPONENT,
        BLOCK=sizes.columns,
        **_options(features, exclusion, factors, sizes),
    )
    online = _online(features, features, exclusion, False, factors, factors, bound)[0]
    return torch.where(bound <= LARGEST_EXPONENT, totals.log_(), online)


def self_backward(features: Tensor, logsumexp: Tensor, gradient: Tensor, exclusion: Exclusion) -> Tensor:
    """Gradient of ``self_forward`` by the rows, in their type."""
    ends = (_finite(logsumexp), gradient)
    return _backward(features, features, ends, ends, exclusion)


def cross_forward(
    query: Tensor, key: Tensor, exclusion: Exclusion, columns: bool, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tiled.cross_forward``."""
    query, key = query.contiguous(), key.contiguous()
    over_keys, expected = _online(query, key, exclusion, expectation)
    over_queries = over_keys.new_empty(0)
    if columns:
        over_queries, _ = _online(key, query, _turned(exclusion), False)
    return over_keys, over_queries, expected


def cross_backward(
    query: Tensor,
    key: Tensor,
    over_keys: tuple[Tensor, Tensor],
    over_queries: tuple[Tensor, Tensor] | None,
    exclusion: Exclusion,
) -> tuple[Tensor, Tensor]:
    """As ``tiled.cross_backward``."""
    rows = (_finite(over_keys[0]), over_keys[1])
    columns = None if over_queries is None else (_finite(over_queries[0]), over_queries[1])
    by_query = _backward(query, key, rows, columns, exclusion)
    return by_query, _backward(key, query, columns, rows, _turned(exclusion))


class ViewsResult(NamedTuple):
    """What ``views_forward`` gives: (2N,) log-sum-exps, (N,) similarities of positives, (2N,) factors of the rows."""

    logsumexp: Tensor
    positive: Tensor
    factors: Tensor


def views_forward(features: Tensor, scale: Tensor, normalize: bool, period: int) -> ViewsResult:
    """As ``tiled.views_forward``."""
    from contrastive_mm.losses import kernels

    rows, dim = features.shape
    factors = row_factors(features, scale, normalize)
    logsumexp = self_forward(features, Exclusion(period), factors)
    pairs = rows // 2
    positive = torch.empty(pairs, dtype=torch.float32, device=features.device)
    block = 32
    arguments = (features, features[pairs:], positive, pairs, dim)
    _launch(kernels.row_dots, (-(-pairs // block),), *arguments, BLOCK=block, BLOCK_D=_block_dim(dim))
    return ViewsResult(logsumexp, positive * factors[:pairs] * factors[pairs:], factors)


def views_backward(
    features: Tensor,
    scale: Tensor,
    normalize: bool,
    period: int,
    saved: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """As ``tiled.views_backward``."""
    logsumexp, factors = saved
    radial = torch.empty(len(features), dtype=torch.float32, device=features.device)
    ends = (_finite(logsumexp), gradients[0])
    views = (factors, gradients[1], scale, normalize, radial)
    result = _backward(features, features, ends, ends, Exclusion(period), views)
    return result, (radial.sum() / (2 * scale)).reshape(1)


def _online(
    x: Tensor,
    y: Tensor,
    exclusion: Exclusion,
    expectation: bool,
    x_factors: Tensor | None = None,
    y_factors: Tensor | None = None,
    bound: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(N,) log-sum-exps and (N, D) expected columns or empty; with ``bound`` only where it is above the limit."""
    from contrastive_mm.losses import kernels

    exclusion = _with_plain_ids(exclusion)
    sizes = _sizes(x)
    blocks = -(-len(x) // sizes.rows)
    parts, part = _parts(blocks, len(y), sizes)
    logsumexps = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
    expected = logsumexps.new_empty((parts, len(x), x.shape[1]) if expectation else (0,))
    _launch(
        kernels.online_forward,
        (blocks, parts),
        x,
        y,
        x_factors,
        y_factors,
        exclusion.row_ids,
        exclusion.column_ids,
        bound,
        logsumexps,
        expected,
        len(x),
        len(y),
        x.shape[1],
        exclusion.period,
        exclusion.shift,
        part,
        LIMIT=LARGEST_EXPONENT,
        SKIP_BELOW_LIMIT=bound is not None,
        EXPECTATION=expectation,
        BLOCK_X=sizes.rows,
        BLOCK_Y=sizes.columns,
        **_options(x, exclusion, x_factors, sizes),
    )
    total = logsumexps.logsumexp(0)
    if not expectation:
        return total, expected.reshape(0, x.shape[1])
    shares = (logsumexps - _finite(total)).exp_()
    return total, (expected * shares[..., None]).sum(0)


def _backward(
    x: Tensor,
    y: Tensor,
    over_columns: tuple[Tensor, Tensor] | None,
    over_rows: tuple[Tensor, Tensor] | None,
    exclusion: Exclusion,
    views: tuple[Tensor, Tensor, Tensor, bool, Tensor] | None = None,
) -> Tensor:
    """(N, D) gradient of x: of its own log-sum-exps over y, and of those of y over x."""
    from contrastive_mm.losses import kernels

    x, y, exclusion = x.contiguous(), y.contiguous(), _with_plain_ids(exclusion)
    factors, pair_gradients, scale, normalized, radial = views or (None, None, None, False, None)
    sizes = _sizes(x)
    blocks = -(-len(x) // sizes.rows)
    # The way through the factors needs a row's whole gradient.
    parts, part = _parts(blocks, len(y), sizes) if views is None else (1, len(y))
    result = torch.empty(parts, *x.shape, dtype=torch.float32 if parts > 1 else x.dtype, device=x.device)
    row_ends, row_gradients = over_columns or (None, None)
    column_ends, column_gradients = over_rows or (None, None)
    _launch(
        kernels.rows_backward,
        (blocks, parts),
        x,
        y,
        factors,
        factors,
        exclusion.row_ids,
        exclusion.column_ids,
        row_ends,
        row_gradients,
        column_ends,
        column_gradients,
        pair_gradients,
        scale,
        result,
        radial,
        len(x),
        len(y),
        x.shape[1],
        exclusion.period,
        exclusion.shift,
        part,
        len(x) // 2,
        OVER_COLUMNS=over_columns is not None,
        OVER_ROWS=over_rows is not None,
        VIEWS=views is not None,
        NORMALIZED=normalized,
        BLOCK_X=sizes.rows,
        BLOCK_Y=sizes.columns,
        **_options(x, exclusion, factors, sizes),
    )
    return result.sum(0).to(x.dtype) if parts > 1 else result[0]


def _launch(kernel: Any, grid: tuple[int, ...], features: Tensor, *arguments: Any, **options: Any) -> None:
    # Triton launches on the current device, which need not be that of the features.
    with torch.cuda.device(features.device) if features.is_cuda else contextlib.nullcontext():
        kernel[grid](features, *arguments, **options)


def _parts(blocks: int, columns: int, sizes: _Sizes) -> tuple[int, int]:
    """Over how many programs the columns of a block of rows are spread, and how many columns each takes."""
    # Two programs for each of about 128 multiprocessors, where there are rows for so many.
    wanted = max(1, min(PARTS, 256 // blocks, columns // (4 * sizes.columns)))
    part = -(-columns // (wanted * sizes.columns)) * sizes.columns
    return -(-columns // part), part


def _sizes(features: Tensor) -> _Sizes:
    # The largest that the compiler fits into registers, on Ampere and on Hopper; see tests/test_fused.py.
    if features.dtype == torch.float32:
        return _Sizes(32, 32, 8, 2) if torch.get_float32_matmul_precision() == "highest" else _Sizes(64, 32, 4, 2)
    return _Sizes(64, 64, 8, 2) if features.shape[1] > 128 else _Sizes(128, 64, 8, 3)


def _block_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _options(features: Tensor, exclusion: Exclusion, factors: Tensor | None, sizes: _Sizes) -> dict[str, Any]:
    return {
        "HAS_FACTORS": factors is not None,
        "HAS_PERIOD": exclusion.period > 0,
        "HAS_IDS": exclusion.row_ids is not None and exclusion.column_ids is not None,
        "WIDE": is_interpreted(),
        "PRECISION": PRECISIONS[torch.get_float32_matmul_precision()],
        "BLOCK_D": _block_dim(features.shape[1]),
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
    }


def _with_plain_ids(exclusion: Exclusion) -> Exclusion:
    """Numbers one behind the other, as the kernels read them, and all of one type."""
    ids = (None if each is None else each.long().contiguous() for each in (exclusion.row_ids, exclusion.column_ids))
    return Exclusion(exclusion.period, exclusion.shift, *ids)


def _turned(exclusion: Exclusion) -> Exclusion:
    """The same pairs with rows and columns in each other's place."""
    return Exclusion(exclusion.period, -exclusion.shift, exclusion.column_ids, exclusion.row_ids)


def _finite(logsumexp: Tensor) -> Tensor:
    return logsumexp.masked_fill(logsumexp == -math.inf, 0.0)
