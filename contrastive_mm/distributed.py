"""What several processes share of a batch. In a single process every function here is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def row_counts(rows: Shaped[Tensor, " rows *rest"]) -> list[int]:
    """How many rows each process holds, in the order of the processes.

    A collective: every process calls it, those without a row too. On a GPU it waits for the device.
    """
    if process_count() == 1:
        return [len(rows)]
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(counts, own)
    return [int(count) for count in torch.cat(counts).tolist()]


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
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
