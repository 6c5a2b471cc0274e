"""What several processes share of a batch. In a single process every function here is the identity.

Each process takes the mean over its own rows against the columns of all, and data-parallel training averages the
processes' gradients. For that average to be the gradient of the whole batch's loss, the gradient that flows back
through the gathering must be the sum over all processes: no factor of their number anywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from contrastive_mm.errors import UserError

REFUSED = -1
"""In the place of a process's number of rows."""


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def row_counts(rows: Shaped[Tensor, " rows *rest"]) -> list[int]:
    """How many rows each process holds, in the order of the processes.

    A collective: every process calls it, those without a row too. On a GPU it waits for the device.

    Raises:
        UserError: another process refused its input (``refuse_together``).
    """
    if process_count() == 1:
        return [len(rows)]
    counts = _gather_number(len(rows), rows.device)
    refused = [str(process) for process, count in enumerate(counts) if count == REFUSED]
    if refused:
        raise UserError(f"Process {' and '.join(refused)} refused its input: see its message.")
    return counts


def refuse_together(rows: Tensor, gather: bool = True) -> AbstractContextManager[None]:
    """Around the checks before a first ``row_counts``: what one process refuses ends the call on all of them.

    Without it that process would raise its error, and the others wait for its number until the group's timeout.

    Args:
        rows: the input that is checked; its device is where numbers are gathered.
        gather: whether ``row_counts`` follows at all.
    """
    return _RefuseTogether(rows.device) if gather and process_count() > 1 else nullcontext()


class _RefuseTogether(AbstractContextManager[None]):
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            _gather_number(REFUSED, self.device)


def _gather_number(number: int, device: torch.device) -> list[int]:
    own = torch.tensor([number], device=device)
    numbers = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(numbers, own)
    return [int(each) for each in torch.cat(numbers).tolist()]


def mean_row_count(rows: Shaped[Tensor, " rows *rest"]) -> float:
    """How many rows a process holds on average: what a sum over own rows is divided by so that all rows weigh alike.

    A collective, as ``row_counts``.
    """
    counts = row_counts(rows)
    return sum(counts) / len(counts)


@torch.no_grad()
def gather_rows(
    rows: Shaped[Tensor, " rows *rest"], counts: list[int] | None = None
) -> Shaped[Tensor, " all_rows *rest"]:
    """The rows of all processes, without gradient, in the order of the processes; the same on each of them.

    A collective, as ``row_counts``. Processes may hold different numbers of rows, as in a last batch: each pads
    to the largest number, and the padding is cut away again.

    Args:
        rows: this process's rows, all of one type and trailing shape across processes.
        counts: ``row_counts(rows)``, where it is known already.
    """
    if process_count() == 1:
        return rows.detach()
    counts = row_counts(rows) if counts is None else counts
    longest, rest = max(counts), rows.shape[1:]
    padded = rows.detach().contiguous()
    if len(rows) < longest:
        padded = rows.new_zeros(longest, *rest)
        padded[: len(rows)] = rows
    gathered = rows.new_empty(len(counts) * longest, *rest)
    # The name of torch 2.14 and later, which warns at the earlier one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, padded)
    if min(counts) == longest:
        return gathered
    parts = gathered.view(len(counts), longest, *rest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@dataclass(frozen=True)
class Gathered:
    """Rows of all processes.

    Attributes:
        rows: (N, ...) those of process 0, then those of process 1, ...
        offset: number of this process's first row among them.
        mean_rows: rows of a process on average: dividing a sum over own rows by it, instead of by their number,
            keeps every row's weight the same when processes hold unequal numbers.
        counts: rows of each process.
    """

    rows: Tensor
    offset: int
    mean_rows: float
    counts: list[int]


def gather_with_gradient(features: Float[Tensor, "rows dim"], counts: list[int] | None = None) -> Gathered:
    """Gather rows of all processes, of any number in each; the gradient comes back as the sum over processes.

    Args:
        features: (n, D) this process's rows; D is the same everywhere.
        counts: ``row_counts(features)``, where it is known already.

    Returns:
        The (N, D) rows of all. With one process they are ``features`` itself.
    """
    counts = row_counts(features) if counts is None else counts
    if len(counts) == 1:
        return Gathered(features, 0, float(counts[0]), counts)
    rows: Tensor = _Gather.apply(features, counts)  # type: ignore[no-untyped-call]
    return Gathered(rows, sum(counts[: process_index()]), sum(counts) / len(counts), counts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return gather_rows(features, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ScatterSum.apply(gradient, ctx.counts), None  # type: ignore[no-untyped-call]


class _ScatterSum(torch.autograd.Function):
    """Own rows of the sum over the processes: what gathering is backwards, and the other way round."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        rank, rest = process_index(), gradient.shape[1:]
        # A copy of its own: it is summed in place, and autograd may still need the gradient.
        padded = gradient.new_zeros(len(counts), max(counts), *rest)
        for part, own in zip(padded, gradient.split(counts), strict=True):
            part[: len(own)] = own
        if dist.get_backend() == "gloo":
            # gloo has no reduce-scatter in all supported releases; the sum of all, and of it one's own part, is it.
            dist.all_reduce(padded)
            return padded[rank, : counts[rank]]
        result = torch.empty_like(padded[0])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(result, padded.view(-1, *rest))
        return result[: counts[rank]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.counts), None  # type: ignore[no-untyped-call]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; the tensor itself where there is only one.

    A loss of such sums has the same value in every process. The backward pass sums the gradients over the processes
    too, and DistributedDataParallel's average then gives exactly the gradient of one process on the whole batch.
    Every process must call it, with the same shape.
    """
    if process_count() == 1:
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor)
    return result


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(tensor: Tensor) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result
