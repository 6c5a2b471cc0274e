"""Batches larger than memory: the encoder takes a part at a time, and its activations are computed again when needed.

GradCache (Gao et al. 2021, arXiv 2101.06983) holds the features of the whole batch, on which a contrastive loss
depends, and the activations of one part only. It is the encoder's forward pass under checkpointing, part by part, so
torch's own checkpointing does it: random states (dropout) and autocast are replayed with each part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from contrastive_mm.errors import UserError
from contrastive_mm.methods.base import Method
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Inputs, num_rows


def encode_in_chunks(method: Method, size: int) -> None:
    """Let a method's encoder, and the slow copies of it, take at most so many rows at once.

    A step then holds the activations of ``size`` rows, and the features of all; it costs a second forward pass of the
    encoder. Loss and gradients are those of the whole batch: heads, predictors and losses see it whole. What differs
    is what an encoder itself computes over rows: BatchNorm inside it takes the statistics of each chunk, as it does
    of each process without synchronisation, and dropout draws its masks chunk by chunk.

    The encoder stays the module that it was, with the same parameters and names; only its class is derived anew.

    Args:
        method: changed in place.
        size: rows of a chunk; a view of 256 images in chunks of 64 makes 4 passes.

    Raises:
        UserError: ``size`` is below 1.
    """
    if size < 1:
        raise UserError(f"chunk_size = {size}; it must be at least 1.")
    for encoder in (method.encoder, *_slow_copies(method)):
        if not isinstance(encoder, _InChunks):
            kind = type(encoder)
            encoder.__class__ = type(f"{kind.__name__}InChunks", (_InChunks, kind), {"__module__": kind.__module__})
        cast("_InChunks", encoder).chunk_size = size


def _slow_copies(method: Method) -> Iterator[nn.Module]:
    """The copies of the encoder inside momentum encoders, found by their parameters' names and shapes."""
    wanted = _layout(method.encoder)
    for follower in method.modules():
        if isinstance(follower, MomentumEncoder):
            yield from [part for part in follower.module.modules() if _layout(part) == wanted][:1]


def _layout(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


class _InChunks(nn.Module):
    """Stands before an encoder's class, and calls the encoder's own ``forward`` on a chunk at a time."""

    chunk_size: int

    def forward(self, inputs: Inputs, *arguments: Any, **options: Any) -> Tensor:
        """As the encoder's own, on all rows."""
        whole = super().forward
        rows = num_rows(inputs)
        if rows <= self.chunk_size:
            return cast("Tensor", whole(inputs, *arguments, **options))

        def encode(chunk: Inputs) -> Tensor:
            if not torch.is_grad_enabled():
                return cast("Tensor", whole(chunk, *arguments, **options))
            contexts = lambda: (nullcontext(), _statistics_kept(self))  # noqa: E731
            return cast(
                "Tensor", checkpoint(whole, chunk, *arguments, use_reentrant=False, context_fn=contexts, **options)
            )

        starts = range(0, rows, self.chunk_size)
        return torch.cat([encode(_rows(inputs, start, start + self.chunk_size)) for start in starts])


def _rows(inputs: Inputs, first: int, last: int) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[first:last]
    return {name: tensor[first:last] for name, tensor in inputs.items()}


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """The second pass over a chunk must not count its statistics once more."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    counted = [None if (count := layer.num_batches_tracked) is None else count.clone() for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # and not track_running_stats: the same tensors must be saved as in the first pass
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counted, strict=True):
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)
