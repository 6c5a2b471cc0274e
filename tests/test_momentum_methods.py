"""MoCo and CURL against their definitions, with a momentum encoder of plain code."""

import copy

import oracles
import pytest
import torch
from small_problem import (
    Encoder,
    build,
    make_views,
    slow_encoder,
    unit_lists,
)
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.methods import CURL, CURLConfig


def test_moco_is_algorithm_1_for_two_steps(generator):
    method = build("moco", temperature=0.3, momentum=0.8, queue_size=20)
    optimizer = torch.optim.SGD(method.parameters(), 0.5)
    queue = []
    for step in range(2):
        views = make_views(8, generator)
        keys = unit_lists(slow_encoder(method)(views.inputs[1]))
        queries = unit_lists(method.projector(method.encoder(views.inputs[0])))
        expected = oracles.info_nce(queries, keys, queue, 0.3, oracles.dot, in_batch=step == 0)
        before = [p.clone() for p in slow_encoder(method).parameters()]
        objective = method(views)
        assert float(objective.loss.detach()) == pytest.approx(expected, rel=1e-5), f"step {step}"
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        method.after_step()
        online = [*method.encoder.parameters(), *method.projector.parameters()]
        for old, now, fast in zip(before, method.momentum_encoder.parameters(), online, strict=True):
            torch.testing.assert_close(now, 0.8 * old + 0.2 * fast.detach())
        queue = [*queue, *keys]
        torch.testing.assert_close(method.queue.features(), torch.tensor(queue))


def test_curl_is_the_bilinear_loss_with_keys_of_the_slow_encoder(generator):
    method = build("curl", momentum=0.8)
    with torch.no_grad():
        method.bilinear.weight.add_(torch.randn(32, 32, generator=generator))
        for parameter in [*method.momentum_encoder.parameters(), *method.momentum_projector.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    views = make_views(6, generator)
    keys = method.momentum_projector(method.momentum_encoder(views.inputs[1])).tolist()
    queries = (method.projector(method.encoder(views.inputs[0])).detach() @ method.bilinear.weight.detach()).tolist()
    expected = oracles.info_nce(queries, keys, [], 1.0, oracles.dot, in_batch=True)
    assert float(method(views).loss.detach()) == pytest.approx(expected, rel=1e-4)
    slow = [*method.momentum_encoder.parameters(), *method.momentum_projector.parameters()]
    before = [p.clone() for p in slow]
    method.after_step()
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    for old, now, fast in zip(before, slow, online, strict=True):
        torch.testing.assert_close(now, 0.8 * old + 0.2 * fast.detach())


def test_curl_takes_an_agents_target_encoder_and_leaves_its_moving_to_the_agent(generator):
    target = Encoder()
    method = CURL(Encoder(), CURLConfig(latent_dim=8, momentum=0.5), slow_encoder=target)
    before, head = copy.deepcopy(target.state_dict()), copy.deepcopy(method.momentum_projector.state_dict())
    views = make_views(6, generator)
    loss = method(views).loss
    loss.backward()
    with torch.no_grad():
        for parameter in method.projector.parameters():
            parameter.add_(1.0)
    method.after_step()
    assert method.momentum_encoder.module is target
    assert all(torch.equal(target.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(method.momentum_projector.state_dict()["module.0.weight"], head["module.0.weight"])
    assert all(parameter.grad is None for parameter in target.parameters())
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert not torch.equal(method(views).loss, loss), "what the agent did is seen"
    with pytest.raises(UserError, match="in common with `source`"):
        CURL(target, slow_encoder=target)


MOCO_V1 = {"projection_layers": 1, "temperature": 0.07, "momentum": 0.999}


def test_moco_v1_compares_linear_projections_at_its_own_temperature(generator):
    method = build("moco", **MOCO_V1)
    assert [type(layer) for layer in method.projector] == [nn.Linear]
    views = make_views(6, generator)
    weight, bias = (p.detach().double() for p in method.projector[0].parameters())
    queries, keys = (unit_lists(method.encoder(view).detach().double() @ weight.T + bias) for view in views.inputs)
    expected = oracles.info_nce(queries, keys, [], 0.07, oracles.dot, in_batch=True)
    assert float(method(views).loss.detach()) == pytest.approx(expected, rel=1e-5)
