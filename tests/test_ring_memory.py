"""The ring's tensors stay as large as one process's share, however many processes there are."""

import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrastive_mm.losses import info_nce
from contrastive_mm.losses.ring import ring_info_nce

ROWS, DIM = 40, 64


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has, inside autograd functions too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensors(rank):
    generator = torch.Generator().manual_seed(rank)
    query, key = (torch.randn(ROWS, DIM, generator=generator, requires_grad=True) for _ in range(2))
    found = {}
    for name, loss in (
        ("ring", lambda: ring_info_nce(query, key, symmetric=True)),
        ("gathered", lambda: info_nce(query, key, symmetric=True, gather=True)),
    ):
        with LargestTensor() as largest:
            loss().backward()
        found[name] = largest.elements
    return found


def test_the_ring_never_holds_what_gathering_holds(tmp_path):
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        for found in run_processes(largest_tensors, folder, count):
            assert found["ring"] == ROWS * DIM, "its own rows and a neighbour's, one at a time"
            assert found["gathered"] >= count * ROWS * DIM
