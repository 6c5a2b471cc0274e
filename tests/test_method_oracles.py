"""Methods against their papers' equations as loops over plain floats, for two steps and more; and their options."""

import copy
import dataclasses

import oracles
import pytest
import torch
from conftest import LinearEncoder
from torch import nn

from contrastive_mm.methods import METHODS, get_method
from contrastive_mm.views import Views

ROWS = 8
HEAD = {"hidden_dim": 10, "projection_dim": 6}
SMALL = {
    "barlow-twins": HEAD,
    "byol": {**HEAD, "momentum": 0.8},
    "curl": {"latent_dim": 6, "momentum": 0.8},
    "dcl": HEAD,
    "moco": {**HEAD, "queue_size": 12, "momentum": 0.8},
    "moco-v3": {**HEAD, "momentum": 0.8},
    "nnclr": {**HEAD, "queue_size": 12},
    "npid": {"projection_dim": 6, "bank_size": 20, "negatives": 5, "temperature": 0.2},
    "simclr": HEAD,
    "simclr-v2": {**HEAD, "queue_size": 20, "momentum": 0.8},
    "simcse": {},
    "simsiam": {**HEAD, "prediction_hidden_dim": 4},
    "supcon": HEAD,
    "swav": {
        **HEAD,
        "num_prototypes": 5,
        "queue_size": 6,
        "queue_start_steps": 1,
        "freeze_prototypes_steps": 1,
    },
    "vicreg": HEAD,
}


def build(name, **options):
    torch.manual_seed(0)
    method_class = get_method(name)
    return method_class(LinearEncoder(), method_class.config_class(**{**SMALL[name], **options})).double()


def make_views(step, count=2):
    generator = torch.Generator().manual_seed(step)
    samples = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, ROWS, 6, generator=generator, dtype=torch.float64)
    ids = torch.arange(ROWS)
    return Views(tuple(samples + 0.5 * noise), num_global=2, sample_ids=ids, labels=ids % 3)


def take_step(method, views):
    """One step of gradient descent, large enough to tell a slow encoder from the one that it follows."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.5)
    loss = method(views).loss
    loss.backward()
    optimizer.step()
    method.after_step()
    return float(loss.detach())


def unit(rows):
    return nn.functional.normalize(rows, dim=1)


@torch.no_grad()
def encode_together(encoder, views):
    """Features of each view; BatchNorm normalises over the rows of all of them."""
    return encoder(torch.cat(views.inputs)).split(ROWS)


def weights_of(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def assert_slow_weights(method, before, share):
    """The momentum encoder's weights are ``share`` of what they were and the rest of the trained ones."""
    online = weights_of(method.encoder, method.projector)
    for old, now, fast in zip(before, weights_of(method.momentum_encoder), online, strict=True):
        torch.testing.assert_close(now, share * old + (1 - share) * fast)
    assert any(not torch.allclose(old, fast, rtol=1e-3) for old, fast in zip(before, online, strict=True))


def test_nnclr_is_equation_4_with_neighbours_for_three_steps():
    method, queue = build("nnclr", temperature=0.3, queue_size=24), []
    for step in range(3):
        views, model = make_views(step), copy.deepcopy(method)
        projected = encode_together(nn.Sequential(model.encoder, model.projector), views)
        predicted = [model.predictor(view).tolist() for view in projected]
        own = [unit(view).tolist() for view in projected]
        neighbours = own
        if queue:
            neighbours = [[max(queue, key=lambda row: oracles.dot(row, x)) for x in view] for view in own]
        expected = sum(
            oracles.info_nce(neighbours[i], predicted[1 - i], [], 0.3, oracles.cosine, in_batch=True) / 2
            for i in range(2)
        )
        assert take_step(method, views) == pytest.approx(expected, rel=1e-5), f"step {step}"
        queue += own[0]
    torch.testing.assert_close(method.queue.features().double(), torch.tensor(queue).double())


def test_moco_v3_is_algorithm_1_for_three_steps():
    method = build("moco-v3", temperature=0.3)
    for step in range(3):
        views, model = make_views(step), copy.deepcopy(method)
        online = nn.Sequential(model.encoder, model.projector, model.predictor)
        queries = [view.tolist() for view in encode_together(online, views)]
        keys = [view.tolist() for view in encode_together(model.momentum_encoder.module, views)]
        directions = [oracles.info_nce(queries[i], keys[1 - i], [], 0.3, oracles.cosine, True) for i in range(2)]
        before = weights_of(method.momentum_encoder)
        assert take_step(method, views) == pytest.approx(2 * 0.3 * sum(directions), rel=1e-5), f"step {step}"
        assert_slow_weights(method, before, 0.8)


