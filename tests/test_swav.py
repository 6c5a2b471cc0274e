"""SwAV: prototypes, queues, crops."""

import copy

import pytest
import torch
from small_problem import (
    build,
    make_views,
    neighbour_accuracy,
    train,
)
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.methods import SwAVConfig
from contrastive_mm.views import Views


def test_swav_prototypes_stay_at_first_then_move_and_keep_length_one():
    method = build("swav", freeze_prototypes_steps=3)
    start = method.prototypes.weight.detach().clone()
    head = method.projector[0].weight.detach().clone()
    for step in range(1, 6):
        train(method, 1)
        now = method.prototypes.weight.detach()
        torch.testing.assert_close(now.norm(dim=1), torch.ones(24))
        assert torch.allclose(now, start, atol=1e-6) is (step <= 3), f"after step {step}"
    assert not torch.allclose(method.projector[0].weight, head)


def test_swav_counts_steps_in_its_state():
    method = build("swav", freeze_prototypes_steps=3)
    train(method, 3)
    resumed = build("swav", freeze_prototypes_steps=3)
    resumed.load_state_dict(method.state_dict())
    start = resumed.prototypes.weight.detach().clone()
    train(resumed, 1)
    assert not torch.allclose(resumed.prototypes.weight, start, atol=1e-6), "the frozen steps were before"


def test_swav_uses_its_queues_after_their_start_only(generator):
    method = build("swav", queue_size=40, queue_start_steps=2)
    views = make_views(16, generator)
    for step in range(4):
        without = copy.deepcopy(method)
        without.queues = nn.ModuleList()
        same = torch.equal(method(views).loss, without(views).loss)
        method._new_features.clear()
        assert same is (step < 2), f"at step {step}"
        train(method, 1, batch=16)
        assert [len(queue) for queue in method.queues] == [min(40, 16 * (step + 1))] * 2


def test_swav_queues_hold_unit_features_of_their_own_view_from_training_only(generator):
    method = build("swav", queue_size=40)
    views = make_views(16, generator)
    method(views)
    assert all(len(queue) == 0 for queue in method.queues), "forward never writes"
    second = nn.functional.normalize(method.projector(method.encoder(views.inputs[1])).detach())
    method.eval()(views)
    method.train().after_step()
    assert len(method.queues[1]) == 16, "nor does evaluation leave features behind"
    held = method.queues[1].features()
    torch.testing.assert_close(held.norm(dim=1), torch.ones(16))
    # BatchNorm saw both views at once there and one here, so that features agree roughly.
    assert float((held * second).sum(1).mean()) > 0.9
    assert float((held * method.queues[0].features()).sum(1).mean()) < 0.9


def test_swav_crops_predict_the_full_views(generator):
    method = build("swav")
    views = make_views(16, generator, crops=2)
    seen = []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    method(views)
    assert seen == [64], "views of one size share a forward pass"
    before = neighbour_accuracy(build("swav").encoder)
    train(method, 80, crops=2)
    assert neighbour_accuracy(method.encoder) > before + 0.3


def test_swav_computes_scores_in_full_precision_under_autocast(generator):
    method, views = build("swav", epsilon=0.01), make_views(16, generator)
    # The encoder's own rounding is taken out, so that only the scores are left to lose digits.
    fixed = method.projector(method.encoder(torch.cat(views.inputs))).detach()
    method._project = lambda inputs: fixed
    expected = method(views).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert float(method(views).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_swav_names_views_and_options_that_do_not_fit(generator):
    views = make_views(8, generator, crops=1)
    with pytest.raises(UserError, match="the view maker gave 1"):
        build("swav")(Views(views.inputs[:1], num_global=1))
    with pytest.raises(UserError, match="num_global = 3; set it to 2, or --queue-size to 0"):
        build("swav", queue_size=8)(Views(views.inputs, num_global=3))
    for options, message in (
        ({"num_prototypes": 1}, "--num-prototypes = 1"),
        ({"queue_size": -1}, "--queue-size = -1"),
        ({"sinkhorn_iterations": 0}, "--sinkhorn-iterations = 0"),
    ):
        with pytest.raises(UserError, match=message):
            SwAVConfig(**options)
