"""Methods on a small problem whose answer is known: samples of a cluster share six numbers, ten more are noise."""

import copy
import dataclasses
import math

import oracles
import pytest
import torch
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.losses import info_nce, nt_xent
from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.losses.vicreg import vicreg
from contrastive_mm.memory import FeatureQueue, InstanceBank
from contrastive_mm.methods import CURL, METHODS, CURLConfig, SwAVConfig, get_method, nnclr, npid
from contrastive_mm.views import Views

CLUSTERS, SIGNAL, NOISE = 8, 6, 10
HEAD = {"hidden_dim": 64, "projection_dim": 32}
SMALL = {
    "barlow-twins": {"hidden_dim": 64, "projection_dim": 64},
    "byol": {**HEAD, "momentum": 0.9},
    "curl": {"latent_dim": 32},
    "dcl": {**HEAD, "weight_concentration": 0.5},
    "moco": {**HEAD, "queue_size": 512, "momentum": 0.9},
    "moco-v3": {**HEAD, "momentum": 0.9},
    "nnclr": {**HEAD, "queue_size": 512},
    "npid": {"projection_dim": 32, "bank_size": 256, "negatives": 64, "temperature": 0.2},
    "simclr": HEAD,
    "simclr-v2": {**HEAD, "queue_size": 256, "momentum": 0.9},
    "simcse": {"temperature": 0.1},
    "simsiam": {"hidden_dim": 64, "projection_dim": 64, "prediction_hidden_dim": 32},
    "supcon": HEAD,
    "swav": {"hidden_dim": 64, "projection_dim": 32, "num_prototypes": 24, "freeze_prototypes_steps": 10},
    "vicreg": {"hidden_dim": 64, "projection_dim": 64},
}


class Encoder(nn.Sequential):
    feature_dim = 16

    def __init__(self):
        super().__init__(nn.Linear(SIGNAL + NOISE, 64), nn.ReLU(), nn.Linear(64, 16))


def samples(count, generator):
    centres = torch.randn(CLUSTERS, SIGNAL, generator=torch.Generator().manual_seed(9))
    cluster = torch.arange(count) % CLUSTERS
    return centres[cluster] + 0.2 * torch.randn(count, SIGNAL, generator=generator), cluster


def view(signal, generator):
    noise = 2 * torch.randn(len(signal), NOISE, generator=generator)
    return torch.cat([signal + 0.2 * torch.randn(signal.shape, generator=generator), noise], dim=1)


def make_views(count, generator, crops=0):
    signal, cluster = samples(count, generator)
    views = tuple(view(signal, generator) for _ in range(2 + crops))
    return Views(views, sample_ids=torch.arange(count), labels=cluster)


def neighbour_accuracy(encoder):
    generator = torch.Generator().manual_seed(77)
    signal, cluster = samples(256, generator)
    with torch.no_grad():
        features = nn.functional.normalize(encoder.eval()(view(signal, generator)), dim=1)
    encoder.train()
    nearest = (features @ features.T).fill_diagonal_(-1).topk(5).indices
    return float((cluster[nearest] == cluster[:, None]).float().mean())


def build(name, **options):
    torch.manual_seed(0)
    method_class = get_method(name)
    return method_class(Encoder(), method_class.config_class(**{**SMALL.get(name, {}), **options}))


def train(method, steps, generator=None, crops=0, batch=128):
    generator = generator or torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    for _ in range(steps):
        objective = method(make_views(batch, generator, crops))
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        method.after_step()
    return objective


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


def slow_encoder(method):
    """The key encoder as it is now, as plain code: a copy of weights into a fresh pair of encoder and head."""
    return copy.deepcopy(method.momentum_encoder.module).train()


def unit_lists(features):
    return nn.functional.normalize(features.detach(), dim=1).tolist()


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
