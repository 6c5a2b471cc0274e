"""What several processes share of a batch. In a single process every function here is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


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
