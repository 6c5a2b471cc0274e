"""Which samples belong together: one value that every InfoNCE-type loss takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.distributed import gather_rows, process_index
from contrastive_mm.errors import UserError

PER_SAMPLE = ("ids", "partner", "share", "times")


@dataclass(frozen=True)
class Positives:
    """How much each key j is a positive of query i: weights W (N, N), seldom held as a matrix.

    Without any field, W is the identity: row i belongs with row i. Make the other kinds with the functions below,
    which say what they need. A loss divides each row of W by its sum, so only the proportions count. Of two views
    the first one's rows are the queries and the second one's the keys; the other way round it is W transposed.

    ``partner`` and ``share`` mix rows of the relation that the other fields name: with ``ids``, a mixed row belongs
    with its own class by its share, and with its partner's class by the rest.

    In several processes each gives the value of its own samples, all of one kind, and a loss with ``gather=True``
    compares them across processes: equal ``ids`` and near ``times`` belong together wherever they are. A ``partner``
    is a row of the same process. A ``matrix`` speaks of its own process's samples; those of other processes do not
    belong to them (weight 0).

    Attributes:
        ids: (N,) whole numbers; W is 1 between rows of the same number (classes, near-duplicates, episodes).
        matrix: (N, N) weights of at least 0, or booleans.
        partner: (N,) row with which row i was mixed (Mixup, CutMix), with ``share``.
        share: (N,) weight of row i itself, 0 to 1; its partner has the rest (i-Mix, Lee et al. 2021, equation 3).
        times: (N,) floats; W is 1 between rows at most ``window`` apart, of the same ``ids`` where those are given.
        window: see ``times``.
        own: the rows that are this process's, where the value is of a whole batch; set by ``gathered``.
        swapped: whether keys and queries have changed places; set by ``transposed``.
    """

    ids: Int[Tensor, " rows"] | None = None
    matrix: Float[Tensor, "rows rows"] | Bool[Tensor, "rows rows"] | None = None
    partner: Int[Tensor, " rows"] | None = None
    share: Float[Tensor, " rows"] | None = None
    times: Float[Tensor, " rows"] | None = None
    window: float = 0.0
    own: slice = field(default_factory=lambda: slice(None))
    swapped: bool = False

    @classmethod
    def of_groups(cls, ids: Int[Tensor, " rows"]) -> Positives:
        """Rows of the same number belong together."""
        return cls(ids=ids)

    @classmethod
    def weighted(cls, matrix: Float[Tensor, "rows rows"] | Bool[Tensor, "rows rows"]) -> Positives:
        """Weights given one by one; the matrix is the caller's, and is not copied."""
        return cls(matrix=matrix)

    @classmethod
    def mixed(
        cls,
        partner: Int[Tensor, " rows"],
        share: Float[Tensor, " rows"],
        ids: Int[Tensor, " rows"] | None = None,
    ) -> Positives:
        """Row i was mixed from its own sample (``share``) and its partner's (the rest), of these classes if given."""
        return cls(partner=partner, share=share, ids=ids)

    @classmethod
    def within(
        cls, times: Float[Tensor, " rows"], window: float, ids: Int[Tensor, " rows"] | None = None
    ) -> Positives:
        """Rows at most ``window`` apart in time belong together, inside their episode ``ids`` where given."""
        return cls(times=times, window=window, ids=ids)

    def check(self, rows: int) -> None:
        """Make sure that the value fits a batch. The values of tensors are looked at on the CPU only.

        Raises:
            UserError: a field has another number of rows, ``ids`` or ``partner`` are no whole numbers, only one of
                ``partner`` and ``share`` is given, a matrix and another kind are, or a value is out of range.
        """
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise UserError(f"Positives.{name} has shape {tuple(value.shape)}, but the batch has {rows} rows.")
            if value is not None and name in ("ids", "partner") and value.is_floating_point():
                raise UserError(f"Positives.{name} holds {value.dtype}; it must hold whole numbers.")
            # torch takes tensors of these as masks, or not at all, where rows are picked.
            if value is not None and name == "partner" and value.dtype not in (torch.int64, torch.int32):
                raise UserError(f"Positives.partner holds {value.dtype}; it must hold row numbers: call .long().")
        if self.matrix is not None:
            if self.matrix.shape != (rows, rows):
                raise UserError(
                    f"Positives.matrix has shape {tuple(self.matrix.shape)}, but a batch of {rows} rows needs "
                    f"({rows}, {rows})."
                )
            if any(getattr(self, name) is not None for name in PER_SAMPLE):
                raise UserError("Positives.matrix says all; give no ids, partner or times beside it.")
        if (self.partner is None) != (self.share is None):
            raise UserError("Positives.partner and Positives.share go together: give both.")
        if self.window and self.times is None:
            raise UserError(f"Positives.window = {self.window} has nothing to measure: give times.")
        self._check_values(rows)

    def _check_values(self, rows: int) -> None:
        if not 0 <= self.window < math.inf:
            raise UserError(f"Positives.window = {self.window}; it must be at least 0.")
        for name, low, high in (
            ("partner", 0, rows - 1),
            ("share", 0, 1),
            ("matrix", 0, math.inf),
            ("times", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            if value is None or value.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            # NaN is in no range.
            if not bool(((value >= low) & (value <= high)).all()):
                raise UserError(f"Positives.{name} holds a value outside {low} to {high}.")

    def gathered(self, counts: list[int]) -> Positives:
        """The value of all processes' rows together, of which this process's rows are ``own``.

        What comes out of its functions is about own rows, what goes in about all. A collective: every process calls
        it, with the same kind of value.

        Args:
            counts: numbers of rows of the processes, ``distributed.row_counts``.
        """
        offset = sum(counts[: process_index()])
        whole: dict[str, Any] = {}
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is not None:
                whole[name] = gather_rows(value + offset if name == "partner" else value, counts)
        return dataclasses.replace(self, **whole, own=slice(offset, offset + counts[process_index()]))

    def transposed(self) -> Positives:
        """The same relation with keys and queries in each other's place."""
        return dataclasses.replace(self, swapped=not self.swapped)

    def weighted_sum(
        self, keys: Float[Tensor, "rows dim"], related_sum: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "own dim"]:
        """W keys for own rows, in O(N D) but for a given matrix. Differentiable.

        Args:
            keys: one a row of the batch.
            related_sum: sums, for every row, the keys of equal ``ids`` or near ``times``, where not all of the keys
                that belong together are at hand (as in ``losses.ring``).
        """
        if self.matrix is not None:
            weights = self.matrix.to(keys)
            return (weights.T if self.swapped else weights) @ keys[self.own]
        related_sum = related_sum or self._related_sum
        if self.partner is None or self.share is None:
            return related_sum(keys)[self.own]
        share = self.share.to(keys)[:, None]
        if self.swapped:
            return related_sum((share * keys).index_add(0, self.partner, (1 - share) * keys))[self.own]
        related = related_sum(keys)
        return (share * related + (1 - share) * related[self.partner])[self.own]

    def totals(self, like: Float[Tensor, "rows dim"]) -> Float[Tensor, " own"]:
        """Sum of each own row of W, in the type of ``like``, which has as many rows as the batch."""
        return self.weighted_sum(torch.ones_like(like[:, :1]))[:, 0]

    def mean(
        self, keys: Float[Tensor, "rows dim"], related_sum: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "own dim"]:
        """The mean of each own row's positives among the keys, weighted by W. Differentiable.

        Args:
            keys: one a row of the batch.
            related_sum: as in ``weighted_sum``.

        Raises:
            UserError: a row has no positive (looked at on the CPU only).
        """
        # The sum of the weights beside the weighted sum, in one pass.
        sums = self.weighted_sum(torch.cat([keys, torch.ones_like(keys[:, :1])], dim=1), related_sum)
        totals = sums[:, -1:]
        if totals.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((totals > 0).all()):
            row = int((~(totals > 0)).nonzero()[0, 0])
            way = "column" if self.swapped else "row"
            raise UserError(
                f"Positives leave no positive to some rows of the batch: {way} {row} of the weights sums to 0. Give "
                "each row one, or use supcon, which leaves such rows out."
            )
        return sums[:, :-1] / totals

    def diagonal(self, like: Float[Tensor, "own dim"]) -> Float[Tensor, " own"]:
        """The weight of each own row with itself, in the type of ``like``."""
        if self.matrix is not None:
            return self.matrix.diagonal().to(like)
        if self.partner is None or self.share is None:
            return like.new_ones(len(like))
        share, rows = self.share.to(like), torch.arange(len(self.share), device=like.device)
        same = self._related(rows, self.partner).to(like)
        return (share + (1 - share) * same)[self.own]

    def belonging(self, start: int, stop: int, like: Float[Tensor, "rows dim"]) -> Bool[Tensor, "some rows"]:
        """Whether all rows belong (by a weight above 0) with own rows from ``start`` to before ``stop``.

        ``like`` has as many rows as the batch.
        """
        everything = torch.arange(len(like), device=like.device)
        some = everything[self.own][start:stop, None]
        if self.matrix is not None:
            found = torch.zeros(len(some), len(like), dtype=torch.bool, device=like.device)
            found[:, self.own] = (self.matrix.T if self.swapped else self.matrix)[start:stop] > 0
            return found
        if self.partner is None or self.share is None:
            return self._related(some, everything[None])
        mixed, other = (everything[None], some) if self.swapped else (some, everything[None])
        by_itself = (self.share[mixed] > 0) & self._related(mixed, other)
        return by_itself | ((self.share[mixed] < 1) & self._related(self.partner[mixed], other))

    def _related_sum(self, keys: Tensor) -> Tensor:
        """For every row the sum of the keys that belong with it, before any mixing; a symmetric relation."""
        if self.times is not None:
            return self._window_sum(keys)
        if self.ids is not None:
            _, place = self.ids.unique(return_inverse=True)
            return keys.new_zeros(len(keys), keys.shape[1]).index_add(0, place, keys)[place]
        return keys

    def _related(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether rows belong with others, before any mixing: numbers of rows that broadcast."""
        if self.times is not None:
            time = self._timeline()
            return (time[second] >= time[first] - self.window) & (time[second] <= time[first] + self.window)
        return self.ids[first] == self.ids[second] if self.ids is not None else first == second

    def _timeline(self) -> Tensor:
        """Times in float64; episodes stand one behind the other, further apart than any window reaches."""
        assert self.times is not None
        times = self.times.double()
        if self.ids is None:
            return times
        _, episode = self.ids.unique(return_inverse=True)
        return times - times.min() + episode * (times.max() - times.min() + 2 * self.window + 1)

    def _window_sum(self, keys: Tensor) -> Tensor:
        """Sums over windows of time as differences of running sums, in float64 so that little cancels."""
        times = self._timeline()
        order = times.argsort(stable=True)
        ordered = times[order]
        running = torch.cat([keys.new_zeros(1, keys.shape[1], dtype=torch.float64), keys[order].double().cumsum(0)])
        low = torch.searchsorted(ordered, times - self.window, side="left")
        high = torch.searchsorted(ordered, times + self.window, side="right")
        return (running[high] - running[low]).to(keys.dtype)
