"""The bank of instances: one feature for each sample of the training data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from contrastive_mm.distributed import gather_rows, process_index, refuse_together, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.memory.storage import StoredRows, check_rows, check_size, check_whole


class InstanceBank(StoredRows):
    """The memory bank of instance discrimination, NPID (Wu et al. 2018, arXiv 1805.01978, sections 3.1 and 3.2).

    Slot i holds the unit feature of sample i. Slots start as random unit vectors, as in the paper (its code draws
    uniform coordinates whose vectors have length 1 only on average), and stay so until their sample is seen.

    Where paper and released code disagree:

    - **Writing.** In the paper (section 3.1) a new feature takes the place of the old one, and a proximal term in
      the loss (section 3.3) steadies training. The code has no such term; it mixes with ``momentum`` 0.5 and
      renormalises. Here as in the code; ``momentum=0`` is the paper's.
    - **The normaliser Z.** Equation 8 averages over the drawn negatives of "initial batches"; the code averages
      once, over the first batch, and counts the positive in. ``fix_normaliser`` keeps one estimate for good, of the
      logits given: those of the negatives follow the equation. ``NPID`` averages ``log_normaliser`` over steps.

    Both draw negatives uniformly from all samples with replacement, the positive's own slot among them: this is
    the noise distribution 1/n for which equation 6 holds.

    All of it is in ``state_dict``, the stream of negatives too. In several processes every bank takes the rows of
    all of them and so stays the same on each, while each process draws negatives of its own.

    Args:
        size: samples in the training data, n; ids run from 0 to size - 1.
        dim: dimensions of a feature.
        momentum: share of the old feature kept when a sample is seen again, from 0 up to, but not including, 1.
        seed: decides the starting vectors and the stream of negatives; 0 or above.
        dtype: type in which features are kept and read; they are mixed in float32.
        device: None keeps the rows on the module's device. ``"cpu"`` keeps them on the CPU, and only what
            ``read`` asks for is copied to the module's device.

    Raises:
        UserError: size or dim below 1, momentum or seed outside the range, a dtype that isn't floating point, or
            another device.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        momentum: float = 0.5,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        check_size("An instance bank", size, dim, dtype)
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"momentum = {momentum}; it must be at least 0 and below 1, or the bank never changes.")
        if seed < 0:
            raise UserError(f"seed = {seed}; it must be 0 or above.")
        super().__init__({"features": _starting_vectors(size, dim, seed).to(dtype)}, device)
        self.size = size
        self.dim = dim
        self.momentum = momentum
        self.seed = seed
        self._draws = 0
        self._log_normaliser: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def features(self) -> Float[Tensor, "size dim"]:
        """Every slot, by id, on the module's device: for the full softmax (section 3.1) or for kNN (section 3.4).

        A view of the storage, not a copy, unless the rows are kept on the CPU and the module is elsewhere.
        """
        return self._read("features")

    def read(self, ids: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """The features of some samples, on the module's device.

        Args:
            ids: sample ids in any shape.

        Raises:
            UserError: an id outside the bank, or that is no whole number.
        """
        self._check_ids(ids)
        column = self._column("features")
        rows = column.index_select(0, ids.reshape(-1).to(column.device, torch.long))
        return rows.view(*ids.shape, self.dim).to(self._home)

    @torch.no_grad()
    def write(self, ids: Integer[Tensor, " batch"], features: Float[Tensor, "batch dim"]) -> None:
        """Mix new features into their samples' slots: ``v <- normalise(momentum v + (1 - momentum) f)``.

        Only these slots are written. Of several rows with the same id the last one counts, and the others are
        as if they were not there; in several processes, where this is a collective, rows stand in the order of
        the processes.

        Args:
            ids: (B,) sample ids.
            features: (B, dim); normalised here.

        Raises:
            UserError: an id outside the bank or that is no whole number, another number of dimensions, or other
                numbers of rows.
        """
        with refuse_together(features):
            check_rows("the bank", self.dim, features, ids)
            self._check_ids(ids)
        counts = row_counts(features)
        column = self._column_to_write("features")
        ids = gather_rows(ids.to(features.device, torch.long), counts).to(column.device)
        new = F.normalize(gather_rows(features.detach(), counts).to(column.device).float(), dim=1)
        old = column.index_select(0, ids).float()
        mixed = F.normalize(self.momentum * old + (1.0 - self.momentum) * new, dim=1)
        # Rows with the same id all write the last one's value: no order of writing can make a difference.
        column.index_copy_(0, ids, mixed[_last_with_same_id(ids)].to(self.dtype))

    def sample_negatives(self, batch: int, count: int) -> Int[Tensor, "batch count"]:
        """Draw sample ids uniformly, with replacement, for noise-contrastive estimation (section 3.2).

        The n-th call draws the same on every run with the same seed, also after a resume; another process, and
        another kind of device, draws others. In evaluation mode the stream stays where it is.

        Args:
            batch: rows to draw for.
            count: draws for each row, the paper's m.

        Raises:
            UserError: count below 1.
        """
        if count < 1:
            raise UserError(f"An instance bank can't draw {count} negatives a sample; ask for at least 1.")
        device = self._columns["features"].device
        # One seed a call instead of one running generator: its state is two integers, the same in every process
        # (one checkpoint serves all), and negatives are drawn on the device that looks them up.
        mixed = np.random.SeedSequence((self.seed, self._draws, process_index())).generate_state(1)
        generator = torch.Generator(device).manual_seed(int(mixed[0]))
        if self.training:
            self._draws += 1
        return torch.randint(self.size, (batch, count), generator=generator, device=device).to(self._home)

    @torch.no_grad()
    def log_normaliser(self, logits: Float[Tensor, "batch draws"]) -> Float[Tensor, ""]:
        """The logarithm of the normaliser Z, a constant of training (equation 8).

        Until ``fix_normaliser`` it is the estimate ``log(n mean(exp(logits)))`` of this batch, over all processes
        (then, and only then, a collective). The logarithm stays finite where exp(1 / temperature) doesn't.

        Args:
            logits: similarity over temperature of the batch's features with drawn negatives.

        Raises:
            UserError: no logits, and no normaliser fixed.
        """
        if self._log_normaliser is not None:
            return self._log_normaliser
        flat = logits.detach().float().flatten()
        drawn = sum(row_counts(flat))
        if drawn == 0:
            raise UserError("`logits` is empty: the first batch has to estimate the normaliser Z from its negatives.")
        total = gather_rows(flat.logsumexp(0)[None]).logsumexp(0)
        return total - math.log(drawn) + math.log(self.size)

    def fix_normaliser(self, log_normaliser: Float[Tensor, ""]) -> None:
        """Keep an estimate for good; call it in ``after_step``. The first one stays, later calls change nothing."""
        if self._log_normaliser is None:
            self._log_normaliser = log_normaliser.detach().to(self._home, torch.float32)

    @torch.no_grad()
    def _start_anew(self) -> None:
        self._columns["features"].copy_(_starting_vectors(self.size, self.dim, self.seed))
        self._draws, self._log_normaliser = 0, None

    def _check_ids(self, ids: Tensor) -> None:
        check_whole(ids)
        if ids.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.stack(ids.aminmax()).tolist())
        if low < 0 or high >= self.size:
            raise UserError(
                f"Sample id {low if low < 0 else high} is outside the instance bank, which has size={self.size} "
                f"(ids 0 to {self.size - 1}): make it as large as the training data."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> InstanceBank:
        super()._apply(fn, recurse)
        if self._log_normaliser is not None:
            self._log_normaliser = self._log_normaliser.to(self._home)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """The place in the stream of negatives and the normaliser, for ``state_dict``."""
        fixed = None if self._log_normaliser is None else float(self._log_normaliser)
        return {"seed": self.seed, "draws": self._draws, "log_normaliser": fixed}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        self.seed, self._draws = int(state["seed"]), int(state["draws"])
        fixed = state["log_normaliser"]
        self._log_normaliser = None if fixed is None else torch.tensor(fixed, device=self._home)


def _starting_vectors(size: int, dim: int, seed: int) -> Float[Tensor, "size dim"]:
    return F.normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def _last_with_same_id(ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each position the last position with the same id; of fixed shape, so a GPU need not be waited for."""
    ordered, position = ids.sort(stable=True)
    return position[torch.searchsorted(ordered, ids, right=True) - 1]
