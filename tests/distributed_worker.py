"""One of several processes: gradients averaged as data-parallel training averages them, against one process.

Run as ``python distributed_worker.py RANK SIZE FOLDER``; rank 0 writes ``ratios.json``: for each case the projection
of the averaged gradient on that of one process with the whole batch (1 where they are equal), and the largest
difference relative to the largest gradient.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from processes import join, leave
from torch import nn

from contrastive_mm.losses import LearnableTemperature, dcl, info_nce, nt_xent, sigmoid_loss, supcon, use_form
from contrastive_mm.losses.ring import ring_info_nce

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 2, 0, 3, 3, 0])
QUEUE = torch.randn(9, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

# Each takes first, second, temperature, and the rows of this process.
CASES = {
    "nt_xent": lambda a, b, t, rows: nt_xent(a, b, t, gather=True),
    "dcl": lambda a, b, t, rows: dcl(a, b, t, gather=True),
    "info_nce": lambda a, b, t, rows: info_nce(a, b, temperature=t, gather=True),
    "info_nce both ways, queue, ids": lambda a, b, t, rows: info_nce(
        a, b, QUEUE, t, symmetric=True, ids=LABELS[rows], negative_ids=torch.arange(9) % 4, gather=True
    ),
    "moco": lambda a, b, t, rows: info_nce(a, b.detach(), QUEUE, t, in_batch_negatives=False, gather=True),
    "supcon": lambda a, b, t, rows: supcon(a, b, LABELS[rows], t, gather=True),
    "supcon, one view": lambda a, b, t, rows: supcon(a, None, LABELS[rows], t, gather=True),
    "sigmoid": lambda a, b, t, rows: sigmoid_loss(a, b, t, -2.0, gather=True),
    "ring": lambda a, b, t, rows: ring_info_nce(a, b, t),
    "ring both ways": lambda a, b, t, rows: ring_info_nce(a, b, t, symmetric=True),
}


def gradients(case, rows, weight=1.0):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    temperature = LearnableTemperature(0.2).double()
    data = torch.randn(2, len(LABELS), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with use_form("tiled"):
        loss = CASES[case](encoder(data[0, rows]), encoder(data[1, rows]), temperature(), rows)
    parameters = [*encoder.parameters(), *temperature.parameters()]
    found = torch.autograd.grad(loss * weight, parameters)
    return torch.cat([g.flatten() for g in found])


def main():
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    everything = torch.arange(len(LABELS))
    expected = {case: gradients(case, everything) for case in CASES}
    join(folder, rank, size)
    ratios = {}
    for case in CASES:
        # Unequal parts; of one process's share the last rows are more than the first's.
        edges = [len(LABELS) * part // size + (part == 1) for part in range(size)] + [len(LABELS)]
        averaged = gradients(case, everything[edges[rank] : edges[rank + 1]], counts_weight(case, edges, rank))
        dist.all_reduce(averaged)
        averaged /= size
        one = expected[case]
        ratios[case] = [
            float(averaged @ one / (one @ one)),
            float((averaged - one).abs().max() / one.abs().max()),
            float(averaged[-1] / one[-1]),
        ]
    if rank == 0:
        (folder / "ratios.json").write_text(json.dumps(ratios))
    leave()


def counts_weight(case, edges, rank):
    """A loss against a queue gathers nothing: with unequal parts its mean is the process's own, as DDP has it."""
    return (edges[rank + 1] - edges[rank]) * (len(edges) - 1) / edges[-1] if case == "moco" else 1.0


if __name__ == "__main__":
    main()
