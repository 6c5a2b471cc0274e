"""Batches in an order that a seed decides and a checkpoint remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from contrastive_mm.errors import UserError

Arrange = Callable[[Tensor, torch.Generator], Tensor]


@runtime_checkable
class Batches(Protocol):
    """What a trainer iterates over, once an epoch."""

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...

    def __len__(self) -> int:
        """Batches in one epoch."""
        ...


class EpochBatches(ABC):
    """Batches of a data set, shuffled anew each epoch, resumable in the middle of one; a subclass loads them.

    The order of epoch e is a function of (seed, e) alone. Iterating goes on from where the last iteration (or
    the loaded state) stopped, to the end of that epoch. A last batch that is not full is left out, so the number
    of negatives is the same in every step; the shuffling gives every sample its turn in another epoch.

    Args:
        num_samples: size of the data set.
        batch_size: samples a batch.
        seed: decides the order.
        arrange: reorders an epoch's permutation, for example into batches of similar length.
        identity: a digest of what the samples are, where one is to be had: a resumed run must have the same.

    Raises:
        UserError: batch_size below 2 or above num_samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        arrange: Arrange | None = None,
        identity: str | None = None,
    ) -> None:
        if not 2 <= batch_size <= num_samples:
            raise UserError(
                f"batch_size = {batch_size}, but there are {num_samples} training samples; "
                f"set --batch-size to a number from 2 to {num_samples}."
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._arrange = arrange
        self._data = identity

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        order = self._order(self.epoch)
        start = self.position
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        for batch in self._loaded(chunks, self.epoch, start):
            # Counted before the batch is handed out: a checkpoint written while it is in use includes it.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    @abstractmethod
    def _loaded(self, chunks: list[Tensor], epoch: int, first: int) -> Iterator[Mapping[str, Tensor]]:
        """The batches of these sample numbers in this order; the first of them is batch ``first`` of the epoch."""

    def state_dict(self) -> dict[str, int | str | None]:
        """Where the order stands."""
        return {"epoch": self.epoch, "position": self.position, **self._identity(), "data": self._data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            UserError: the state belongs to another data size, batch size or seed, whose order was another.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"The checkpoint was made with {name} = {state.get(name)}, this run has {value}; "
                    f"an exact resume needs the same {name}."
                )
        if state.get("data", self._data) != self._data:  # checkpoints of earlier releases hold none
            raise UserError(
                f"There are {self.num_samples} training samples as when the checkpoint was made, but not the same "
                "ones, or not of the same classes. Put the data back as they were to resume, or begin anew with "
                "--overwrite or another --output."
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _identity(self) -> dict[str, int]:
        return {"num_samples": self.num_samples, "batch_size": self.batch_size, "seed": self.seed}

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        return order if self._arrange is None else self._arrange(order, generator)


class ShuffledBatches(EpochBatches):
    """Shuffled batches from a function of their sample numbers; order and resuming as in ``EpochBatches``.

    Args:
        num_samples: size of the data set.
        batch_size: samples a batch.
        load: makes a batch from (batch_size,) sample numbers. With ``prefetch`` it runs in another thread.
        seed: decides the order.
        arrange: reorders an epoch's permutation, for example into batches of similar length.
        prefetch: batches made ahead in a thread; 0 makes each when it is asked for.
        identity: as in ``EpochBatches``.

    Raises:
        UserError: batch_size below 2 or above num_samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        load: Callable[[Tensor], Mapping[str, Tensor]],
        seed: int = 0,
        arrange: Arrange | None = None,
        prefetch: int = 0,
        identity: str | None = None,
    ) -> None:
        super().__init__(num_samples, batch_size, seed, arrange, identity)
        self._load = load
        self._prefetch = prefetch

    def _loaded(self, chunks: list[Tensor], epoch: int, first: int) -> Iterator[Mapping[str, Tensor]]:
        if not self._prefetch:
            yield from map(self._load, chunks)
            return
        pending: deque[Future[Mapping[str, Tensor]]] = deque()
        waiting = iter(chunks)
        with ThreadPoolExecutor(max_workers=1) as thread:
            for chunk in waiting:
                pending.append(thread.submit(self._load, chunk))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
