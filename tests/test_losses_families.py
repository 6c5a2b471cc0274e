import inspect
import itertools
import math

import oracles
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from contrastive_mm.errors import UserError
from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.losses.logsumexp import use_form
from contrastive_mm.losses.regression import negative_cosine
from contrastive_mm.losses.sigmoid import sigmoid_loss, sum_over_pairs
from contrastive_mm.losses.swapped import sinkhorn, swapped_prediction
from contrastive_mm.losses.triplet import triplet_margin
from contrastive_mm.losses.vicreg import vicreg

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half-precision features are the input's own rounding; what is computed of them is in float32.
TOLERANCE = {torch.float64: 1e-10}

PAIR_LOSSES = {
    "barlow_twins": barlow_twins,
    "negative_cosine": negative_cosine,
    "sigmoid_loss": sigmoid_loss,
    "swapped_prediction": lambda first, second: swapped_prediction([first, second]),
    "triplet_hard": lambda first, second: triplet_margin(first, second, margin=2.0, mining="hard"),
    "triplet_none": lambda first, second: triplet_margin(first, second, margin=2.0, mining="none"),
    "triplet_semi_hard": lambda first, second: triplet_margin(first, second, margin=2.0),
    "triplet_soft": lambda first, second: triplet_margin(first, second, None, normalize=False, squared=False),
    "vicreg": vicreg,
}


def features(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(*tensors):
    return [tensor.double().tolist() for tensor in tensors]


def assert_equals(loss, expected, dtype):
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss.detach()) == pytest.approx(expected, rel=TOLERANCE.get(dtype, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1), (0.01, 10)])
def test_sinkhorn_equals_the_loop(dtype, epsilon, iterations):
    scores = features(9, 4, dtype=dtype).clamp(-1, 1)
    codes = sinkhorn(scores, epsilon, iterations)
    expected = torch.tensor(oracles.sinkhorn(scores.tolist(), epsilon, iterations), dtype=torch.float64)
    torch.testing.assert_close(codes.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(codes.sum(1), torch.ones_like(codes[:, 0]))


def test_sinkhorn_uses_every_prototype_equally_where_the_scores_would_not():
    scores = features(60, 3) * 0.1 + torch.tensor([1.0, 0.0, 0.0])
    assert sinkhorn(scores, 0.05, 50).sum(0).tolist() == pytest.approx([20, 20, 20], rel=1e-3)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-4])
