"""Which pairs are not compared: a row with itself, views of one sample, samples known to be alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exclusion:
    """Pairs (row, column) that a log-sum-exp leaves out.

    Attributes:
        period: leaves out pairs whose column is the row, or the row and a multiple of it: with as many rows as
            ``period`` each row's pair with itself, with V views of N samples below each other and a period of N all
            views of a sample. 0 leaves out none.
        shift: added to the row: the column at which row 0 finds itself, where rows are a part of the columns.
        row_ids: (N,) numbers; with ``column_ids``, pairs of equal numbers are left out.
        column_ids: (K,) numbers.
    """

    period: int = 0
    shift: int = 0
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None

    def fill_(self, tile: Tensor, rows: tuple[int, int], columns: tuple[int, int], value: float) -> None:
        """Write ``value`` on the left-out pairs of a tile that holds these rows and columns."""
        if self.period:
            # Pairs with column - row = shift + k * period lie on diagonals; a tile meets few of them, most tiles none.
            begin = columns[0] - rows[0]
            low, high = begin - (rows[1] - rows[0] - 1), begin + (columns[1] - columns[0] - 1)
            first = low + (self.shift - low) % self.period
            for distance in range(first, high + 1, self.period):
                torch.diagonal(tile, offset=distance - begin).fill_(value)
        if self.row_ids is not None and self.column_ids is not None:
            same = self.row_ids[slice(*rows), None] == self.column_ids[None, slice(*columns)]
            tile.masked_fill_(same, value)
