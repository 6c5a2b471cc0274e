"""What every loss asks of its input, and how it answers what doesn't fit."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_mm.errors import NotFiniteError, UserError


def check_pair(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Two matrices of the same shape with rows that belong together.

    Raises:
        UserError: shapes differ, or either fails ``check_features``.
    """
    if first.shape != second.shape:
        raise UserError(
            f"`{first_name}` has shape {tuple(first.shape)} and `{second_name}` {tuple(second.shape)}; "
            "they need the same number of rows and dimensions, row i with row i."
        )
    check_features(first, first_name)
    check_features(second, second_name)
    if (first.dtype == torch.float64) != (second.dtype == torch.float64):
        raise UserError(
            f"`{first_name}` holds {first.dtype} and `{second_name}` {second.dtype}: cast one of them, as float64 is "
            "computed in float64."
        )


def check_features(features: Tensor, name: str) -> None:
    """A matrix of finite floating-point features with at least one row.

    On a GPU the values are not looked at: it would wait for the device at every step, and a loss of NaN tells
    the trainer soon enough.

    Raises:
        UserError: another number of axes, no rows, or integers.
        NotFiniteError: a value that is NaN or infinite.
    """
    if features.ndim != 2:
        raise UserError(f"`{name}` has shape {tuple(features.shape)}; features are a matrix of (rows, dimensions).")
    if features.shape[0] == 0:
        raise UserError(f"`{name}` has no rows.")
    if not features.is_floating_point():
        raise UserError(f"`{name}` holds {features.dtype}; features must be floating point: call .float().")
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # One sum instead of a mask over all values: where it is finite, all of them are.
    if torch.isfinite(features.detach().sum()):
        return
    bad = (~torch.isfinite(features.detach())).any(dim=1).nonzero().flatten().tolist()
    if bad:  # otherwise only the sum was too large
        rows = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise NotFiniteError(
            f"`{name}` holds NaN or infinity in {len(bad)} of {len(features)} rows (row {rows}): the encoder's "
            "output is broken before the loss; lower the learning rate, clip gradients, or look for a division by 0."
        )


def check_columns(features: Tensor, name: str, query: Tensor, query_name: str) -> None:
    """Features that ``query`` can be compared with.

    Raises:
        UserError: another number of dimensions, or as ``check_features``.
    """
    if features.ndim == 2 and features.shape[1] != query.shape[1]:
        raise UserError(
            f"`{name}` has {features.shape[1]} dimensions, but `{query_name}` has {query.shape[1]}; "
            "features are compared in one space."
        )
    if features.shape[0] > 0:
        check_features(features, name)


def check_ids(ids: Tensor, name: str, rows: int, rows_name: str) -> None:
    """One whole number a row.

    Raises:
        UserError: another shape, or floating point.
    """
    if ids.shape != (rows,):
        raise UserError(
            f"`{name}` has shape {tuple(ids.shape)}, but `{rows_name}` has {rows} rows: give one number a row."
        )
    if ids.is_floating_point() or ids.is_complex():
        raise UserError(f"`{name}` holds {ids.dtype}; it names classes or samples and must be whole numbers.")
