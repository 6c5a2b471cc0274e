"""The queue of features: MoCo's dictionary, SwAV's feature queue, cross-batch memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor

from contrastive_mm.distributed import gather_rows, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.memory.storage import StoredRows, check_rows, check_size


class FeatureQueue(StoredRows):
    """A first-in first-out queue of features: MoCo's dictionary (He et al. 2020, section 3.2).

    It starts empty and never invents content: ``features()`` holds what was pushed, the newest ``size`` rows.
    A push may have any number of rows, more than the queue too, and wraps exactly at the end. The content, the
    write position and the fill level all live in ``state_dict``, so a resumed run has its negatives back.

    In several processes every queue takes the rows of all of them, in the order of the processes, and so holds
    the same on each.

    Args:
        size: rows kept.
        dim: dimensions of a feature.
        with_ids: whether each row carries an integer: the label of cross-batch memory (Wang et al. 2020), or
            the sample's id, by which a query can leave out its own earlier keys.
        dtype: type in which features are kept and read. Half precision takes half the memory; losses widen it.
        device: None keeps the rows on the module's device. ``"cpu"`` keeps them on the CPU; a copy lies on the
            module's device from the first read (or ``prefetch``) after a push until the next push.

    Raises:
        UserError: size or dim below 1, a dtype that isn't floating point, or another device.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        with_ids: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        check_size("A feature queue", size, dim, dtype)
        columns = {"features": torch.zeros(size, dim, dtype=dtype)}
        if with_ids:
            columns["ids"] = torch.zeros(size, dtype=torch.long)
        super().__init__(columns, device)
        self.size = size
        self.dim = dim
        self.with_ids = with_ids
        # Plain integers, not tensors: reading them on a GPU would wait for it at every step.
        self._cursor = 0
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def features(self) -> Float[Tensor, "filled dim"]:
        """What the queue holds, in storage order (which is not the order of age once it has wrapped).

        On the module's device and of the queue's ``dtype``. A view of the storage, not a copy: it changes at the
        next push. (Of rows kept on the CPU it is a copy, if the module is elsewhere.)
        """
        return self._read("features")

    def ids(self) -> Int[Tensor, " filled"]:
        """The integer of each row of ``features()``, in the same order.

        Raises:
            UserError: the queue was made without ``with_ids``.
        """
        if not self.with_ids:
            raise UserError("This queue keeps no ids: make it with FeatureQueue(..., with_ids=True).")
        return self._read("ids")

    @torch.no_grad()
    def push(self, features: Float[Tensor, "batch dim"], ids: Integer[Tensor, " batch"] | None = None) -> None:
        """Add rows, overwriting the oldest. Only the rows that are added are written.

        In several processes it is a collective: each calls it with its own rows, of whatever number.

        Args:
            features: (B, dim), B of any size; of more than ``size`` rows the last ``size`` stay.
            ids: (B,) integers, for a queue made ``with_ids``.

        Raises:
            UserError: another number of dimensions; ids that are missing, of another number, no whole numbers, or not
                wanted.
        """
        self._check(features, ids)
        # Cast first: half precision is half the traffic between processes.
        rows: dict[str, Tensor] = {"features": features.detach().to(self.dtype)}
        if ids is not None:
            rows["ids"] = ids.to(features.device, torch.long)
        counts = row_counts(features)
        for name, part in rows.items():
            self._write(name, gather_rows(part, counts))
        self._cursor = (self._cursor + sum(counts)) % self.size
        self._filled = min(self.size, self._filled + sum(counts))

    def _check(self, features: Tensor, ids: Tensor | None) -> None:
        if self.with_ids and ids is None:
            raise UserError("This queue keeps ids: push(features, ids) needs one integer for each row.")
        if not self.with_ids and ids is not None:
            raise UserError("This queue keeps no ids: make it with FeatureQueue(..., with_ids=True) to push `ids`.")
        check_rows("the queue", self.dim, features, ids)

    def _write(self, name: str, rows: Shaped[Tensor, " batch *rest"]) -> None:
        """Write rows from the cursor on, around the end."""
        column = self._column_to_write(name)
        skipped = max(0, len(rows) - self.size)
        kept = rows[skipped:].to(column.device)
        start = (self._cursor + skipped) % self.size
        until_end = min(len(kept), self.size - start)
        column[start : start + until_end] = kept[:until_end]
        column[: len(kept) - until_end] = kept[until_end:]

    def get_extra_state(self) -> dict[str, int]:
        """The write position and the fill level, for ``state_dict``."""
        return {"cursor": self._cursor, "filled": self._filled}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        self._cursor = int(state["cursor"])
        self._filled = int(state["filled"])
