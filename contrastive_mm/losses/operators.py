"""The log-sum-exps as differentiable operations, computed by the tiled or the fused form."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.losses import availability, fused, tiled
from contrastive_mm.losses.exclusion import Exclusion
from contrastive_mm.losses.operation import Operation


def engine(form: str, features: Tensor) -> ModuleType:
    """The module that computes: ``fused`` where asked for, or by itself on a GPU that it fits; else ``tiled``.

    Raises:
        UserError: ``fused`` is asked for and doesn't fit.
    """
    if form == "fused":
        if not availability.fits(features):
            limits = ", ".join(f"{str(dtype)[6:]} up to D = {dim}" for dtype, dim in availability.LARGEST_DIM.items())
            raise UserError(
                f"The fused form takes {limits} on an NVIDIA GPU of the Ampere generation or later, "
                f"with Triton installed; these are {features.dtype} of D = {features.shape[1]} on {features.device} "
                "(in half precision only nt_xent and dcl hand them over as they are). "
                "Leave the form to 'auto', or take 'tiled'."
            )
        return fused
    if form == "auto" and features.is_cuda and availability.fits(features):
        return fused if availability.is_trusted(features.device, features.dtype, features.shape[1]) else tiled
    return tiled


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _self(features: Tensor, period: int, ids: Tensor | None, form: str) -> Tensor:
    result: Tensor = engine(form, features).self_forward(features, Exclusion(period, 0, ids, ids))
    return result


def _self_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.period, ids, ctx.form = inputs
    ctx.save_for_backward(features, output, ids)


def _self_derivative(ctx: Any, call: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, logsumexp, ids = ctx.saved_tensors
    by_features = call(_self_backward, features, logsumexp, gradient.contiguous(), ctx.period, ids, ctx.form)
    return by_features, None, None, None


def _self_gradient(
    features: Tensor, logsumexp: Tensor, gradient: Tensor, period: int, ids: Tensor | None, form: str
) -> Tensor:
    exclusion = Exclusion(period, 0, ids, ids)
    result: Tensor = engine(form, features).self_backward(features, logsumexp, gradient, exclusion)
    return result


_self_backward = Operation(
    "self_logsumexp_backward",
    "(Tensor features, Tensor logsumexp, Tensor gradient, int period, Tensor? ids, str form) -> Tensor",
    _self_gradient,
    lambda features, *rest: _empty(features),
)

self_logsumexp = Operation(
    "self_logsumexp",
    "(Tensor features, int period, Tensor? ids, str form) -> Tensor",
    _self,
    lambda features, period, ids, form: features.new_empty(features.shape[0]),
    _self_save,
    _self_derivative,
)
"""(features, period, ids, form) -> (M,); see ``logsumexp.self_logsumexp``."""


def _cross(
    query: Tensor,
    key: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    period: int,
    shift: int,
    columns: bool,
    expectation: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    exclusion = Exclusion(period, shift, query_ids, key_ids)
    result: tuple[Tensor, Tensor, Tensor] = engine(form, query).cross_forward(
        query, key, exclusion, columns, expectation
    )
    return result


def _cross_allocate(
    query: Tensor, key: Tensor, query_ids: Any, key_ids: Any, period: int, shift: int, columns: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    expectation = rest[0]
    return (
        query.new_empty(query.shape[0]),
        query.new_empty(key.shape[0] if columns else 0),
        query.new_empty(query.shape[0] if expectation else 0, query.shape[1]),
    )


def _cross_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, query_ids, key_ids, ctx.period, ctx.shift, ctx.columns, ctx.expectation, ctx.form = inputs
    ctx.mark_non_differentiable(output[2])
    if ctx.expectation:
        ctx.save_for_backward(query, output[2])
    else:
        ctx.save_for_backward(query, key, output[0], output[1], query_ids, key_ids)


def _cross_derivative(
    ctx: Any, call: Any, by_rows: Tensor, by_columns: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    if ctx.expectation:
        query, expected = ctx.saved_tensors
        return call(_expectation_backward, by_rows, query, expected), *[None] * 8
    query, key, over_keys, over_queries, query_ids, key_ids = ctx.saved_tensors
    back = (over_queries, by_columns.contiguous()) if ctx.columns else (None, None)
    pairs = (query_ids, key_ids, ctx.period, ctx.shift, ctx.form)
    gradients = call(_cross_backward, query, key, over_keys, by_rows.contiguous(), *back, *pairs)
    return *gradients, *[None] * 7


_expectation_backward = Operation(
    "expectation_backward",
    "(Tensor gradient, Tensor query, Tensor expected) -> Tensor",
    # The query stands among the inputs so that a second derivative by it is refused.
    lambda gradient, query, expected: gradient[:, None] * expected,
    lambda gradient, query, expected: torch.empty_like(expected),
)


def _cross_gradient(
    query: Tensor,
    key: Tensor,
    over_keys: Tensor,
    keys_gradient: Tensor,
    over_queries: Tensor | None,
    queries_gradient: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    period: int,
    shift: int,
    form: str,
) -> tuple[Tensor, Tensor]:
    exclusion = Exclusion(period, shift, query_ids, key_ids)
    back = None if over_queries is None or queries_gradient is None else (over_queries, queries_gradient)
    result: tuple[Tensor, Tensor] = engine(form, query).cross_backward(
        query, key, (over_keys, keys_gradient), back, exclusion
    )
    return result


_cross_backward = Operation(
    "cross_logsumexp_backward",
    "(Tensor query, Tensor key, Tensor over_keys, Tensor keys_gradient, Tensor? over_queries, "
    "Tensor? queries_gradient, Tensor? query_ids, Tensor? key_ids, int period, int shift, str form) "
    "-> (Tensor, Tensor)",
    _cross_gradient,
    lambda query, key, *rest: (_empty(query), _empty(key)),
)

cross_logsumexp = Operation(
    "cross_logsumexp",
    "(Tensor query, Tensor key, Tensor? query_ids, Tensor? key_ids, int period, int shift, bool columns, "
    "bool expectation, str form) -> (Tensor, Tensor, Tensor)",
    _cross,
    _cross_allocate,
    _cross_save,
    _cross_derivative,
)
"""See ``logsumexp.cross_logsumexp``; gives (N,), (K,) or empty, and the expected keys (N, D) or empty."""


def _views(features: Tensor, scale: Tensor, normalize: bool, period: int, form: str) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = engine(form, features).views_forward(features, scale, normalize, period)
    return result


def _views_allocate(
    features: Tensor, scale: Tensor, normalize: bool, period: int, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = features.shape[0]
    return scale.new_empty(rows), scale.new_empty(rows // 2), scale.new_empty(rows)


def _views_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, scale, ctx.normalize, ctx.period, ctx.form = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(features, scale, output[0], output[2])


def _views_derivative(ctx: Any, call: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    by_logsumexp, by_positive = (gradient.contiguous() for gradient in gradients[:2])
    features, scale, logsumexp, factors = ctx.saved_tensors
    options = (ctx.normalize, ctx.period, ctx.form)
    found = call(_views_backward, features, scale, logsumexp, factors, by_logsumexp, by_positive, *options)
    return *found, None, None, None


def _views_gradient(
    features: Tensor,
    scale: Tensor,
    logsumexp: Tensor,
    factors: Tensor,
    by_logsumexp: Tensor,
    by_positive: Tensor,
    normalize: bool,
    period: int,
    form: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = engine(form, features).views_backward(
        features, scale, normalize, period, (logsumexp, factors), (by_logsumexp, by_positive)
    )
    return result


_views_backward = Operation(
    "views_logsumexp_backward",
    "(Tensor features, Tensor scale, Tensor logsumexp, Tensor factors, Tensor by_logsumexp, Tensor by_positive, "
    "bool normalize, int period, str form) -> (Tensor, Tensor)",
    _views_gradient,
    lambda features, scale, *rest: (_empty(features), torch.empty_like(scale)),
)

views_logsumexp = Operation(
    "views_logsumexp",
    "(Tensor features, Tensor scale, bool normalize, int period, str form) -> (Tensor, Tensor, Tensor)",
    _views,
    _views_allocate,
    _views_save,
    _views_derivative,
)
"""See ``logsumexp.views_logsumexp``; gives (2N,), (N,), and the rows' factors (2N,) without gradient."""
