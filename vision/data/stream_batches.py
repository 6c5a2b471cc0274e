"""Batches of random crops from a stream: shuffled in blocks, resumable in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.integrity import BrokenImages
from contrastive_mm.vision.data.loader import CropWorkers, PendingCrops, ahead, crop_draws
from contrastive_mm.vision.data.packed import open_cell
from contrastive_mm.vision.data.streaming import Sample, Stream, StreamReader, shard_order

BLOCK_STREAM = 2
"""Which of a seed's random numbers shuffle blocks; see ``SHARD_STREAM``."""

Block = tuple[dict[str, Any], list[Sample]]
"""Samples that are shuffled together, and the reader's state before them."""


class _Started:
    """A batch in the making, and where the stream stands behind it."""

    def __init__(self, crops: PendingCrops, samples: list[Sample], place: dict[str, Any]) -> None:
        self.crops = crops
        self.samples = samples
        self.place = place

    def result(self) -> dict[str, Tensor]:
        views, numbers = self.crops.result()
        labels = [self.samples[number].label for number in numbers.tolist()]
        if any(label is None or label < 0 for label in labels):
            return views
        return {**views, "label": torch.tensor(labels)}

    def cancel(self) -> None:
        self.crops.cancel()


class StreamBatches:
    """Batches of ``view_0``, ``view_1``, ... (B, 3, S, S) uint8 and, where each has one, ``label`` (B,).

    Shards come in an order of each epoch's own. What they hold is read in blocks, the next while one is in use, and
    shuffled in each, so that a checkpoint need not hold a buffer: it notes where the block began, and a resumed run
    reads that block again and goes on with the batches and crops of an uninterrupted one. Samples that don't fill a
    batch at the end of a block are left out. There is no ``index``: nobody counts a stream.

    Args:
        stream: read from.
        batch_size: samples a batch.
        workers: makes the crops.
        seed: decides the order and the crops.
        prefetch: batches in the making beyond the one in use.
        buffer: samples of a block, at least; encoded, they lie in memory twice.
        max_broken: largest share of broken images, of those read so far (and a thousand at least).

    Raises:
        UserError: batch_size below 2.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        workers: CropWorkers,
        seed: int = 0,
        prefetch: int = 4,
        buffer: int = 4096,
        max_broken: float = 0.01,
    ) -> None:
        if batch_size < 2:
            raise UserError(f"--batch-size = {batch_size}; it must be at least 2.")
        self.batch_size = batch_size
        self.seed = seed
        self._stream = stream
        self._workers = workers
        self._prefetch = prefetch
        self._block_batches = max(1, -(-buffer // batch_size))
        self._read = 0
        self._broken = BrokenImages(max_broken, lambda: max(1000, self._read))
        self._place: dict[str, Any] = {"epoch": 0, "block": 0, "position": 0, "source": None}

    def __len__(self) -> int:
        """Refused.

        Raises:
            UserError: always: a stream's length is not known.
        """
        raise UserError("How many images a stream holds is not known: say with --steps how long to train.")

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        epoch, begun = self._place["epoch"], self._place["source"] is not None
        batches = 0
        for started in ahead(self._started(), self._prefetch):
            batch = started.result()
            # Noted before the batch is handed out: a checkpoint written while it is in use includes it.
            self._place = started.place
            batches += 1
            yield batch
        if not batches and not begun:
            raise UserError(f"The stream holds fewer than --batch-size {self.batch_size} images.")
        self._place = {"epoch": epoch + 1, "block": 0, "position": 0, "source": None}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {**self._place, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            UserError: the state belongs to another batch size, buffer, seed or number of shards.
        """
        for name, value in self._identity().items():
            if name not in state or state[name] != value:
                raise UserError(
                    f"The checkpoint was made with {name} = {state.get(name)}, this run has {value}; "
                    f"an exact resume needs the same {name}."
                )
        self._place = {name: state[name] for name in self._place}

    def _identity(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "block_batches": self._block_batches,
            "seed": self.seed,
            "num_shards": self._stream.num_shards,
        }

    def _started(self) -> Iterator[_Started]:
        place = dict(self._place)
        for before, samples in self._blocks():
            self._read += len(samples)
            order = np.random.default_rng([self.seed, place["epoch"], place["block"], BLOCK_STREAM]).permutation(
                len(samples)
            )
            for position in range(place["position"], len(samples) // self.batch_size):
                rows = order[position * self.batch_size : (position + 1) * self.batch_size].tolist()
                here = {**place, "position": position + 1, "source": before}
                yield _Started(self._start(rows, samples, here), samples, here)
            place = {**place, "block": place["block"] + 1, "position": 0}

    def _start(self, rows: list[int], samples: list[Sample], place: dict[str, Any]) -> PendingCrops:
        number = place["block"] * self._block_batches + place["position"]
        draws = crop_draws(self.seed, place["epoch"], number, len(rows), len(self._workers.crops))

        def note(row: int, error: Exception) -> None:
            self._broken.note(samples[row].name, error)

        return self._workers.start(rows, lambda row: open_cell(samples[row].content), len(samples), draws, note)

    def _blocks(self) -> Iterator[Block]:
        """Blocks from the present one to the epoch's end, each read while the one before is in use."""
        order = shard_order(self._stream.num_shards, self.seed, self._place["epoch"])
        reader = StreamReader(self._stream, order, self._place["source"])

        def read() -> Block:
            return reader.state(), reader.read(self._block_batches * self.batch_size)

        with ThreadPoolExecutor(1, "read") as thread:
            coming: Future[Block] = thread.submit(read)
            while (block := coming.result())[1]:
                coming = thread.submit(read)
                yield block
