"""Which samples belong together: one value that every InfoNCE-type loss takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError

PER_SAMPLE = ("ids", "partner", "share", "times")


@dataclass(frozen=True)
class Positives:
    """How much each key j is a positive of query i: weights W (N, N), seldom held as a matrix.

    Without any field, W is the identity: row i belongs with row i. Make the other kinds with the functions below,
    which say what they need. A loss divides each row of W by its sum, so only the proportions count.

    Attributes:
        ids: (N,) whole numbers; W is 1 between rows of the same number (classes, near-duplicates, episodes).
        matrix: (N, N) weights of at least 0, or booleans.
        partner: (N,) row with which row i was mixed (Mixup, CutMix), with ``share``.
        share: (N,) weight of row i itself, 0 to 1; its partner has the rest (i-Mix, Lee et al. 2021, equation 3).
        times: (N,) floats; W is 1 between rows at most ``window`` apart, of the same ``ids`` where those are given.
        window: see ``times``.
    """

    ids: Int[Tensor, " rows"] | None = None
    matrix: Float[Tensor, "rows rows"] | Bool[Tensor, "rows rows"] | None = None
    partner: Int[Tensor, " rows"] | None = None
    share: Float[Tensor, " rows"] | None = None
    times: Float[Tensor, " rows"] | None = None
    window: float = 0.0

    @classmethod
    def of_groups(cls, ids: Int[Tensor, " rows"]) -> Positives:
        """Rows of the same number belong together."""
        return cls(ids=ids)

    @classmethod
    def weighted(cls, matrix: Float[Tensor, "rows rows"] | Bool[Tensor, "rows rows"]) -> Positives:
        """Weights given one by one; the matrix is the caller's, and is not copied."""
        return cls(matrix=matrix)

    @classmethod
    def mixed(cls, partner: Int[Tensor, " rows"], share: Float[Tensor, " rows"]) -> Positives:
        """Row i was mixed from its own sample (``share``) and its partner's (the rest)."""
        return cls(partner=partner, share=share)

    @classmethod
    def within(
        cls, times: Float[Tensor, " rows"], window: float, ids: Int[Tensor, " rows"] | None = None
    ) -> Positives:
        """Rows at most ``window`` apart in time belong together, inside their episode ``ids`` where given."""
        return cls(times=times, window=window, ids=ids)

    def check(self, rows: int) -> None:
        """Make sure that the value fits a batch.

        Raises:
            UserError: a field has another number of rows, or only one of ``partner`` and ``share`` is given.
        """
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise UserError(f"Positives.{name} has shape {tuple(value.shape)}, but the batch has {rows} rows.")
        if self.matrix is not None and self.matrix.shape != (rows, rows):
            raise UserError(
                f"Positives.matrix has shape {tuple(self.matrix.shape)}, but a batch of {rows} rows needs "
                f"({rows}, {rows})."
            )
        if (self.partner is None) != (self.share is None):
            raise UserError("Positives.partner and Positives.share go together: give both.")

    def weighted_sum(self, keys: Float[Tensor, "rows dim"], transposed: bool = False) -> Float[Tensor, "rows dim"]:
        """W keys, or its transpose times keys, in O(N D) but for a given matrix. Differentiable."""
        if self.matrix is not None:
            weights = self.matrix.to(keys)
            return (weights.T if transposed else weights) @ keys
        if self.partner is not None and self.share is not None:
            share = self.share.to(keys)[:, None]
            if transposed:
                return (share * keys).index_add(0, self.partner, (1 - share) * keys)
            return share * keys + (1 - share) * keys[self.partner]
        if self.times is not None:
            return self._window_sum(keys)
        if self.ids is not None:
            _, place = self.ids.unique(return_inverse=True)
            return keys.new_zeros(len(keys), keys.shape[1]).index_add(0, place, keys)[place]
        return keys

    def totals(self, like: Float[Tensor, "rows dim"], transposed: bool = False) -> Float[Tensor, " rows"]:
        """Sum of each row of W (of each column where transposed), in the type of ``like``."""
        return self.weighted_sum(torch.ones_like(like[:, :1]), transposed)[:, 0]

    def own(self, like: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
        """The diagonal of W, in the type of ``like``."""
        if self.matrix is not None:
            return self.matrix.diagonal().to(like)
        if self.partner is not None and self.share is not None:
            itself = self.partner == torch.arange(len(like), device=like.device)
            return torch.where(itself, 1.0, self.share.to(like))
        return like.new_ones(len(like))

    def _window_sum(self, keys: Tensor) -> Tensor:
        """Sums over windows of time as differences of running sums, in float64 so that little cancels."""
        assert self.times is not None
        times = self.times.double()
        if self.ids is not None:
            # Episodes one behind the other, further apart than any window reaches.
            _, episode = self.ids.unique(return_inverse=True)
            span = float(times.max() - times.min()) + 2 * self.window + 1
            times = times - times.min() + episode * span
        order = times.argsort(stable=True)
        ordered = times[order]
        running = torch.cat([keys.new_zeros(1, keys.shape[1], dtype=torch.float64), keys[order].double().cumsum(0)])
        low = torch.searchsorted(ordered, times - self.window, side="left")
        high = torch.searchsorted(ordered, times + self.window, side="right")
        return (running[high] - running[low]).to(keys.dtype)
