"""One of several processes: gradients averaged as data-parallel training averages them, against one process.

Run as ``python distributed_worker.py RANK SIZE FOLDER``; rank 0 writes ``ratios.json``: for each case the projection
of the averaged gradient on that of one process with the whole batch (1 where they are equal), and the largest
difference relative to the largest gradient.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from processes import join, leave
from torch import nn

from contrastive_mm.losses import (
    LearnableTemperature,
    dcl,
    hard_negative_nt_xent,
    info_nce,
    negative_cosine,
    nt_xent,
    sigmoid_loss,
    supcon,
    swapped_prediction,
    triplet_margin,
    use_form,
)
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.positives import Positives

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 2, 0, 3, 3, 0])
TIMES = torch.tensor([3.0, 0.0, 2.5, 1.0, 1.0, 7.0, 0.5, 6.0, 2.0, 6.5, 1.5])
SHARE = torch.linspace(0.2, 1.0, 11, dtype=torch.float64)
WEIGHTS = torch.rand(11, 11, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
PROTOTYPES = torch.randn(6, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
QUEUE = torch.randn(9, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@dataclass
class Part:
    """The rows of the batch that a process holds; ``owner`` names the process of every row, for all to know."""

    rows: torch.Tensor
    owner: torch.Tensor

    @property
    def labels(self):
        return LABELS[self.rows]

    @property
    def partner(self):
        """The next row of the same process, counted from the part's first row."""
        place = torch.arange(len(self.owner))
        first = torch.searchsorted(self.owner, self.owner)
        size = self.owner.bincount()[self.owner]
        return (first + (place - first + 1) % size)[self.rows] - self.rows[0]

    def matrix(self, weights):
        """Weights inside a process; samples of different processes don't belong together."""
        return (weights * (self.owner[:, None] == self.owner))[self.rows][:, self.rows]

    def positives(self, kind):
        return {
            "groups": lambda: Positives.of_groups(self.labels),
            "window": lambda: Positives.within(TIMES[self.rows], 1.0),
            "window in episodes": lambda: Positives.within(TIMES[self.rows], 2.0, self.labels % 2),
            "mixed": lambda: Positives.mixed(self.partner, SHARE[self.rows]),
            "mixed classes": lambda: Positives.mixed(self.partner, SHARE[self.rows], self.labels),
            "weights": lambda: Positives.weighted(self.matrix(WEIGHTS)),
            "booleans": lambda: Positives.weighted(self.matrix(WEIGHTS + torch.eye(11)) > 0.6),
        }[kind]()


KINDS = ["groups", "window", "window in episodes", "mixed", "mixed classes", "weights", "booleans"]

