"""Log-sum-exps over the samples that do not belong with a row, whatever relation says which do."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrastive_mm.errors import UserError
from contrastive_mm.positives import Positives

BLOCK_ROWS = 256


def unrelated_logsumexp(
    rows: Float[Tensor, "own dim"],
    columns: Float[Tensor, "columns dim"],
    count: int,
    positives: Positives,
) -> Float[Tensor, " own"]:
    """For each own row, log of the sum of exp(x . y) over the columns of samples that it does not belong with.

    In blocks of rows, whose dot products are computed anew in the backward pass: memory is that of one block.

    Args:
        rows: (n, D) prepared features, one a sample.
        columns: (V N, D) prepared features of the same type: V views of all N samples, below each other.
        count: N.
        positives: which samples belong with a row, apart from its own, which is always left out.

    Raises:
        UserError: a row belongs with all samples (looked at on the CPU only).
    """
    starts = range(0, len(rows), BLOCK_ROWS)
    blocks = zip(starts, rows.split(BLOCK_ROWS), strict=True)
    result = torch.cat(
        [
            checkpoint(_block, part, columns, count, positives, start, use_reentrant=False, preserve_rng_state=False)
            for start, part in blocks
        ]
    )
    if result.device.type == "cpu" and not torch.compiler.is_compiling() and bool(result.isneginf().any()):
        row = int(result.isneginf().nonzero()[0])
        raise UserError(
            f"Positives leave no negative to row {row}: all samples of the batch belong with it. Draw batches of "
            "samples that differ more, or take nt_xent, whose candidates are all views."
        )
    return result


def _block(rows: Tensor, columns: Tensor, count: int, positives: Positives, start: int) -> Tensor:
    left_out = positives.belonging(start, start + len(rows), columns[:count])
    left_out.diagonal((positives.own.start or 0) + start).fill_(True)
    return (rows @ columns.T).masked_fill(left_out.repeat(1, len(columns) // count), -torch.inf).logsumexp(1)
