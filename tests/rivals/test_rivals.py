"""Our losses against rival libraries: live where these are installed (the extra ``rivals``), and as recorded.

A rival that says something else than we do has to be explained in ``rival_differences``; what it gets wrong only with
certain numbers is at the end of this file.
"""

import json
import math

import pytest
import torch
from conftest import ROOT
from parity import Outcome, evaluate, wave
from rival_cases import BOTH_VIEWS, CASES
from rival_differences import DIFFERENCES
from rival_libraries import MODULES, lightly, metric_learning, sentence_ranking

from contrastive_mm.losses import nt_xent, swapped_prediction, use_form

EVERYTHING = (*CASES, *DIFFERENCES)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}
RECORDED = json.loads((ROOT / "tests" / "data" / "rival_values.json").read_text(encoding="utf-8"))["cases"]

each_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_difference = pytest.mark.parametrize("case", DIFFERENCES, ids=lambda case: case.name)
# What a rival and its dependencies warn of is no error of ours; our own warnings are seen by the recorded tests.
live = pytest.mark.filterwarnings("ignore")


def imported(rival):
    return pytest.importorskip(MODULES[rival], reason=f"needs {rival}: pip install 'contrastive_mm[rivals]'")


def recorded(case):
    entry = RECORDED[case.name]
    gradients = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in entry["gradients"].items()}
    return Outcome(entry["value"], gradients)


@live
@each_type
@each_case
def test_loss_equals_the_installed_rivals(case, dtype):
    imported(case.rival)
    assert evaluate(case.ours, dtype).difference(evaluate(case.theirs, dtype)) < TOLERANCE[dtype]


@live
@each_type
@each_difference
def test_installed_rival_differs_as_explained(case, dtype):
    imported(case.rival)
    theirs = evaluate(case.theirs, dtype)
    assert evaluate(case.reproduced, dtype).difference(theirs) < TOLERANCE[dtype]
    assert evaluate(case.ours, dtype).difference(theirs) > 0.05


@pytest.mark.parametrize("form", ["plain", "tiled"])
@each_type
@each_case
def test_loss_equals_the_recorded_rivals(case, dtype, form):
    with use_form(form):
        assert evaluate(case.ours, dtype).difference(recorded(case)) < TOLERANCE[dtype]


@each_type
@each_difference
def test_recorded_rival_differs_as_explained(case, dtype):
    assert evaluate(case.reproduced, dtype).difference(recorded(case)) < TOLERANCE[dtype]
    assert evaluate(case.ours, dtype).difference(recorded(case)) > 0.05


def test_every_case_is_recorded_once_and_nothing_else():
    assert [case.name for case in EVERYTHING] == list(RECORDED)
    assert {name: entry["rival"] for name, entry in RECORDED.items()} == {c.name: c.rival for c in EVERYTHING}


# Where a rival goes wrong with certain numbers only. One of these that fails may say that the rival has mended it.


@live
def test_lightlys_sinkhorn_overflows_with_a_small_epsilon_and_ours_does_not():
    imported("lightly")
    scores = [wave(7, 4, 13).float(), wave(7, 4, 17).float()]
    assert lightly("SwaVLoss", sinkhorn_epsilon=0.01)(scores, []).isnan(), "exp(1 / 0.01) is beyond float32"
    exact = lightly("SwaVLoss", sinkhorn_epsilon=0.01)([each.double() for each in scores], [])
    assert float(swapped_prediction(scores, epsilon=0.01)) == pytest.approx(float(exact), rel=1e-5)


@live
def test_metric_learnings_nt_xent_loses_hard_positives_at_a_low_temperature_and_ours_does_not():
    imported("pytorch-metric-learning")
    first, second = wave(7, 5, 2).float().requires_grad_(), -wave(7, 5, 2).float()
    samples = torch.arange(7).repeat(2)
    theirs = metric_learning("NTXentLoss", temperature=0.01)(torch.cat([first, second]), samples)
    limit = -math.log(torch.finfo(torch.float32).tiny)
    assert float(theirs.detach()) == pytest.approx(limit), "the logarithm of a probability that has become 0"
    assert not torch.autograd.grad(theirs, first)[0].any()
    exact = metric_learning("NTXentLoss", temperature=0.01)(torch.cat([first, second]).double(), samples)
    ours = nt_xent(first, second, 0.01)
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert torch.autograd.grad(ours, first)[0].any()


@live
def test_sentence_transformers_candidates_of_both_views_spoil_a_learned_scale():
    imported("sentence-transformers")
    temperature = torch.tensor(0.2, requires_grad=True)
    features = wave(7, 5, 2), wave(7, 5, 3)
    value = sentence_ranking(temperature, *features, directions=BOTH_VIEWS)
    assert torch.autograd.grad(value, temperature)[0].isnan(), "minus infinity before the scale is multiplied"
    assert torch.autograd.grad(nt_xent(*features, temperature), temperature)[0].isfinite()


@live
def test_lightlys_nt_xent_loses_digits_in_half_precision_and_ours_does_not():
    imported("lightly")
    first, second = wave(64, 16, 2), wave(64, 16, 2) + 0.8 * wave(64, 16, 3)
    first, second = first.bfloat16(), second.bfloat16()
    loss = lightly("NTXentLoss", temperature=0.1)
    exact = float(loss(first.double(), second.double()))
    assert abs(float(loss(first, second)) - exact) > 1e-3
    assert float(nt_xent(first, second, 0.1)) == pytest.approx(exact, abs=2e-5)
