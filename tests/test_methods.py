"""Methods on a small problem whose answer is known (`small_problem.py`)."""

import dataclasses
import math

import pytest
import torch
from small_problem import SMALL, build, make_views, neighbour_accuracy, samples, train, view
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.losses import info_nce, nt_xent
from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.losses.vicreg import vicreg
from contrastive_mm.methods import METHODS, get_method, nnclr
from contrastive_mm.views import Views


@pytest.mark.parametrize("name", METHODS)
def test_trained_features_find_the_cluster_that_untrained_ones_miss(name):
    method = build(name)
    before = neighbour_accuracy(method.encoder)
    train(method, 150)
    after = neighbour_accuracy(method.encoder)
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert before < 0.45
    assert after > before + 0.3


@pytest.mark.parametrize("name", METHODS)
def test_token_mappings_are_views_as_well(name):
    class TokenEncoder(nn.Module):
        feature_dim = 16

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)

        def forward(self, inputs):
            weights = inputs["attention_mask"][..., None].float()
            return (self.embedding(inputs["input_ids"]) * weights).sum(1) / weights.sum(1)

    method_class = get_method(name)
    method = method_class(TokenEncoder(), method_class.config_class(**SMALL.get(name, {})))
    tokens = [
        {"input_ids": torch.randint(20, (8, length)), "attention_mask": torch.ones(8, length, dtype=torch.long)}
        for length in (5, 7)
    ]
    ids = torch.arange(8)
    method(Views(tuple(tokens), sample_ids=ids, labels=ids % 4)).loss.backward()
    method.after_step()
    assert float(method.encoder.embedding.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("npid", "simcse", "swav")])
def test_methods_of_two_views_name_a_third(name, generator):
    with pytest.raises(UserError, match="compares exactly 2 views, but the view maker gave 3"):
        build(name)(make_views(8, generator, crops=1))


