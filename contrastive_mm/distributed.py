"""Features of all processes, with right gradients.

Each process takes the mean over its own rows against the columns of all, and data-parallel training averages the
processes' gradients. For that average to be the gradient of the whole batch's loss, the gradient that flows back
through the gathering must be the sum over all processes: no factor of the number of processes anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Gathered:
    """Rows of all processes.

    Attributes:
        rows: (N, ...) those of process 0, then those of process 1, ...
        offset: number of this process's first row among them.
        mean_rows: rows of a process on average: dividing a sum over own rows by it, instead of by their number,
            keeps every row's weight the same when processes hold unequal numbers.
    """

    rows: Tensor
    offset: int
    mean_rows: float


def gather_with_gradient(features: Float[Tensor, "rows dim"]) -> Gathered:
    """Gather rows of all processes, of any number in each; the gradient comes back as the sum over processes.

    Args:
        features: (n, D) this process's rows; D is the same everywhere.

    Returns:
        The (N, D) rows of all. With one process they are ``features`` itself.
    """
    counts = row_counts(len(features))
    if len(counts) == 1:
        return Gathered(features, 0, float(counts[0]))
    rank = dist.get_rank()
    rows: Tensor = _Gather.apply(features, counts)  # type: ignore[no-untyped-call]
    return Gathered(rows, sum(counts[:rank]), sum(counts) / len(counts))


def gather_numbers(values: Tensor) -> Tensor:
    """Gather (n,) whole numbers of all processes, without gradient."""
    counts = row_counts(len(values))
    return values if len(counts) == 1 else _all_gather(values, counts)


def row_counts(own: int) -> list[int]:
    """The number of rows of each process, in the order of ranks."""
    size = world_size()
    if size == 1:
        return [own]
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, own)
    return [int(count) for count in counts]


def _all_gather(values: Tensor, counts: list[int]) -> Tensor:
    longest = max(counts)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    gathered = values.new_empty(len(counts) * longest, *values.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    parts = gathered.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather(features.contiguous(), counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        counts, rank = ctx.counts, dist.get_rank()
        longest = max(counts)
        padded = gradient.new_zeros(len(counts), longest, *gradient.shape[1:])
        for part, own in zip(padded, gradient.split(counts), strict=True):
            part[: len(own)] = own
        if dist.get_backend() == "gloo":
            # gloo has no reduce-scatter in the releases that are supported; the sum of all and one's own part is it.
            dist.all_reduce(padded)
            return padded[rank, : counts[rank]], None
        result = gradient.new_empty(longest, *gradient.shape[1:])
        dist.reduce_scatter_tensor(result, padded.flatten(0, 1))
        return result[: counts[rank]], None