# Each takes first, second, temperature, and the part of this process.
CASES = {
    "nt_xent": lambda a, b, t, part: nt_xent(a, b, t, gather=True),
    "dcl": lambda a, b, t, part: dcl(a, b, t, gather=True),
    "dclw": lambda a, b, t, part: dcl(a, b, t, weight_concentration=0.5, gather=True),
    "info_nce": lambda a, b, t, part: info_nce(a, b, temperature=t, gather=True),
    "info_nce both ways, queue, ids": lambda a, b, t, part: info_nce(
        a, b, QUEUE, t, symmetric=True, ids=part.labels, negative_ids=torch.arange(9) % 4, gather=True
    ),
    "moco": lambda a, b, t, part: info_nce(a, b.detach(), QUEUE, t, in_batch_negatives=False, gather=True),
    "supcon": lambda a, b, t, part: supcon(a, b, part.labels, t, gather=True),
    "negative_cosine": lambda a, b, t, part: negative_cosine(a, b, gather=True) + t,
    "supcon, one view": lambda a, b, t, part: supcon(a, None, part.labels, t, gather=True),
    # The first process has no view with a positive, and the loss is still that of the whole batch.
    "supcon, one view, no positives": lambda a, b, t, part: supcon(
        a, None, part.matrix(WEIGHTS * (part.owner > 0)), t, gather=True
    ),
    "sigmoid": lambda a, b, t, part: sigmoid_loss(a, b, t, -2.0, gather=True),
    "sigmoid, learned bias": lambda a, b, t, part: sigmoid_loss(a, b, t, -10 * t, gather=True),
    # The distance of what the temperature divides gives it a gradient too.
    "triplet": lambda a, b, t, part: triplet_margin(a / t, b, normalize=False, gather=True),
    "triplet, hard": lambda a, b, t, part: triplet_margin(
        a / t, b, 2.0, part.labels, "hard", normalize=False, gather=True
    ),
    "triplet, next": lambda a, b, t, part: triplet_margin(
        a / t, b, None, part.labels, "none", normalize=False, squared=False, gather=True
    ),
    "ring": lambda a, b, t, part: ring_info_nce(a, b, t),
    "ring, ids": lambda a, b, t, part: ring_info_nce(a, b, t, symmetric=True, ids=part.labels),
    "ring both ways": lambda a, b, t, part: ring_info_nce(a, b, t, symmetric=True),
    "ring, dot": lambda a, b, t, part: ring_info_nce(a, b, t, similarity="dot"),
    "ring, bilinear": lambda a, b, t, part: ring_info_nce(a, b, t, similarity=lambda x: x @ WEIGHTS[:6, :6]),
    "hard negatives": lambda a, b, t, part: hard_negative_nt_xent(a, b, t, gather=True),
    "debiased": lambda a, b, t, part: hard_negative_nt_xent(a, b, t, 0.0, 0.05, gather=True),
    "swapped": lambda a, b, t, part: swapped_prediction([a @ PROTOTYPES, b @ PROTOTYPES], temperature=t),
}
WITH_POSITIVES = {
    "nt_xent": lambda a, b, t, positives: nt_xent(a, b, t, positives=positives, gather=True),
    "dclw": lambda a, b, t, positives: dcl(a, b, t, "dot", 0.5, positives=positives, gather=True),
    "info_nce": lambda a, b, t, positives: info_nce(a, b, temperature=t, positives=positives, gather=True),
    "info_nce both ways, queue": lambda a, b, t, positives: info_nce(
        a, b, QUEUE, t, symmetric=True, positives=positives, gather=True
    ),
    "moco": lambda a, b, t, positives: info_nce(a, b.detach(), QUEUE, t, positives=positives, gather=True),
    "ring": lambda a, b, t, positives: ring_info_nce(a, b, t, positives=positives),
    "ring both ways": lambda a, b, t, positives: ring_info_nce(a, b, t, symmetric=True, positives=positives),
    "supcon": lambda a, b, t, positives: supcon(a, b, positives, t, gather=True),
    "supcon, one view": lambda a, b, t, positives: supcon(a, None, positives, t, gather=True),
}


def with_positives(loss, kind):
    return lambda a, b, t, part: WITH_POSITIVES[loss](a, b, t, part.positives(kind))


CASES |= {f"{loss}, {kind}": with_positives(loss, kind) for loss in WITH_POSITIVES for kind in KINDS}


def gradients(case, part):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    temperature = LearnableTemperature(0.2).double()
    data = torch.randn(2, len(LABELS), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with use_form("tiled"):
        loss = CASES[case](encoder(data[0, part.rows]), encoder(data[1, part.rows]), temperature(), part)
    parameters = [*encoder.parameters(), *temperature.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def main():
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    # Unequal parts; of one process's share the last rows are more than the first's.
    edges = [len(LABELS) * part // size + (part == 1) for part in range(size)] + [len(LABELS)]
    owner = torch.arange(size).repeat_interleave(torch.tensor(edges).diff())
    expected = {case: gradients(case, Part(torch.arange(len(LABELS)), owner)) for case in CASES}
    join(folder, rank, size)
    ratios = {}
    for case in CASES:
        averaged = gradients(case, Part(torch.arange(edges[rank], edges[rank + 1]), owner))
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


if __name__ == "__main__":
    main()
