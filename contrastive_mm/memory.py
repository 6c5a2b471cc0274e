"""Memory of features from earlier batches. Banks are read in ``forward`` and written in ``after_step``."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.errors import UserError


class FeatureQueue(nn.Module):
    """A first-in first-out queue of features: MoCo's dictionary (He et al. 2020, section 3.2).

    It starts empty and never invents content: ``features()`` holds what was pushed, the newest ``size`` rows.
    A push may have any number of rows, more than the queue too, and wraps exactly at the end. The content, the
    write position and the fill level all live in ``state_dict``, so a resumed run has its negatives back.

    Args:
        size: rows kept.
        dim: dimensions of a feature.

    Raises:
        UserError: size or dim below 1.
    """

    _storage: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise UserError(f"A feature queue needs size and dim of at least 1; got size={size}, dim={dim}.")
        self.size = size
        self.dim = dim
        # Plain integers, not tensors: reading them on a GPU would wait for it at every step.
        self._cursor = 0
        self._filled = 0
        self.register_buffer("_storage", torch.zeros(size, dim))

    def __len__(self) -> int:
        return self._filled

    def features(self) -> Float[Tensor, "filled dim"]:
        """What the queue holds, in storage order (which is not the order of age once it has wrapped).

        A view of the storage, not a copy: it changes at the next push.
        """
        return self._storage[: self._filled]

    @torch.no_grad()
    def push(self, features: Float[Tensor, "batch dim"]) -> None:
        """Add rows, overwriting the oldest.

        Args:
            features: (B, dim), B of any size; of more than ``size`` rows the last ``size`` stay.

        Raises:
            UserError: another number of dimensions.
        """
        if features.shape[1] != self.dim:
            raise UserError(f"The queue holds {self.dim} dimensions, but `features` has {features.shape[1]}.")
        skipped = max(0, len(features) - self.size)
        kept = features[skipped:].detach().to(self._storage)
        start = (self._cursor + skipped) % self.size
        until_end = min(len(kept), self.size - start)
        self._storage[start : start + until_end] = kept[:until_end]
        self._storage[: len(kept) - until_end] = kept[until_end:]
        self._cursor = (start + len(kept)) % self.size
        self._filled = min(self.size, self._filled + len(features))

    def get_extra_state(self) -> dict[str, int]:
        """The write position and the fill level, for ``state_dict``."""
        return {"cursor": self._cursor, "filled": self._filled}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        self._cursor = int(state["cursor"])
        self._filled = int(state["filled"])
