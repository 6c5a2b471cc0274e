"""Sums over processes that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this program runs in several processes that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; the tensor itself where there is only one.

    A loss of such sums has the same value in every process. The backward pass sums the gradients over the processes
    too, and DistributedDataParallel's average then gives exactly the gradient of one process on the whole batch.
    Every process must call it, with the same shape.
    """
    if not is_distributed():
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
