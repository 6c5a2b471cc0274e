"""Moments of features over the batch of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_mm.distributed import all_reduce_sum, process_count, row_counts
from contrastive_mm.errors import UserError


def check_several_rows(rows: int, name: str, loss: str) -> None:
    """At least two samples, here or in other processes.

    Raises:
        UserError: there is one.
    """
    if rows < 2 and process_count() == 1:
        raise UserError(f"{loss} needs at least 2 samples: `{name}` has 1, and compares with nothing.")


def total_rows(features: Tensor) -> Tensor:
    """Rows in all processes, a scalar in the type of ``features``; processes may have different numbers of them."""
    return torch.full((), sum(row_counts(features)), dtype=features.dtype, device=features.device)


def centred(features: Tensor, rows: Tensor) -> Tensor:
    """Features less their mean over all processes."""
    return features - all_reduce_sum(features.sum(0)) / rows


def off_diagonal(matrix: Tensor) -> Tensor:
    """The matrix with zeros on its diagonal."""
    return matrix - torch.diag_embed(matrix.diagonal())
