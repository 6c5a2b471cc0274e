"""Triton kernels of the fused form: a tile of dot products lives in registers and is never written out.

Rows of both sides may be in half precision and carry a factor each in float32, so that normalised features need not
be rounded: s_ij = (x_i . y_j) a_i b_j. All sums are in float32, exponents to base 2. ``fused`` launches them.
"""

# Triton compiles these functions: types and shapes are not Python's here.

from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def _load(pointer, rows, count, dim, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    return tl.load(pointer + offsets, mask=(rows[:, None] < count) & (columns[None, :] < dim), other=0.0)


@triton.jit
@no_type_check
def _factors(pointer, rows, count, HAS_FACTORS: tl.constexpr):
    result = tl.full(rows.shape, 1.0, tl.float32)
    if HAS_FACTORS:
        result = tl.load(pointer + rows, mask=rows < count, other=0.0)
    return result


@triton.jit
@no_type_check
def _dots(x, y, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products of the rows of x and y, in float32."""
    if WIDE:  # Triton's interpreter multiplies bfloat16 wrongly
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
@no_type_check
def _weighted_sum(weights, y, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of y by weights, in float32. Those of single pairs are too small for float16, which TF32 holds exactly."""
    if WIDE:
        result = tl.dot(weights, y.to(tl.float32), input_precision=PRECISION)
    elif y.dtype == tl.float16:
        result = tl.dot(weights, y.to(tl.float32), input_precision="tf32")
    else:
        result = tl.dot(weights.to(y.dtype), y, input_precision=PRECISION)
    return result


@triton.jit
@no_type_check
def _compared(
    rows,
    columns,
    row_count,
    column_count,
    row_ids,
    column_ids,
    period,
    shift,
    HAS_PERIOD: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Which pairs of a tile count; see ``exclusion.Exclusion``."""
    result = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    if HAS_PERIOD:
        result = result & ((columns[None, :] - rows[:, None] - shift) % period != 0)
    if HAS_IDS:
        left = tl.load(row_ids + rows, mask=rows < row_count, other=0)
        right = tl.load(column_ids + columns, mask=columns < column_count, other=0)
        result = result & (left[:, None] != right[None, :])
    return result


@triton.jit
@no_type_check
def row_dots(x, y, result, count, dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """result_i = x_i . y_i, in float32."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = _load(x, rows, count, dim, BLOCK_D).to(tl.float32)
    right = _load(y, rows, count, dim, BLOCK_D).to(tl.float32)
    tl.store(result + rows, tl.sum(left * right, 1), mask=rows < count)


@triton.jit
@no_type_check
def half_forward(
    x,
    x_factors,
    ids,
    bound,
    totals,
    count,
    dim,
    period,
    group,
    LIMIT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_PERIOD: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """totals_i += sum_j exp(s_ij) over half of the tiles, as s_ij = s_ji; nothing where ``bound`` is above LIMIT.

    A program takes one block of rows and ``group`` blocks of columns. Rows are added up in registers; a column's sum
    goes to the row it is, by an atomic addition, whose order is the only thing that may differ between two runs.
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(count, BLOCK)
    begin = tl.maximum(block, tl.program_id(1) * group)
    end = tl.minimum(blocks, (tl.program_id(1) + 1) * group)
    if (begin < end) & (tl.load(bound) <= LIMIT):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        left = _load(x, rows, count, dim, BLOCK_D)
        left_factors = _factors(x_factors, rows, count, HAS_FACTORS) * LOG2_E
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(begin, end):
            columns = other * BLOCK + tl.arange(0, BLOCK)
            right = _load(x, columns, count, dim, BLOCK_D)
            right_factors = _factors(x_factors, columns, count, HAS_FACTORS)
            logits = _dots(left, right, WIDE, PRECISION) * left_factors[:, None] * right_factors[None, :]
            counts = _compared(rows, columns, count, count, ids, ids, period, 0, HAS_PERIOD, HAS_IDS)
            tile = tl.where(counts, tl.exp2(logits), 0.0)
            total += tl.sum(tile, 1)
            if other != block:
                tl.atomic_add(totals + columns, tl.sum(tile, 0), mask=columns < count, sem="relaxed")
        tl.atomic_add(totals + rows, total, mask=rows < count, sem="relaxed")


@triton.jit
@no_type_check
def online_forward(
    x,
    y,
    x_factors,
    y_factors,
    row_ids,
    column_ids,
    bound,
    logsumexps,
    expected,
    row_count,
    column_count,
    dim,
    period,
    shift,
    part,
    LIMIT: tl.constexpr,
    SKIP_BELOW_LIMIT: tl.constexpr,
    EXPECTATION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_PERIOD: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Log-sum-exp of each row over a part of the columns, with the running maximum taken off, and the expected column.

    Program (b, p) takes block b of the rows and columns p * part to (p + 1) * part, and writes row p of
    ``logsumexps`` (parts, rows) and ``expected`` (parts, rows, dim).
    """
    go = True
    if SKIP_BELOW_LIMIT:
        largest = tl.load(bound)
        go = (largest > LIMIT) | (largest != largest)  # what is not a number must come out as such
    if go:
        rows = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
        begin = tl.program_id(1) * part
        end = tl.minimum(begin + part, column_count)
        left = _load(x, rows, row_count, dim, BLOCK_D)
        left_factors = _factors(x_factors, rows, row_count, HAS_FACTORS) * LOG2_E
        maximum = tl.full([BLOCK_X], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_X], tl.float32)
        mean = tl.zeros([BLOCK_X, BLOCK_D if EXPECTATION else 1], tl.float32)
        for start in range(begin, end, BLOCK_Y):
            columns = start + tl.arange(0, BLOCK_Y)
            right = _load(y, columns, end, dim, BLOCK_D)
            right_factors = _factors(y_factors, columns, end, HAS_FACTORS)
            logits = _dots(left, right, WIDE, PRECISION) * left_factors[:, None] * right_factors[None, :]
            counts = _compared(rows, columns, row_count, end, row_ids, column_ids, period, shift, HAS_PERIOD, HAS_IDS)
            logits = tl.where(counts, logits, float("-inf"))
            higher = tl.maximum(maximum, tl.max(logits, 1))
            # Of rows that were compared with nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) is not.
            taken_off = tl.where(higher == float("-inf"), 0.0, higher)
            tile = tl.exp2(logits - taken_off[:, None])
            kept = tl.exp2(maximum - taken_off)
            total = total * kept + tl.sum(tile, 1)
            if EXPECTATION:
                mean = mean * kept[:, None] + _weighted_sum(tile * right_factors[None, :], right, WIDE, PRECISION)
            maximum = higher
        place = tl.program_id(1) * row_count + rows
        # Of rows that were compared with nothing the maximum alone is minus infinity.
        total = tl.where(total == 0, 1.0, total)
        tl.store(logsumexps + place, (maximum + tl.log2(total)) * LN_2, mask=rows < row_count)
        if EXPECTATION:
            mean = mean / total[:, None]
            dims = tl.arange(0, BLOCK_D)
            inside = (rows[:, None] < row_count) & (dims[None, :] < dim)
            tl.store(expected + place.to(tl.int64)[:, None] * dim + dims[None, :], mean, mask=inside)


@triton.jit
@no_type_check
def rows_backward(
    x,
    y,
    x_factors,
    y_factors,
    row_ids,
    column_ids,
    row_logsumexps,
    row_gradients,
    column_logsumexps,
    column_gradients,
    pair_gradients,
    scale,
    result,
    radial,
    row_count,
    column_count,
    dim,
    period,
    shift,
    part,
    pairs,
    OVER_COLUMNS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    VIEWS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_PERIOD: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of rows: sum_j (g_i exp(s_ij - lse_i) + h_j exp(s_ij - lse_j)) b_j y_j, row by row, so deterministic.

    With VIEWS the rows are raw features of ``pairs`` samples' two views, compared with each other; the gradient of a
    row's similarity with its other view is added, and the whole goes on through the factors to the features
    themselves: a_i = sqrt(scale) / |x_i| where NORMALIZED, sqrt(scale) otherwise. ``radial`` gets each row's part of
    2 scale times the gradient of ``scale``.
    """
    rows = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, column_count)
    left = _load(x, rows, row_count, dim, BLOCK_D)
    left_factors = _factors(x_factors, rows, row_count, HAS_FACTORS)
    if OVER_COLUMNS:
        row_ends = tl.load(row_logsumexps + rows, mask=rows < row_count, other=0.0) * LOG2_E
        row_weights = tl.load(row_gradients + rows, mask=rows < row_count, other=0.0)
    gradient = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_Y):
        columns = start + tl.arange(0, BLOCK_Y)
        right = _load(y, columns, end, dim, BLOCK_D)
        right_factors = _factors(y_factors, columns, end, HAS_FACTORS)
        logits = _dots(left, right, WIDE, PRECISION) * (left_factors * LOG2_E)[:, None] * right_factors[None, :]
        counts = _compared(rows, columns, row_count, end, row_ids, column_ids, period, shift, HAS_PERIOD, HAS_IDS)
        logits = tl.where(counts, logits, float("-inf"))
        weights = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        if OVER_COLUMNS:
            weights += tl.exp2(logits - row_ends[:, None]) * row_weights[:, None]
        if OVER_ROWS:
            ends = tl.load(column_logsumexps + columns, mask=columns < end, other=0.0) * LOG2_E
            column_weights = tl.load(column_gradients + columns, mask=columns < end, other=0.0)
            weights += tl.exp2(logits - ends[None, :]) * column_weights[None, :]
        gradient += _weighted_sum(weights * right_factors[None, :], right, WIDE, PRECISION)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < row_count) & (dims[None, :] < dim)
    if VIEWS:
        partners = tl.where(rows < pairs, rows + pairs, rows - pairs)
        other = _load(y, partners, column_count, dim, BLOCK_D).to(tl.float32)
        other_factors = _factors(y_factors, partners, column_count, HAS_FACTORS)
        pair = tl.load(pair_gradients + rows % pairs, mask=rows < row_count, other=0.0)
        gradient += (pair * other_factors)[:, None] * other
        prepared = left.to(tl.float32) * left_factors[:, None]
        along = tl.sum(gradient * prepared, 1)
        tl.store(radial + rows, along, mask=rows < row_count)
        if NORMALIZED:
            gradient -= prepared * (along / tl.load(scale))[:, None]
        gradient *= left_factors[:, None]
    place = (tl.program_id(1) * row_count + rows).to(tl.int64)
    tl.store(result + place[:, None] * dim + dims[None, :], gradient.to(result.dtype.element_ty), mask=inside)
