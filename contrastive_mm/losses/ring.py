"""InfoNCE over the keys of all processes without ever holding them: the keys travel round a ring.

Gathering needs the memory of all processes' keys in each; here every process holds its own and one neighbour's, so
memory stays flat as processes are added (as ring attention does for sequences, Liu et al. 2023, arXiv 2310.01889).
The price is a second round in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import process_index, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.exclusion import Exclusion
from contrastive_mm.losses.logsumexp import chosen_form
from contrastive_mm.losses.operators import engine
from contrastive_mm.losses.similarity import Temperature, check_temperature, full_precision, scale_of, widen


def ring_info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.1,
    symmetric: bool = False,
) -> Float[Tensor, ""]:
    """InfoNCE with cosine similarity over the keys of all processes, as ``info_nce(..., gather=True)`` computes it.

    Args:
        query: (n, D) this process's queries.
        key: (n, D) this process's keys; row i is the positive of query i. Numbers of rows may differ by process.
        temperature: above 0; a tensor receives its gradient.
        symmetric: average with the other direction.

    Returns:
        The loss of this process's rows; the average of the processes' gradients is that of the whole batch's loss.

    Raises:
        UserError: shapes differ, features are not finite floats, the temperature is not above 0, or there is one
            sample in all.
    """
    check_pair(query, key, "query", "key")
    check_temperature(temperature)
    counts = row_counts(query)
    if sum(counts) < 2:
        raise UserError("ring_info_nce has no negative to compare with: there is one sample in all processes.")
    with full_precision(query):
        left, right = F.normalize(widen(query), dim=1), F.normalize(widen(key), dim=1)
        scale = scale_of(temperature, left)
        losses = _ring(left * scale, right, counts) - scale * (left * right).sum(1)
        if symmetric:
            losses = (losses + _ring(right * scale, left, counts) - scale * (left * right).sum(1)) / 2
        return losses.sum() * len(counts) / sum(counts)


def _ring(query: Tensor, key: Tensor, counts: list[int]) -> Tensor:
    result: Tensor = _RingLogsumexp.apply(query, key, counts)  # type: ignore[no-untyped-call]
    return result


def _round(parts: list[Tensor], counts: list[int]) -> Iterator[tuple[list[Tensor], int]]:
    """Hand every process's tensors to the next, until all have been everywhere and are back.

    Yields this process's present tensors (cut to the rows that their owner has) and the owner's rank. What the caller
    writes into them travels on.
    """
    size = len(counts)
    rank = process_index()
    longest = max(counts)
    held = [F.pad(part, (0, 0, 0, longest - len(part))) for part in parts]
    for step in range(size):
        owner = (rank - step) % size
        yield [part[: counts[owner]] for part in held], owner
        if size > 1:
            arrived = [torch.empty_like(part) for part in held]
            for number, (out, into) in enumerate(zip(held, arrived, strict=True)):
                sent = dist.isend(out, (rank + 1) % size, tag=number)
                dist.recv(into, (rank - 1) % size, tag=number)
                assert sent is not None
                sent.wait()
            held = arrived
    yield [part[: counts[rank]] for part in held], rank


class _RingLogsumexp(torch.autograd.Function):
    """(n,) log-sum-exp of each query over the keys of all processes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, counts: list[int]) -> Tensor:
        total = query.new_full((len(query),), -torch.inf)
        rounds = _round([key], counts)
        for _ in counts:
            (visiting,), _ = next(rounds)
            part, _, _ = engine(chosen_form(), query).cross_forward(
                query, visiting, Exclusion(), columns=False, expectation=False
            )
            total = torch.logaddexp(total, part)
        ctx.save_for_backward(query, key, total)
        ctx.counts = counts
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key, total = ctx.saved_tensors
        by_query = torch.zeros_like(query)
        # Each key's gradient travels with it and gathers every process's share; after the round it is home.
        rounds = _round([key, torch.zeros_like(key)], ctx.counts)
        for _ in ctx.counts:
            (visiting, by_visiting), _ = next(rounds)
            ends = (total, gradient.contiguous())
            own, theirs = engine(chosen_form(), query).cross_backward(query, visiting, ends, None, Exclusion())
            by_query += own
            by_visiting += theirs
        (_, by_key), _ = next(rounds)
        return by_query, by_key.contiguous(), None