SYMMETRIC = ["barlow-twins", "byol", "dcl", "moco-v3", "nnclr", "simclr", "simclr-v2", "simsiam", "swav", "vicreg"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_the_views_makes_no_difference(name, generator):
    method, views = build(name), make_views(16, generator)
    swapped = Views(views.inputs[::-1])
    assert float(method(views).loss.detach()) == pytest.approx(float(method(swapped).loss.detach()), rel=1e-5)


def cosine_distance(prediction, target):
    return (nn.functional.normalize(prediction) - nn.functional.normalize(target)).square().sum(1).mean()


def test_byol_is_the_distance_to_the_targets_projection_both_ways(generator):
    method, (first, second) = build("byol"), (views := make_views(16, generator)).inputs
    train(method, 3)
    online = [method.predictor(method.projector(method.encoder(view))) for view in (first, second)]
    target = [method.momentum_encoder(view) for view in (first, second)]
    expected = cosine_distance(online[0], target[1]) + cosine_distance(online[1], target[0])
    assert float(method(views).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_byols_target_follows_slowly_and_is_not_trained(generator):
    method = build("byol", momentum=0.75)
    before = [parameter.clone() for parameter in method.momentum_encoder.parameters()]
    train(method, 1)
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    for old, slow, fast in zip(before, method.momentum_encoder.parameters(), online, strict=True):
        assert slow.grad is None
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_simsiam_is_half_of_both_directions_and_spares_the_targets(generator):
    method, views = build("simsiam"), make_views(16, generator)
    first, second = (method.projector(method.encoder(view)) for view in views.inputs)
    predictions = method.predictor(first), method.predictor(second)
    # Half the squared distance of unit vectors, less 1, is the negative cosine.
    there = [cosine_distance(predictions[0], second.detach()), cosine_distance(predictions[1], first.detach())]
    expected = sum(there) / 4 - 1
    loss = method(views).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    weight = method.encoder[0].weight
    mine, other = torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0]
    torch.testing.assert_close(mine, other)


def test_weights_of_barlow_twins_and_vicreg_are_their_options(generator):
    views = make_views(16, generator)
    for method, loss, weights in (
        (build("barlow-twins", offdiagonal_weight=0.5), barlow_twins, [0.5]),
        (build("vicreg", invariance=1.0, variance=2.0, covariance=3.0), vicreg, [1.0, 2.0, 3.0]),
    ):
        first, second = (method.projector(method.encoder(view)) for view in views.inputs)
        assert float(method(views).loss.detach()) == pytest.approx(float(loss(first, second, *weights).detach()))


@pytest.mark.parametrize("name", ["simclr", "dcl", "supcon", "simcse", "nnclr", "moco", "moco-v3", "npid"])
def test_the_temperature_option_is_the_losses(name, generator):
    views = make_views(8, generator)
    losses = [float(build(name, temperature=t)(views).loss.detach()) for t in (0.1, 1.0)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_simcse_takes_a_hard_negative_as_third_view(generator):
    method = build("simcse")
    two = make_views(8, generator)
    three = Views((*two.inputs, view(samples(8, generator)[0], generator)), num_global=2)
    features = [method.projector(method.encoder(x)).detach() for x in three.inputs]
    assert float(method(two).loss.detach()) == pytest.approx(float(info_nce(*features[:2], temperature=0.1)))
    assert float(method(three).loss.detach()) == pytest.approx(float(info_nce(*features, temperature=0.1)))
    with pytest.raises(UserError, match="2 and a hard negative, but the view maker gave 4"):
        method(Views(three.inputs + two.inputs[:1]))


def test_nnclr_finds_the_nearest_row_whatever_the_block(monkeypatch, generator):
    query, rows = torch.randn(9, 4, generator=generator), torch.randn(50, 4, generator=generator)
    expected = rows[(query @ rows.T).argmax(1)]
    monkeypatch.setattr(nnclr, "SEARCH_ROWS", 7)
    assert torch.equal(nnclr.nearest_rows(query, rows), expected)


def test_nnclr_compares_with_neighbours_once_it_has_any(generator):
    method = build("nnclr")
    method(make_views(8, generator))
    assert len(method.queue) == 0, "forward never writes"
    method.after_step()
    assert len(method.queue) == 8
    queued = method.queue.features()
    assert torch.equal(method._neighbour(queued[[3]]), queued[[3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_a_model_cast_to_another_type_takes_steps(name, dtype, generator):
    method = build(name).to(dtype)
    views = make_views(8, generator)
    views = dataclasses.replace(views, inputs=tuple(each.to(dtype) for each in views.inputs))
    for _ in range(2):  # the second one meets filled banks
        loss = method(views).loss
        loss.backward()
        method.after_step()
    assert bool(torch.isfinite(loss))
    assert all(parameter.grad.dtype == dtype for parameter in method.encoder.parameters())


def test_supcon_says_that_it_needs_labels(generator):
    with pytest.raises(UserError, match="SupCon needs labels"):
        build("supcon")(Views(make_views(4, generator).inputs))


def test_simclr_v2_keeps_a_part_of_its_head_for_fine_tuning(generator):
    method = build("simclr-v2").eval()
    encoder = method.fine_tuning_encoder().eval()
    x = make_views(4, generator).inputs[0]
    assert encoder(x).shape == (4, 64)
    assert encoder.feature_dim == 64
    head = method.projector[0]
    assert torch.equal(encoder(x), head[2](head[1](head[0](method.encoder(x)))))
    none = build("simclr-v2", kept_layers=0).eval().fine_tuning_encoder()
    assert none(x).shape == (4, none.feature_dim) == (4, 16)
    with pytest.raises(UserError, match="--kept-layers = 3"):
        build("simclr-v2", kept_layers=3)


def test_simclr_v2_without_memory_is_simclr_behind_its_own_head(generator):
    method = build("simclr-v2", queue_size=0)
    views = make_views(8, generator)
    projected = method.projector(method.encoder(torch.cat(views.inputs)))
    assert float(method(views).loss.detach()) == pytest.approx(float(nt_xent(*projected.detach().chunk(2))), rel=1e-5)
    assert not any("queue" in name for name in method.state_dict())


def test_the_momentum_of_scheduled_methods_rises_to_one():
    for name in ("byol", "moco-v3"):
        method = build(name)
        method.set_total_steps(20)
        assert method.momentum_encoder.current_momentum == pytest.approx(0.9)
        train(method, 20)
        assert method.momentum_encoder.current_momentum == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vicreg", {"covariance": -1.0}, "--covariance = -1.0; it must be at least 0"),
        ("vicreg", {"invariance": -1.0}, "--invariance = -1.0; it must be at least 0"),
        ("vicreg", {"variance": math.nan}, "--variance = nan; it must be a finite number"),
        ("barlow-twins", {"offdiagonal_weight": math.inf}, "--offdiagonal-weight = inf; it must be a finite number"),
        ("npid", {"temperature": math.inf}, "--temperature = inf; it must be a finite number"),
    ],
)
def test_weights_and_temperatures_that_no_loss_can_use_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        get_method(name).config_class(**options)


@pytest.mark.parametrize("name", ["barlow-twins", "byol", "nnclr", "simsiam", "vicreg"])
def test_a_batch_of_one_is_refused_where_batch_norm_trains(name, generator):
    method = build(name)
    with pytest.raises(UserError, match="a batch of 1 sample, which its BatchNorm layers can't train on"):
        method(make_views(1, generator))


def test_a_batch_of_one_is_evaluated(generator):
    objective = build("byol").eval()(make_views(1, generator))
    assert math.isfinite(float(objective.loss.detach()))
