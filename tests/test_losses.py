import inspect
import math

import oracles
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.losses import info_nce, nt_xent


def features(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("count", [2, 7])
def test_nt_xent_equals_the_loop(dtype, temperature, count):
    first, second = features(count, 5, dtype=dtype), features(count, 5, dtype=dtype, seed=1)
    expected = oracles.nt_xent(first.double().tolist(), second.double().tolist(), temperature)
    loss = nt_xent(first, second, temperature)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half-precision features are the input's own rounding; the computation on them is in float32.
    assert float(loss) == pytest.approx(expected, rel=TOLERANCE[dtype] / temperature, abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("in_batch", "extra"), [(True, 0), (True, 4), (False, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_info_nce_equals_the_loop(symmetric, similarity, in_batch, extra, dtype):
    query, key = features(6, 5, dtype=dtype), features(6, 5, dtype=dtype, seed=1)
    negatives = features(extra, 5, dtype=dtype, seed=2) if extra else None
    plain = [] if negatives is None else negatives.double().tolist()
    measure = getattr(oracles, similarity)
    forth = oracles.info_nce(query.tolist(), key.tolist(), plain, 0.2, measure, in_batch)
    back = oracles.info_nce(key.tolist(), query.tolist(), plain, 0.2, measure, in_batch)
    loss = info_nce(query, key, negatives, 0.2, symmetric, similarity, in_batch)
    assert float(loss) == pytest.approx((forth + back) / 2 if symmetric else forth, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("loss", [nt_xent, info_nce, lambda a, b: info_nce(a, b, features(3, 4, seed=9))])
def test_gradients_equal_finite_differences(loss):
    first, second = features(4, 4).requires_grad_(), features(4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b), (first, second))


def test_nt_xent_of_equal_features_is_log_of_the_negatives():
    same = torch.ones(8, 3)
    assert float(nt_xent(same, same)) == pytest.approx(math.log(15), rel=1e-6)


def test_a_positive_among_the_negatives_costs_log_two():
    # What a queue that is pushed before it is read does: the loss can't fall below log 2.
    key = features(4, 32)
    assert float(info_nce(key, key, key, 0.001, in_batch_negatives=False)) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_temperature_stays_finite(dtype):
    first = features(8, 16, dtype=dtype).requires_grad_()
    loss = nt_xent(first, first.detach() + 0.1, 0.001)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(first.grad).all()


def test_autocast_does_not_lower_the_precision():
    first, second = features(64, 32, dtype=torch.float32), features(64, 32, dtype=torch.float32, seed=1)
    expected = nt_xent(first.double(), second.double(), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(first, second, 0.05)
        queue = info_nce(first, second, temperature=0.05)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert queue.dtype == torch.float32


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_bad_input_is_named(loss):
    # Without the tests' own shape checks, as a user calls it.
    loss = inspect.unwrap(loss)
    good = torch.randn(4, 3)
    with pytest.raises(UserError, match=r"shape \(4, 3\) and .* \(4, 2\)"):
        loss(good, good[:, :2])
    with pytest.raises(UserError, match="temperature = 0"):
        loss(good, good, temperature=0.0)
    with pytest.raises(UserError, match="negative"):
        loss(good[:1], good[:1])


def test_negatives_of_other_dimensions_are_named():
    good = torch.randn(4, 3)
    with pytest.raises(UserError, match="floating point"):
        inspect.unwrap(nt_xent)(good.int(), good.int())
    with pytest.raises(UserError, match="`negatives` has 2 dimensions"):
        inspect.unwrap(info_nce)(good, good, torch.randn(5, 2))
    with pytest.raises(UserError, match="queue still empty"):
        info_nce(good, good, in_batch_negatives=False)
