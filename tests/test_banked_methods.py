"""Methods with features of earlier batches: how their banks are kept."""

import dataclasses

import pytest
import torch
from small_problem import build, make_views

from contrastive_mm.memory import FeatureQueue, InstanceBank

BANKED = ["moco", "nnclr", "simclr-v2", "swav", "npid"]


def banks_of(method):
    return [module for module in method.modules() if isinstance(module, FeatureQueue | InstanceBank)]


def with_bank(name, **options):
    return build(name, **({"queue_size": 64, "queue_start_steps": 0} if name == "swav" else {}), **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", BANKED)
def test_a_bank_in_half_precision_changes_the_loss_by_its_rounding_alone(name, dtype, generator):
    exact, rounded = with_bank(name), with_bank(name, bank_dtype=dtype)
    assert [bank.dtype for bank in banks_of(rounded)] == [getattr(torch, dtype)] * (2 if name == "swav" else 1)
    for _ in range(2):
        views = make_views(16, generator)
        losses = [method(views).loss for method in (exact, rounded)]
        losses[1].backward()
        for method in (exact, rounded):
            method.after_step()
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=0.01)
    assert not torch.equal(losses[0], losses[1]), "the bank is in use"


@pytest.mark.parametrize("name", BANKED)
def test_a_bank_is_kept_on_the_cpu_where_that_is_asked_for(name):
    for where, expected in (("cpu", "cpu"), ("same", "meta")):
        banks = banks_of(with_bank(name, bank_device=where).to("meta"))
        assert banks
        assert {bank.state_dict()["features"].device.type for bank in banks} == {expected}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BANKED)
def test_on_a_gpu_a_bank_on_the_cpu_gives_the_losses_of_one_on_the_gpu(name):
    losses = []
    for where in ("same", "cpu"):
        method, generator = with_bank(name, bank_device=where).cuda(), torch.Generator().manual_seed(3)
        for _ in range(4):
            views = make_views(16, generator)
            inputs = tuple(view.cuda() for view in views.inputs)
            objective = method(dataclasses.replace(views, inputs=inputs, sample_ids=views.sample_ids.cuda()))
            method.after_step()
        losses.append(float(objective.loss.detach()))
    if name == "npid":
        assert losses[0] == pytest.approx(losses[1], rel=0.05), "its draws depend on where the bank lies"
    else:
        assert losses[0] == losses[1]
