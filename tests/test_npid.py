"""NPID: noise-contrastive estimation over a bank of instances."""

import copy
import dataclasses
import math

import pytest
import torch
from small_problem import (
    build,
    make_views,
)
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.methods import npid
from contrastive_mm.views import Views


def test_npid_tells_a_sample_from_noise_as_equation_7_says(generator):
    method = build("npid", negatives=5)
    ids = torch.tensor([3, 9])
    features = nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=1)
    bank = copy.deepcopy(method.bank)
    negatives = bank.sample_negatives(2, 5)
    temperature, size, m = 0.2, 256, 5
    noise = [
        [math.exp(float(f @ bank.read(n)) / temperature) for n in row]
        for f, row in zip(features, negatives, strict=True)
    ]
    normaliser = size * sum(map(sum, noise)) / (2 * m)
    total = 0.0
    for i in range(2):
        own = math.exp(float(features[i] @ bank.read(ids[i])) / temperature) / normaliser
        total -= math.log(own / (own + m / size))
        total -= sum(math.log(1 - p / normaliser / (p / normaliser + m / size)) for p in noise[i])
    assert float(method._loss(features, ids)) == pytest.approx(total / 2, rel=1e-5)


def test_the_normaliser_of_npid_is_a_running_mean_over_steps(generator):
    method = build("npid", negatives=5)
    ids, expected = torch.tensor([3, 9]), None
    for _ in range(3):
        views = make_views(2, generator)
        with torch.no_grad():
            second = nn.functional.normalize(method._project(torch.cat(views.inputs))[2:], dim=1)
        bank = copy.deepcopy(method.bank)
        bank.sample_negatives(2, 5)  # the first view's
        noise = bank.read(bank.sample_negatives(2, 5))
        drawn = [float(second[i] @ noise[i, j]) / 0.2 for i in range(2) for j in range(5)]
        estimate = 256 * sum(map(math.exp, drawn)) / len(drawn)
        expected = estimate if expected is None else 0.9 * expected + 0.1 * estimate
        method(dataclasses.replace(views, sample_ids=ids))
        method.after_step()
        assert float(method._log_normaliser) == pytest.approx(math.log(expected), abs=1e-4)
    resumed = build("npid", negatives=5)
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(resumed._log_normaliser, method._log_normaliser)


def test_the_loss_of_npid_does_not_explode_once_the_bank_holds_features(generator):
    method = build("npid", temperature=0.07)
    first = float(method(make_views(128, generator)).loss.detach())
    for _ in range(20):
        method(make_views(256, generator))
        method.after_step()
    assert float(method(make_views(128, generator)).loss.detach()) < 1.5 * first, "nothing was trained"


def test_npid_takes_the_size_of_its_bank_from_the_data(generator):
    method = build("npid", bank_size=0)
    with pytest.raises(UserError, match="doesn't know their number: set bank_size"):
        method(make_views(4, generator))
    method.set_num_samples(4)
    assert len(method.bank) == 4
    method(make_views(4, generator)).loss.backward()
    method.after_step()
    small = build("npid", bank_size=3)
    with pytest.raises(UserError, match="--bank-size = 3, but there are 4 samples"):
        small.set_num_samples(4)
    large = build("npid", bank_size=9)
    large.set_num_samples(4)
    assert len(large.bank) == 9


def test_npid_draws_the_same_noise_from_all_products_as_from_the_drawn_slots(generator, monkeypatch):
    views, losses = make_views(16, generator), []
    for share in (0, 10**6):
        monkeypatch.setattr(npid, "WHOLE_BANK", share)
        method = build("npid", negatives=7)
        loss = method(views).loss
        loss.backward()
        losses.append((loss.detach(), method.encoder[0].weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


def test_npid_writes_after_the_step(generator):
    method = build("npid")
    before = method.bank.features().clone()
    method(make_views(16, generator))
    assert torch.equal(method.bank.features(), before), "forward never writes"
    method.after_step()
    changed = (method.bank.features() != before).any(1)
    assert changed[:16].all()
    assert not changed[16:].any()
    with pytest.raises(UserError, match="NPID keeps a slot a sample"):
        method(Views(make_views(4, generator).inputs))
    with pytest.raises(UserError, match="Sample id 999 is outside"):
        method(Views(make_views(1, generator).inputs, sample_ids=torch.tensor([999])))
    whole = build("npid", negatives=0)
    views = make_views(16, generator)
    assert float(whole(views).loss.detach()) == pytest.approx(math.log(256), rel=0.4)
    short = Views(views.inputs, sample_ids=views.sample_ids.to(torch.int32))
    assert torch.equal(whole(short).loss, whole(views).loss), "ids may be of any integer type"