def test_simclr_v2_with_memory_compares_with_slow_keys_of_batch_and_queue_for_three_steps():
    method, queue = build("simclr-v2", temperature=0.3, queue_size=48), []
    for step in range(3):
        views, model = make_views(step), copy.deepcopy(method)
        queries = [
            unit(view).tolist() for view in encode_together(nn.Sequential(model.encoder, model.projector), views)
        ]
        keys = [unit(view).tolist() for view in encode_together(model.momentum_encoder.module, views)]
        expected = sum(
            oracles.info_nce(queries[i], keys[1 - i], queue, 0.3, oracles.dot, in_batch=True) / 2 for i in range(2)
        )
        before = weights_of(method.momentum_encoder)
        assert take_step(method, views) == pytest.approx(expected, rel=1e-5), f"step {step}"
        assert_slow_weights(method, before, 0.8)
        queue += keys[0] + keys[1]
    torch.testing.assert_close(method.queue.features().double(), torch.tensor(queue).double())


@pytest.mark.parametrize(
    ("temperature", "epsilon", "iterations"), [(0.1, 0.05, 3), (0.4, 0.05, 3), (0.1, 0.5, 3), (0.1, 0.5, 1)]
)
def test_swav_is_swapped_prediction_with_crops_and_queues_for_three_steps(temperature, epsilon, iterations):
    options = {"temperature": temperature, "epsilon": epsilon, "sinkhorn_iterations": iterations}
    method, queues = build("swav", queue_size=24, **options), [[], []]
    for step in range(3):
        views, model = make_views(step, count=3), copy.deepcopy(method)
        features = [unit(view) for view in encode_together(nn.Sequential(model.encoder, model.projector), views)]
        prototypes = model.prototypes.weight.detach().tolist()

        def score(rows, prototypes=prototypes):
            return [[oracles.dot(row, prototype) for prototype in prototypes] for row in rows]

        scores, queued = [score(view.tolist()) for view in features], [score(queue) for queue in queues]
        expected = oracles.swapped_prediction(scores, 2, temperature, epsilon, iterations, queued)
        assert take_step(method, views) == pytest.approx(expected, rel=1e-5), f"step {step}"
        for queue, view in zip(queues, features, strict=False):
            queue += view.tolist()


NO_EFFECT_IN_TRAINING = {
    ("simclr-v2", "kept_layers"): "it decides what `fine_tuning_encoder` keeps; test_methods.py checks that"
}
OTHER_VALUES = {("dcl", "weight_concentration"): 0.5, ("simclr-v2", "projection_layers"): 2}
# Where a bank lies changes no figure; test_banked_methods.py checks that it lies there.
NO_EFFECT_IN_TRAINING |= {(name, "bank_device"): "" for name in METHODS}
OPTIONS = [
    (name, field.name)
    for name in METHODS
    for field in dataclasses.fields(get_method(name).config_class)
    if (name, field.name) not in NO_EFFECT_IN_TRAINING
]


def other_value(name, option):
    value = getattr(get_method(name).config_class(**SMALL[name]), option)
    if (name, option) in OTHER_VALUES:
        return OTHER_VALUES[name, option]
    if option == "bank_dtype":
        return "float16"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2


def training(name, **options):
    """Losses of two steps and the state after them."""
    method = build(name, **options)
    losses = [take_step(method, make_views(step)) for step in range(2)]
    return {"losses": torch.tensor(losses), **copy.deepcopy(method.state_dict())}


def same_value(first, second):
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return first == second


def same(first, second):
    return first.keys() == second.keys() and all(same_value(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_changes_what_two_steps_do(name, option):
    usual = training(name)
    assert same(usual, training(name)), "two runs with the same options differ: nothing is told by a difference"
    assert not same(usual, training(name, **{option: other_value(name, option)}))


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_leaves_no_trace_in_the_state(name):
    method = build(name)
    take_step(method, make_views(0))
    looked, before = copy.deepcopy(method).eval(), copy.deepcopy(method.state_dict())
    with torch.no_grad():
        looked(make_views(1))
    assert same(looked.state_dict(), before)
    # A step moves slow encoders and counters whatever was evaluated before it; banks must get nothing of that.
    looked.train().after_step()
    method.after_step()
    assert same(looked.state_dict(), method.state_dict())