def test_sinkhorn_of_a_small_epsilon_is_a_hard_assignment(epsilon):
    # exp(1 / epsilon) is beyond any floating-point number here.
    scores = torch.eye(4).repeat(3, 1) * 2 - 1
    torch.testing.assert_close(sinkhorn(scores, epsilon), torch.eye(4).repeat(3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize(("views", "num_global"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("queued", [0, 5])
def test_swapped_prediction_equals_the_loop(dtype, temperature, views, num_global, queued):
    scores = [features(6, 4, dtype=dtype, seed=view).clamp(-1, 1) for view in range(views)]
    queues = [features(queued, 4, dtype=dtype, seed=10 + view).clamp(-1, 1) for view in range(num_global)]
    loss = swapped_prediction(scores, num_global, temperature, 0.1, 3, queues if queued else None)
    expected = oracles.swapped_prediction(plain(*scores), num_global, temperature, 0.1, 3, plain(*queues))
    assert_equals(loss, expected, dtype)


def test_codes_and_queue_receive_no_gradient():
    scores = [features(6, 4, seed=view).requires_grad_() for view in range(2)]
    queue = [features(3, 4, seed=2 + view).requires_grad_() for view in range(2)]
    swapped_prediction(scores, 1, queue_scores=queue[:1]).backward()
    assert scores[0].grad is None, "the full view gives the codes and predicts none"
    assert scores[1].grad is not None
    assert queue[0].grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 7])
def test_barlow_twins_equals_the_loop(dtype, count):
    first, second = features(count, 5, dtype=dtype), features(count, 5, dtype=dtype, seed=1)
    assert_equals(barlow_twins(first, second, 0.01), oracles.barlow_twins(*plain(first, second), 0.01), dtype)


def test_barlow_twins_of_equal_uncorrelated_dimensions_is_zero():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(barlow_twins(signs, 3 * signs + 5)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_vicreg_equals_the_loop(dtype, weights):
    first, second = features(6, 5, dtype=dtype) * 0.5, features(6, 5, dtype=dtype, seed=1) * 2
    assert_equals(vicreg(first, second, *weights), oracles.vicreg(*plain(first, second), *weights), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_cosine_equals_the_loop_and_spares_the_target(dtype):
    first, second = features(6, 5, dtype=dtype).requires_grad_(), features(6, 5, dtype=dtype, seed=1).requires_grad_()
    loss = negative_cosine(first, second)
    pairs = zip(*plain(first.detach(), second.detach()), strict=True)
    assert_equals(loss, -oracles.mean([oracles.cosine(a, b) for a, b in pairs]), dtype)
    loss.backward()
    assert first.grad is not None
    assert second.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "bias"), [(0.1, -10), (0.01, -3.5), (1.0, 0.0)])
@pytest.mark.parametrize("form", ["plain", "tiled"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_sigmoid_loss_equals_the_loop(dtype, temperature, bias, form, similarity):
    first, second = features(7, 5, dtype=dtype) / 4, features(7, 5, dtype=dtype, seed=1) / 4
    with use_form(form):
        loss = sigmoid_loss(first, second, temperature, bias, similarity)
    measure = getattr(oracles, similarity)
    assert_equals(loss, oracles.sigmoid_loss(*plain(first, second), temperature, bias, measure), dtype)


@pytest.mark.parametrize("count", [256, 300, 513])
def test_sigmoid_gradients_of_tiles_equal_autograd(count):
    inputs = [features(count, 6), features(count, 6, seed=1), torch.tensor(0.2).double(), torch.tensor(-2.0).double()]
    inputs = [each.requires_grad_() for each in inputs]
    results = {}
    for form in ("plain", "tiled"):
        with use_form(form):
            loss = sigmoid_loss(*inputs)
        results[form] = [loss.detach(), *torch.autograd.grad(3 * loss, inputs)]
    for tiled, whole in zip(results["tiled"], results["plain"], strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 4, 290])
def test_sigmoid_pairs_of_rows_among_gathered_columns(offset):
    # What each of several processes computes: its own rows against the columns of all.
    query, key, bias = features(280, 4).requires_grad_(), features(600, 4, seed=1).requires_grad_(), torch.tensor(0.5)
    inputs = (query, key, bias.double().requires_grad_())
    results = {}
    for form in ("plain", "tiled"):
        with use_form(form):
            total = sum_over_pairs(*inputs, offset)
        results[form] = [total.detach(), *torch.autograd.grad(total, inputs)]
    for tiled, whole in zip(results["tiled"], results["plain"], strict=True):
        torch.testing.assert_close(tiled, whole)


def test_sigmoid_of_a_frozen_tower_and_without_gradients():
    first, second = features(300, 4).requires_grad_(), features(300, 4, seed=1)
    loss = sigmoid_loss(first, second)
    loss.backward()
    assert first.grad is not None
    with torch.no_grad():
        assert float(sigmoid_loss(first, second)) == pytest.approx(float(loss.detach()))


def test_a_second_derivative_of_the_tiled_sigmoid_is_refused():
    first = features(300, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(sigmoid_loss(first, features(300, 4, seed=1)), first, create_graph=True)
    with pytest.raises(UserError, match="differentiated twice"):
        gradient.square().sum().backward()


def test_the_sigmoid_loss_holds_no_matrix_of_pairs():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            parts = result if isinstance(result, tuple | list) else [result]
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            return result

    first, second = features(1000, 8).requires_grad_(), features(1000, 8, seed=1)
    with Watch():
        sigmoid_loss(first, second).backward()
        triplet_margin(first, second).backward()
    assert max(sizes) <= 256 * 1000


LABELS = {"samples": [0, 1, 2, 3, 4, 5, 6], "classes": [0, 1, 0, 2, 1, 0, 2], "one class": [5, 5, 5, 5, 5, 5, 6]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mining", ["semi-hard", "hard", "none"])
@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize(
    ("margin", "normalize", "squared"), [(0.2, True, True), (1.0, False, False), (None, True, True)]
)
def test_triplet_margin_equals_the_loop(dtype, mining, labels, margin, normalize, squared):
    first, second = features(7, 5, dtype=dtype), features(7, 5, dtype=dtype, seed=1)
    classes = LABELS[labels]
    given = None if labels == "samples" else torch.tensor(classes)
    loss = triplet_margin(first, second, margin, given, mining, normalize, squared)
    options = (margin, classes, mining, normalize, squared)
    assert_equals(loss, oracles.triplet_margin(*plain(first, second), *options), dtype)


@pytest.mark.parametrize("mining", ["semi-hard", "hard"])
def test_an_offset_that_all_features_share_changes_no_triplet(mining):
    anchor = torch.randn(32, 16) + 1000
    positive = anchor + torch.randn(32, 16)
    loss = triplet_margin(anchor, positive, 1.0, None, mining, normalize=False)
    options = (1.0, list(range(32)), mining, False, True)
    assert_equals(loss, oracles.triplet_margin(*plain(anchor, positive), *options), torch.float32)


def test_triplets_are_the_same_in_any_number_of_blocks(monkeypatch):
    first, second = features(40, 4), features(40, 4, seed=1)
    labels = torch.arange(40) % 7
    whole = [triplet_margin(first, second, 0.3, labels, mining) for mining in ("semi-hard", "hard", "none")]
    monkeypatch.setattr("contrastive_mm.losses.triplet.MINING_ROWS", 9)
    parts = [triplet_margin(first, second, 0.3, labels, mining) for mining in ("semi-hard", "hard", "none")]
    assert parts == whole


def test_without_a_farther_negative_the_farthest_is_taken():
    anchor = torch.tensor([[0.0], [100.0]])
    positive = torch.tensor([[9.0], [1.0]])
    # For the first anchor the only negative is nearer than its positive; the second has the opposite of trouble.
    loss = triplet_margin(anchor, positive, 0.5, normalize=False, squared=False)
    assert float(loss) == pytest.approx((9 - 1 + 0.5) / 2 + (99 - 91 + 0.5) / 2)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "swapped_prediction"])
def test_gradients_equal_finite_differences(name):
    first, second = features(6, 4).requires_grad_(), features(6, 4, seed=1)
    assert torch.autograd.gradcheck(lambda a: PAIR_LOSSES[name](a, second), first)
    if name != "negative_cosine":
        assert torch.autograd.gradcheck(lambda b: PAIR_LOSSES[name](first.detach(), b), second.requires_grad_())


def test_swapped_predictions_gradient_equals_finite_differences():
    full, crops = features(6, 4), [features(6, 4, seed=1).requires_grad_(), features(6, 4, seed=2)]
    assert torch.autograd.gradcheck(lambda crop: swapped_prediction([full, crop, crops[1]], 1), crops[0])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_autocast_does_not_lower_the_precision(name):
    first, second = features(64, 16, dtype=torch.float32), features(64, 16, dtype=torch.float32, seed=1)
    expected = PAIR_LOSSES[name](first.double(), second.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = PAIR_LOSSES[name](first, second)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_temperatures_and_collapsed_features_stay_finite(dtype):
    same = torch.ones(8, 4, dtype=dtype).requires_grad_()
    other = features(8, 4, dtype=dtype)
    losses = [
        sigmoid_loss(same, other, 0.001),
        swapped_prediction([same, other], temperature=0.001, epsilon=0.001),
        barlow_twins(same, other),
        vicreg(same, other),
        triplet_margin(same, same, normalize=False, squared=False),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, same)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


PUBLIC = [barlow_twins, vicreg, negative_cosine, sigmoid_loss, triplet_margin]


@pytest.mark.parametrize("loss", PUBLIC)
def test_bad_pairs_are_named(loss):
    # Without the tests' own shape checks, as a user calls it.
    loss = inspect.unwrap(loss)
    good = torch.randn(4, 3)
    with pytest.raises(UserError, match=r"shape \(4, 3\) and .* \(4, 2\)"):
        loss(good, good[:, :2])
    with pytest.raises(UserError, match="floating point"):
        loss(good.int(), good.int())
    with pytest.raises(UserError, match=r"holds NaN or infinity in 1 of 4 rows \(row 2\)"):
        loss(good, good.index_fill(0, torch.tensor([2]), math.nan))
    with pytest.raises(UserError, match="no rows"):
        loss(good[:0], good[:0])
    if loss is not inspect.unwrap(negative_cosine):
        with pytest.raises(UserError, match="at least 2"):
            loss(good[:1], good[:1])


def test_bad_options_are_named():
    good = torch.randn(4, 3)
    cases = [
        (lambda: sinkhorn(good, 0.0), "epsilon = 0.0"),
        (lambda: sinkhorn(good, iterations=0), "iterations = 0"),
        (lambda: inspect.unwrap(sinkhorn)(good.int()), "`scores` holds torch.int32"),
        (lambda: swapped_prediction([good]), "`scores` holds 1, give at least 2"),
        (lambda: swapped_prediction([good, good], 3), "num_global = 3"),
        (lambda: swapped_prediction([good, good], temperature=0.0), "temperature = 0"),
        (lambda: swapped_prediction([good, good], queue_scores=[good]), "one for each of 2 views"),
        (lambda: inspect.unwrap(swapped_prediction)([good, good[:, :2]]), r"`scores\[1\]` \(4, 2\)"),
        (lambda: inspect.unwrap(swapped_prediction)([good, good], 1, queue_scores=[good[:, :2]]), "2 dimensions"),
        (lambda: swapped_prediction([good[:1], good[:1]]), "without a queue needs at least 2 samples"),
        (lambda: sigmoid_loss(good, good, 0.0), "temperature = 0"),
        (lambda: inspect.unwrap(sigmoid_loss)(good, good, bias=torch.zeros(2)), r"`bias` has shape \(2,\)"),
        (lambda: triplet_margin(good, good, -1.0), "margin = -1"),
        (lambda: inspect.unwrap(triplet_margin)(good, good, mining="easy"), "mining = 'easy'"),
        (lambda: triplet_margin(good, good, labels=torch.zeros(4, dtype=torch.long)), "no negative"),
        (lambda: inspect.unwrap(triplet_margin)(good, good, labels=torch.zeros(3).long()), "`labels` has shape"),
        (lambda: inspect.unwrap(triplet_margin)(good, good, labels=torch.zeros(4)), "whole numbers"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()


# Several processes: the gradients of a small encoder under DistributedDataParallel's average, against one process.

ROWS = 12
SPLITS = {"even": [6, 6], "uneven": [8, 4]}


def of_swapped_prediction(encoder, first, second, rows):
    prototypes = features(4, 4, seed=5)
    # Each process brings the part of the queue that has the numbers of its own rows.
    queue = [features(ROWS, 4, seed=7 + view)[rows] @ prototypes.T for view in range(2)]
    scores = [encoder(view[rows]) @ prototypes.T for view in (first, second, first + second)]
    return swapped_prediction(scores, 2, queue_scores=queue)


def of_barlow_twins(encoder, first, second, rows):
    return barlow_twins(encoder(first[rows]), encoder(second[rows]))


def of_vicreg(encoder, first, second, rows):
    return vicreg(encoder(first[rows]), encoder(second[rows]))


OBJECTIVES = [of_swapped_prediction, of_barlow_twins, of_vicreg]


def loss_and_gradients(objective, rows):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).double()
    first, second = features(ROWS, 5), features(ROWS, 5, seed=1)
    loss = objective(encoder, first, second, rows)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in encoder.parameters()]


def work(rank):
    results = {}
    for (name, split), objective in itertools.product(SPLITS.items(), OBJECTIVES):
        start = sum(split[:rank])
        loss, gradients = loss_and_gradients(objective, list(range(start, start + split[rank])))
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= 2
        results[f"{objective.__name__} {name}"] = (loss, gradients)
    scores = features(ROWS, 3)
    results["codes"] = sinkhorn(scores[:7] if rank == 0 else scores[7:], 0.01)
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_have_the_gradients_of_one(two_processes, objective, split):
    loss, gradients = loss_and_gradients(objective, list(range(ROWS)))
    for result in two_processes:
        other_loss, others = result[f"{objective.__name__} {split}"]
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-9)
        mine, theirs = (torch.cat([each.flatten() for each in part]) for part in (gradients, others))
        assert float(theirs.norm() / mine.norm()) == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(theirs, mine)


def test_codes_of_two_processes_are_those_of_one(two_processes):
    whole = sinkhorn(features(ROWS, 3), 0.01)
    torch.testing.assert_close(torch.cat([result["codes"] for result in two_processes]), whole)
