"""InfoNCE over the keys of all processes without ever holding them: the keys travel round a ring.

Gathering needs the memory of all processes' keys in each; here every process holds its own and one neighbour's, so
memory stays flat as processes are added (as ring attention does for sequences, Liu et al. 2023, arXiv 2310.01889).
The price is a second round in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.distributed import process_index, refuse_together, row_counts
from contrastive_mm.errors import UserError
from contrastive_mm.losses.checks import check_ids, check_pair
from contrastive_mm.losses.exclusion import Exclusion
from contrastive_mm.losses.logsumexp import chosen_form
from contrastive_mm.losses.operators import engine
from contrastive_mm.losses.similarity import (
    Similarity,
    Temperature,
    check_directions,
    check_temperature,
    full_precision,
    prepare_key,
    prepare_query,
    scale_of,
)
from contrastive_mm.positives import Positives


def ring_info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    temperature: Temperature = 0.1,
    symmetric: bool = False,
    similarity: Similarity = "cosine",
    positives: Positives | None = None,
    ids: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE over the keys of all processes, as ``info_nce(..., gather=True)`` computes it.

    Args:
        query: (n, D) this process's queries.
        key: (n, D) this process's keys; row i is the positive of query i. Numbers of rows may differ by process.
        temperature: above 0; a tensor receives its gradient.
        symmetric: average with the other direction.
        similarity: as in ``info_nce``.
        positives: as in ``info_nce``, of this process's samples. Groups and windows of time reach across processes:
            another round of the ring sums them.
        ids: (n,) as in ``info_nce``: a key with the query's number, other than key i itself, is no negative.

    Returns:
        The loss of this process's rows; the average of the processes' gradients is that of the whole batch's loss.

    Raises:
        UserError: shapes differ, features are not finite floats, the temperature is not above 0, options exclude
            each other, or there is one sample in all.
    """
    with refuse_together(query):
        check_pair(query, key, "query", "key")
        check_temperature(temperature)
        check_directions(symmetric, similarity)
        if positives is not None:
            positives.check(len(query))
        if ids is not None:
            check_ids(ids, "ids", len(query), "query")
            if positives is not None:
                raise UserError(
                    "`ids` leaves keys out of the candidates that `positives` may name; give one of the two."
                )
    counts = row_counts(query)
    if sum(counts) < 2:
        raise UserError("ring_info_nce has no negative to compare with: there is one sample in all processes.")
    with full_precision(query):
        left, right = prepare_query(query, similarity), prepare_key(key, similarity)
        scale = scale_of(temperature, left)
        losses = _direction(left * scale, right, counts, positives, ids)
        if symmetric:
            back = None if positives is None else positives.transposed()
            losses = (losses + _direction(right * scale, left, counts, back, ids)) / 2
        return losses.sum() * len(counts) / sum(counts)


def _direction(
    query: Tensor, key: Tensor, counts: list[int], positives: Positives | None, ids: Tensor | None
) -> Tensor:
    """(n,) losses of own queries."""
    found: Tensor = _RingLogsumexp.apply(query, key, counts, ids)  # type: ignore[no-untyped-call]
    paired = (query * key).sum(1)
    if ids is not None:
        # Leaving out equal numbers has left out the positive too.
        found = torch.logaddexp(found, paired)
    if positives is None:
        return found - paired
    return found - (query * _mean_positive(key, counts, positives)).sum(1)


def _mean_positive(key: Tensor, counts: list[int], positives: Positives) -> Tensor:
    if positives.ids is None and positives.times is None:
        return positives.mean(key)  # all of them are this process's own
    relation = dataclasses.replace(positives, partner=None, share=None)
    return positives.mean(key, lambda keys: _RingSum.apply(keys, counts, relation))  # type: ignore[no-untyped-call]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise UserError(
            "ring_info_nce can't be differentiated twice, which create_graph=True asks for; "
            "take info_nce(..., gather=True) inside `losses.use_form('plain')`."
        )


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
    """(n,) log-sum-exp of each query over the keys of all processes, but for those of its number."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, counts: list[int], ids: Tensor | None) -> Tensor:
        total = query.new_full((len(query),), -torch.inf)
        numbers = [] if ids is None else [ids[:, None]]
        rounds = _round([key, *numbers], counts)
        for _ in counts:
            (visiting, *visiting_ids), _ = next(rounds)
            part, _, _ = engine(chosen_form(), query).cross_forward(
                query, visiting, _exclusion(ids, visiting_ids), columns=False, expectation=False
            )
            total = torch.logaddexp(total, part)
        ctx.save_for_backward(query, key, total, *numbers)
        ctx.counts = counts
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _refuse_second_derivative()
        query, key, total, *numbers = ctx.saved_tensors
        ids = numbers[0][:, 0] if numbers else None
        by_query = torch.zeros_like(query)
        # Each key's gradient travels with it and gathers every process's share; after the round it is home.
        rounds = _round([key, torch.zeros_like(key), *numbers], ctx.counts)
        for _ in ctx.counts:
            (visiting, by_visiting, *visiting_ids), _ = next(rounds)
            ends = (total, gradient.contiguous())
            exclusion = _exclusion(ids, visiting_ids)
            own, theirs = engine(chosen_form(), query).cross_backward(query, visiting, ends, None, exclusion)
            by_query += own
            by_visiting += theirs
        (_, by_key, *_), _ = next(rounds)
        return by_query, by_key.contiguous(), None, None


def _exclusion(ids: Tensor | None, visiting_ids: list[Tensor]) -> Exclusion:
    return Exclusion(row_ids=ids, column_ids=visiting_ids[0][:, 0].contiguous() if visiting_ids else None)


class _RingSum(torch.autograd.Function):
    """(n, D) sum, for each own row, of the keys of all processes that belong with it by number or time."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, counts: list[int], relation: Positives) -> Tensor:
        ctx.counts, ctx.relation = counts, relation
        total = torch.zeros_like(keys)
        rounds = _round([keys, *_columns(relation)], counts)
        for _ in counts:
            (visiting, *columns), _ = next(rounds)
            total += _sum_of(visiting, _columns(relation), columns, relation)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        own = _columns(ctx.relation)
        rounds = _round([torch.zeros_like(gradient), *own], ctx.counts)
        for _ in ctx.counts:
            (by_visiting, *columns), _ = next(rounds)
            by_visiting += _sum_of(gradient, columns, own, ctx.relation)
        (by_keys, *_), _ = next(rounds)
        return by_keys.contiguous(), None, None


def _columns(relation: Positives) -> list[Tensor]:
    """What has to travel with the keys to say with which rows they belong."""
    return [value[:, None] for value in (relation.ids, relation.times) if value is not None]


def _sum_of(keys: Tensor, rows: list[Tensor], columns: list[Tensor], relation: Positives) -> Tensor:
    """The sum of the keys, whose numbers and times are ``columns``, for rows whose numbers and times are ``rows``."""
    joined = iter([torch.cat(pair)[:, 0] for pair in zip(rows, columns, strict=True)])
    ids, times = (None if value is None else next(joined) for value in (relation.ids, relation.times))
    count = len(rows[0])
    together = Positives(ids=ids, times=times, window=relation.window, own=slice(0, count))
    return together.weighted_sum(torch.cat([keys.new_zeros(count, keys.shape[1]), keys]))
