"""The tiled log-sum-exps as differentiable operations: autograd functions, and operators for the compiler.

torch.compile takes a custom operator as one node, without looking inside; outside of it the first custom operator that
runs loads the whole compiler, which costs a second and 150 MiB. So each operation is both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.losses import tiled
from contrastive_mm.losses.exclusion import Exclusion


def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> Any:
    """The backward pass of a backward pass.

    Raises:
        UserError: always; the message names the form that can.
    """
    raise UserError(
        "This loss can't be differentiated twice in its tiled form; put `with losses.use_form('plain'):` around it."
    )


class SelfLogsumexp(torch.autograd.Function):
    """(features, period, ids) -> (M,); see ``logsumexp.self_logsumexp``."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, period: int, ids: Tensor | None) -> Tensor:
        """Half of the tiles."""
        result = tiled.self_forward(features, Exclusion(period, 0, ids, ids))
        _save_self(ctx, (features, period, ids), result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Half of the tiles again."""
        features, logsumexp, ids = ctx.saved_tensors
        result: Tensor = _SelfBackward.apply(features, logsumexp, gradient.contiguous(), ctx.period, ids)
        return result, None, None


class _SelfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, logsumexp: Tensor, gradient: Tensor, period: int, ids: Any) -> Tensor:
        return tiled.self_backward(features, logsumexp, gradient, Exclusion(period, 0, ids, ids))

    backward = staticmethod(refuse_second_derivative)


class CrossLogsumexp(torch.autograd.Function):
    """See ``logsumexp.cross_logsumexp``; gives (N,), (K,) or empty, and the expected keys (N, D) or empty."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        period: int,
        shift: int,
        columns: bool,
        expectation: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tiles, once."""
        exclusion = Exclusion(period, shift, query_ids, key_ids)
        result = tiled.cross_forward(query, key, exclusion, columns, expectation)
        _save_cross(ctx, (query, key, query_ids, key_ids, period, shift, columns, expectation), result)
        return result

    @staticmethod
    def backward(ctx: Any, by_rows: Tensor, by_columns: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """All tiles again, or none where the forward pass kept the expected keys."""
        return _cross_gradients(ctx, by_rows, by_columns, _CrossBackward.apply)


class _CrossBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> tuple[Tensor, Tensor]:
        exclusion = Exclusion(period, shift, query_ids, key_ids)
        back = None if over_queries is None or queries_gradient is None else (over_queries, queries_gradient)
        return tiled.cross_backward(query, key, (over_keys, keys_gradient), back, exclusion)

    backward = staticmethod(refuse_second_derivative)


def _save_self(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.period, ids = inputs
    ctx.save_for_backward(features, output, ids)


def _save_cross(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, query_ids, key_ids, ctx.period, ctx.shift, ctx.columns, ctx.expectation = inputs
    ctx.mark_non_differentiable(output[2])
    if ctx.expectation:
        ctx.save_for_backward(output[2])
    else:
        ctx.save_for_backward(query, key, output[0], output[1], query_ids, key_ids)


def _cross_gradients(ctx: Any, by_rows: Tensor, by_columns: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    if ctx.expectation:
        (expected,) = ctx.saved_tensors
        return by_rows[:, None] * expected, *[None] * 7
    query, key, over_keys, over_queries, query_ids, key_ids = ctx.saved_tensors
    back = (over_queries, by_columns.contiguous()) if ctx.columns else (None, None)
    pairs = (query_ids, key_ids, ctx.period, ctx.shift)
    gradients = backward(query, key, over_keys, by_rows.contiguous(), *back, *pairs)
    return *gradients, *[None] * 6


@torch.library.custom_op(
    "contrastive_mm::self_logsumexp", mutates_args=(), schema="(Tensor features, int period, Tensor? ids) -> Tensor"
)
def self_logsumexp(features: Tensor, period: int, ids: Tensor | None) -> Tensor:
    """``SelfLogsumexp`` for the compiler."""
    return tiled.self_forward(features, Exclusion(period, 0, ids, ids))


@torch.library.custom_op(
    "contrastive_mm::self_logsumexp_backward",
    mutates_args=(),
    schema="(Tensor features, Tensor logsumexp, Tensor gradient, int period, Tensor? ids) -> Tensor",
)
def _self_backward(features: Tensor, logsumexp: Tensor, gradient: Tensor, period: int, ids: Tensor | None) -> Tensor:
    return tiled.self_backward(features, logsumexp, gradient, Exclusion(period, 0, ids, ids))


@torch.library.custom_op(
    "contrastive_mm::cross_logsumexp",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? query_ids, Tensor? key_ids, int period, int shift, bool columns, "
    "bool expectation) -> (Tensor, Tensor, Tensor)",
)
def cross_logsumexp(
    query: Tensor,
    key: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    period: int,
    shift: int,
    columns: bool,
    expectation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``CrossLogsumexp`` for the compiler."""
    return tiled.cross_forward(query, key, Exclusion(period, shift, query_ids, key_ids), columns, expectation)


@torch.library.custom_op(
    "contrastive_mm::cross_logsumexp_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor over_keys, Tensor keys_gradient, Tensor? over_queries, "
    "Tensor? queries_gradient, Tensor? query_ids, Tensor? key_ids, int period, int shift) -> (Tensor, Tensor)",
)
def _cross_backward(
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
) -> tuple[Tensor, Tensor]:
    exclusion = Exclusion(period, shift, query_ids, key_ids)
    back = None if over_queries is None or queries_gradient is None else (over_queries, queries_gradient)
    return tiled.cross_backward(query, key, (over_keys, keys_gradient), back, exclusion)


@self_logsumexp.register_fake
def _(features: Tensor, period: int, ids: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0])


@_self_backward.register_fake
def _(features: Tensor, logsumexp: Tensor, gradient: Tensor, period: int, ids: Tensor | None) -> Tensor:
    return torch.empty_like(features)


@cross_logsumexp.register_fake
def _(
    query: Tensor,
    key: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    period: int,
    shift: int,
    columns: bool,
    expectation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape[0]),
        query.new_empty(key.shape[0] if columns else 0),
        query.new_empty(query.shape[0] if expectation else 0, query.shape[1]),
    )


@_cross_backward.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _differentiate_self(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    features, logsumexp, ids = ctx.saved_tensors
    return _self_backward(features, logsumexp, gradient.contiguous(), ctx.period, ids), None, None


def _differentiate_cross(ctx: Any, by_rows: Tensor, by_columns: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _cross_gradients(ctx, by_rows, by_columns, _cross_backward)


torch.library.register_autograd(self_logsumexp, _differentiate_self, setup_context=_save_self)
torch.library.register_autograd(cross_logsumexp, _differentiate_cross, setup_context=_save_cross)
torch.library.register_autograd(_self_backward, refuse_second_derivative)
torch.library.register_autograd(_cross_backward, refuse_second_derivative)
