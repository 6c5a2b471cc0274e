"""Batches of random crops from encoded images: decoded in threads, cropped before the upload, made ahead.

Threads and not processes: torchvision's JPEG decoder, Pillow's decoders and the resizing release Python's lock, and
threads share the data set and write their crops straight into the batch.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float64, Int, UInt8
from PIL import Image
from torch import Tensor

from contrastive_mm.batches import EpochBatches
from contrastive_mm.errors import UserError
from contrastive_mm.training.accelerator import current_device
from contrastive_mm.vision.data.decoding import DRAWS, Crop, decode_crops, view_names

MOST_SUBSTITUTES = 1000
CROP_STREAM = 1
"""Which of a seed's random numbers make crops; what shuffles streams has its own."""


def crop_draws(seed: int, epoch: int, batch: int, rows: int, views: int) -> Float64[np.ndarray, "rows views draws"]:
    """The random numbers behind a batch's crops: a function of its place, whoever decodes it and when."""
    return np.random.default_rng([seed, epoch, batch, CROP_STREAM]).random((rows, views, DRAWS))


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes alone, while it keeps its threads everywhere else.

    Where every decoding thread had a team of its own, the teams would wait for each other: two threads on two cores
    decoded a fraction of what they do alone.
    """
    threads = torch.get_num_threads()
    begun = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes up the setting when it first asks, and keeps it
        begun.wait()

    pool = ThreadPoolExecutor(workers, "decode", begin)
    for _ in range(workers):  # each finds the others waiting, so each starts a thread
        pool.submit(int)
    begun.wait()
    torch.set_num_threads(threads)  # the setting is also what threads of other origin begin with
    return pool


class PendingCrops:
    """A batch of crops that threads are filling."""

    def __init__(self, crops: dict[str, UInt8[Tensor, "batch 3 _ _"]], numbers: list[Future[int]]) -> None:
        self._crops = crops
        self._numbers = numbers

    def result(self) -> tuple[dict[str, Tensor], Int[Tensor, " batch"]]:
        """The crops by name, (B, 3, S, S) uint8, and the numbers of the samples that they are of.

        Raises:
            UserError: too many images are broken.
        """
        return self._crops, torch.tensor([number.result() for number in self._numbers])

    def cancel(self) -> None:
        """Make no more of it."""
        for number in self._numbers:
            number.cancel()


class CropWorkers:
    """Threads that decode images and cut their random crops.

    Args:
        crops: what to cut for each view.
        workers: threads; one a core where None.
    """

    def __init__(self, crops: Sequence[Crop], workers: int | None = None) -> None:
        self.crops = list(crops)
        self._pool = single_threaded_pool(workers or os.cpu_count() or 1)

    def start(
        self,
        numbers: Sequence[int],
        open_image: Callable[[int], Image.Image],
        count: int,
        draws: Float64[np.ndarray, "batch views draws"],
        note_broken: Callable[[int, Exception], None],
    ) -> PendingCrops:
        """Begin a batch.

        Args:
            numbers: the samples, one a row.
            open_image: opens a sample; raises whatever its reader raises where it is broken.
            count: number of samples; in the place of a broken one comes the next that is whole.
            draws: see ``crop_draws``.
            note_broken: told of each broken one.
        """
        # From pinned memory the upload is a copy that the processor need not make.
        pinned = current_device().type == "cuda"
        views = {
            name: torch.empty(len(numbers), 3, crop.size, crop.size, dtype=torch.uint8, pin_memory=pinned)
            for name, crop in zip(view_names(self.crops), self.crops, strict=True)
        }
        rows = [[view[row] for view in views.values()] for row in range(len(numbers))]

        def fill(row: int) -> int:
            for step in range(min(count, MOST_SUBSTITUTES)):
                number = (numbers[row] + step) % count
                try:
                    with open_image(number) as image:
                        decoded = decode_crops(image, self.crops, draws[row])
                except Exception as error:  # damaged files make the readers raise nearly every kind there is
                    note_broken(number, error)
                    continue
                for place, crop in zip(rows[row], decoded, strict=True):
                    place.copy_(crop)
                return number
            raise UserError(f"Not one of {min(count, MOST_SUBSTITUTES)} images in a row can be read; see above.")

        return PendingCrops(views, [self._pool.submit(fill, row) for row in range(len(numbers))])


class CropBatches(EpochBatches):
    """Shuffled batches of random crops, each image decoded once for all its views.

    A batch holds ``view_0``, ``view_1``, ... (B, 3, S, S) uint8, one for each crop, and what ``describe`` adds.
    Batches and crops depend on the seed and the data alone: not on the number of threads, and not on where a run was
    interrupted. A broken image's row goes to the next whole one.

    Args:
        num_samples: size of the data set.
        batch_size: samples a batch.
        workers: makes the crops.
        open_image: opens sample i.
        describe: the rest of a batch, from (B,) sample numbers.
        note_broken: told of each broken sample and the cause; it may stop the run by an error.
        seed: decides order and crops.
        prefetch: batches in the making beyond the one in use.
        identity: as in ``EpochBatches``.

    Raises:
        UserError: batch_size below 2 or above num_samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        workers: CropWorkers,
        open_image: Callable[[int], Image.Image],
        describe: Callable[[Tensor], Mapping[str, Tensor]],
        note_broken: Callable[[int, Exception], None],
        seed: int = 0,
        prefetch: int = 4,
        identity: str | None = None,
    ) -> None:
        super().__init__(num_samples, batch_size, seed, identity=identity)
        self._workers = workers
        self._open_image = open_image
        self._describe = describe
        self._note_broken = note_broken
        self._prefetch = prefetch

    def _loaded(self, chunks: list[Tensor], epoch: int, first: int) -> Iterator[Mapping[str, Tensor]]:
        started = (self._start(chunk, epoch, first + number) for number, chunk in enumerate(chunks))
        for pending in ahead(started, self._prefetch):
            views, numbers = pending.result()
            yield {**views, **self._describe(numbers)}

    def _start(self, chunk: Tensor, epoch: int, batch: int) -> PendingCrops:
        draws = crop_draws(self.seed, epoch, batch, len(chunk), len(self._workers.crops))
        return self._workers.start(chunk.tolist(), self._open_image, self.num_samples, draws, self._note_broken)


class Cancellable(Protocol):
    """What was started and may not be wanted any more."""

    def cancel(self) -> None:
        """Make no more of it."""
        ...


Started = TypeVar("Started", bound=Cancellable)


def ahead(started: Iterator[Started], count: int) -> Iterator[Started]:
    """Hand on what was started, with ``count`` more of it started before; cancel the rest when nobody wants it."""
    pending: deque[Started] = deque()
    try:
        for batch in started:
            pending.append(batch)
            if len(pending) > count:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        for batch in pending:
            batch.cancel()
