"""Where one of several processes refuses its input, all of them end the call with an error, and none waits."""

import pytest
import torch
from processes import run_processes

from contrastive_mm.distributed import gather_rows
from contrastive_mm.errors import UserError
from contrastive_mm.losses import (
    barlow_twins,
    dcl,
    info_nce,
    nt_xent,
    sigmoid_loss,
    supcon,
    swapped_prediction,
    triplet_margin,
    vicreg,
)
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.memory import FeatureQueue, InstanceBank
from contrastive_mm.positives import Positives

LABELS = torch.tensor([0, 1, 0, 2])

# Each takes features of both views; those of one process are broken.
BROKEN_FEATURES = {
    "nt_xent": lambda a, b: nt_xent(a, b, gather=True),
    "dcl": lambda a, b: dcl(a, b, weight_concentration=0.5, gather=True),
    "info_nce": lambda a, b: info_nce(a, b, gather=True),
    "moco": lambda a, b: info_nce(a, b, torch.ones(3, 5), in_batch_negatives=False, gather=True),
    "supcon": lambda a, b: supcon(a, b, LABELS[: len(a)], gather=True),
    "supcon, one view": lambda a, b: supcon(a, None, LABELS[: len(a)], gather=True),
    "sigmoid": lambda a, b: sigmoid_loss(a, b, gather=True),
    "triplet": lambda a, b: triplet_margin(a, b, gather=True),
    "ring": ring_info_nce,
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "swapped_prediction": lambda a, b: swapped_prediction([a, b]),
}
BREAKS = {
    "no rows": lambda features: features[:0],
    "NaN": lambda features: features.where(features < features.max(), torch.nan),
    "integers": lambda features: features.long(),
}
# Each takes whether this process is the one with bad input.
BROKEN_OTHERS = {
    "positives of nt_xent": lambda a, bad: nt_xent(
        a, a, positives=Positives.of_groups(LABELS[: 3 if bad else 4]), gather=True
    ),
    "positives of dcl": lambda a, bad: dcl(
        a, a, positives=Positives.of_groups(LABELS[: 3 if bad else 4]), gather=True
    ),
    "labels of supcon": lambda a, bad: supcon(a, a, LABELS[: 3 if bad else 4], gather=True),
    "ids of ring": lambda a, bad: ring_info_nce(a, a, ids=LABELS[: 3 if bad else 4]),
    "id outside the bank": lambda a, bad: InstanceBank(3, 5).write(LABELS + bad, a),
    "dimensions of a queue": lambda a, bad: FeatureQueue(3, 5).push(a[:, : 4 if bad else 5]),
}


def message(call):
    try:
        call()
    except UserError as error:
        return str(error)
    return "no error"


def work(rank):
    found = {}
    for refusing in (0, 1):
        bad = rank == refusing
        a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(rank))
        for name, loss in BROKEN_FEATURES.items():
            for how, spoil in BREAKS.items():
                given = (spoil(a), spoil(b)) if bad else (a, b)
                found[f"{name}, {how}, {refusing}"] = message(lambda loss=loss, given=given: loss(*given))
        for name, call in BROKEN_OTHERS.items():
            found[f"{name}, {refusing}"] = message(lambda call=call, a=a, bad=bad: call(a, bad))
    found["both"] = message(lambda: nt_xent(torch.ones(0, 5), torch.ones(0, 5), gather=True))
    found["afterwards"] = str(gather_rows(torch.tensor([rank])).tolist())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(work, tmp_path_factory.mktemp("ranks"))


def test_a_refusal_ends_the_call_on_all_processes(ranks):
    assert len(ranks[0]) == 2 * (3 * len(BROKEN_FEATURES) + len(BROKEN_OTHERS)) + 2
    for name, said in ranks[0].items():
        refusing = name[-1]
        if refusing in "01":
            own, other = (said, ranks[1][name]) if refusing == "0" else (ranks[1][name], said)
            assert other == f"Process {refusing} refused its input: see its message.", name
            assert own != "no error", name
            assert "refused" not in own, name


def test_what_several_refuse_each_says_itself_and_the_processes_stay_together(ranks):
    for said in ranks:
        assert said["both"] == "`first` has no rows."
        assert said["afterwards"] == "[0, 1]"
