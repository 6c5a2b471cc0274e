"""The one hard part of contrastive losses: log-sum-exps of dot products over a whole batch, exactly.

Every InfoNCE-type loss is a log-sum-exp over candidates less the similarity of positives. The second part costs
O(N D); these functions make the first part cost O(N D) memory too, whatever the number of candidates. They take
prepared features (normalised, multiplied by 1/T) and compose: gradients of the temperature, several sources of
candidates (``torch.logaddexp``), weights and masks need no kernel of their own.

Three forms give the same values. ``plain`` holds the matrix of dot products; it is the readable oracle, can be
differentiated twice, and is taken where the matrix is no larger than one tile (``PLAIN_ELEMENTS``). ``fused`` is taken
on NVIDIA GPUs for up to 256 dimensions (128 in float32): Triton kernels, tried on a small example first. ``tiled`` is
taken for everything else, and runs on any device. ``use_form`` chooses by hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.losses import operators
from contrastive_mm.losses.exclusion import Exclusion
from contrastive_mm.losses.similarity import unit_rows, widen

FORMS = ("auto", "plain", "tiled", "fused")

PLAIN_ELEMENTS = 256 * 256
"""Up to this many dot products the plain form is as fast as a single tile."""

# A plain variable: the compiler of torch 2.6 can't look into a ContextVar, and compiles anew when this one changes.
_form = "auto"


@contextlib.contextmanager
def use_form(form: str) -> Iterator[None]:
    """Choose how log-sum-exps are computed inside a ``with`` block, by all threads; the values are the same.

    Args:
        form: ``auto``, ``plain`` (holds the matrix, can be differentiated twice), ``tiled`` or ``fused``.

    Raises:
        UserError: an unknown form; or, from a loss inside, ``fused`` without a GPU that it runs on.
    """
    if form not in FORMS:
        raise UserError(f"form = {form!r}; it must be one of {', '.join(FORMS)}.")
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


def chosen_form() -> str:
    """The form that ``use_form`` has chosen."""
    return _form


def is_plain(elements: int) -> bool:
    """Whether so many dot products are to be held at once."""
    form = _form
    return form == "plain" or (form == "auto" and elements <= PLAIN_ELEMENTS)


def self_logsumexp(
    features: Float[Tensor, "rows dim"], period: int | None = None, ids: Int[Tensor, " rows"] | None = None
) -> Float[Tensor, " rows"]:
    """For each row i, log of the sum over the other rows j of exp(x_i . x_j).

    Args:
        features: (M, D) prepared features, float32 or float64.
        period: pairs whose row numbers differ by a multiple of it are left out; M by default, which leaves out a
            row's pair with itself. N for V views of N samples leaves out all views of the same sample.
        ids: (M,) numbers; pairs of equal numbers are left out too, such as samples of one class.

    Returns:
        (M,) in the type of ``features``; minus infinity for a row that is left with no pair.

    Raises:
        UserError: features of another type.
    """
    _check_type(features)
    period = len(features) if period is None else period
    if is_plain(len(features) ** 2):
        return _plain(features, features, Exclusion(period, 0, ids, ids)).logsumexp(1)
    result: Tensor = operators.self_logsumexp(features, period, ids, _form)
    return result


def views_logsumexp(
    features: Float[Tensor, "rows dim"],
    scale: Float[Tensor, "1"],
    normalize: bool = True,
    period: int | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " pairs"]]:
    """Both terms of NT-Xent, from features of any type as they are: nothing but their gradient is held beside them.

    Args:
        features: (2N, D) the first views of N samples, below them the second views in the same order.
        scale: (1,) 1/T; float64 for float64 features, else float32. It receives its gradient.
        normalize: compare by cosine; otherwise by dot product.
        period: as in ``self_logsumexp``.

    Returns:
        ``self_logsumexp`` of the prepared rows (2N,), and the similarity over T of each sample's two views (N,).
    """
    period = len(features) if period is None else period
    if is_plain(len(features) ** 2):
        wide = widen(features)
        prepared = (unit_rows(wide) if normalize else wide) * scale.sqrt()
        first, second = prepared.chunk(2)
        return self_logsumexp(prepared, period), (first * second).sum(1)
    logsumexp, positive, _ = operators.views_logsumexp(features, scale, normalize, period, _form)
    return logsumexp, positive


def cross_logsumexp(
    query: Float[Tensor, "queries dim"],
    key: Float[Tensor, "keys dim"],
    query_ids: Int[Tensor, " queries"] | None = None,
    key_ids: Int[Tensor, " keys"] | None = None,
    period: int = 0,
    shift: int = 0,
) -> Float[Tensor, " queries"]:
    """For each query, log of the sum over the keys of exp(q . k).

    Keys that want no gradient (a queue) cost one pass: it gives the log-sum-exp and the expected key together, and
    the expected key is the query's gradient.

    Args:
        query: (N, D) prepared features, float32 or float64.
        key: (K, D) prepared features of the same type; with K = 0 the result is minus infinity.
        query_ids: (N,) numbers; with ``key_ids``, pairs of equal numbers are left out.
        key_ids: (K,) numbers.
        period: pairs with key - query = shift + a multiple of it are left out; 0 leaves out none.
        shift: the key that is query 0 itself, where the queries are a part of the keys.

    Returns:
        (N,); minus infinity for a query that is left with no key.
    """
    _check_type(query)
    if len(key) == 0:
        return query.new_full((len(query),), -math.inf)
    if is_plain(len(query) * len(key)):
        return _plain(query, key, Exclusion(period, shift, query_ids, key_ids)).logsumexp(1)
    expectation = torch.is_grad_enabled() and query.requires_grad and not key.requires_grad
    return _cross(query, key, query_ids, key_ids, period, shift, False, expectation)[0]


def two_way_logsumexp(
    first: Float[Tensor, "rows dim"],
    second: Float[Tensor, "columns dim"],
    first_ids: Int[Tensor, " rows"] | None = None,
    second_ids: Int[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Both directions of ``cross_logsumexp`` from one matrix of dot products.

    Returns:
        (N,) over the columns, and (K,) over the rows.
    """
    _check_type(first)
    if is_plain(len(first) * len(second)):
        logits = _plain(first, second, Exclusion(0, 0, first_ids, second_ids))
        return logits.logsumexp(1), logits.logsumexp(0)
    rows, columns, _ = _cross(first, second, first_ids, second_ids, 0, 0, True, False)
    return rows, columns


def _check_type(features: Tensor) -> None:
    if features.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"Prepared features hold {features.dtype}; log-sum-exps need float32 or float64: .float() them."
        )


def _cross(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = operators.cross_logsumexp(*arguments, _form)
    return result


def _plain(query: Tensor, key: Tensor, exclusion: Exclusion) -> Tensor:
    logits = query @ key.T
    exclusion.fill_(logits, (0, len(query)), (0, len(key)), -math.inf)
    return logits
