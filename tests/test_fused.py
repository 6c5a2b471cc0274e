"""The Triton kernels equal float64, interpreted where there is no GPU; and they compile for GPUs that aren't here.

The interpreter checks the mathematics of a kernel and the bounds of its loads, not what programs do to each other.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.losses import (
    availability,
    cross_logsumexp,
    dcl,
    fused,
    info_nce,
    nt_xent,
    operators,
    self_logsumexp,
    supcon,
    two_way_logsumexp,
    use_form,
)
from contrastive_mm.losses.exclusion import Exclusion

nvidia_compiler = pytest.importorskip("triton.backends.nvidia.compiler")
kernels = pytest.importorskip("contrastive_mm.losses.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Weights of pairs and gradients are rounded to the features' own type; a log-sum-exp in float32 is not.
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def interpreter():
    """Skip where Triton's own interpreter fails: that of 3.2 does in every loop, with a warning until NumPy 2.4."""
    try:
        fused.self_forward(random(20, 5), Exclusion(20))
    except Exception as error:
        if "only 0-dimensional arrays" in str(error) or "ndim > 0 to a scalar" in str(error):
            pytest.skip("this Triton's interpreter doesn't run with this NumPy")
        raise


@pytest.fixture(autouse=True)
def small_programs(monkeypatch, request):
    if "compile_for" not in request.node.name:
        request.getfixturevalue("interpreter")
    # Several programs, blocks and parts from few rows.
    if DEVICE == "cpu":
        monkeypatch.setattr(fused, "_sizes", lambda features: fused._Sizes(16, 16, 4, 1))


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * scale).to(DEVICE, dtype)


def assert_equals_float64(compute, *inputs, exponent=1.0):
    """Values, and the gradients of a sum with unequal weights, against the plain form in float64.

    A share exp(s - lse) is as exact as float32 holds an exponent of this size.
    """
    dtype = inputs[0].dtype
    tolerance = GRADIENT_TOLERANCE[dtype] * max(1.0, exponent / 100)
    results = []
    for form, wide in (("fused", False), ("plain", True)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        with use_form(form):
            values = compute(*leaves).flatten()
        finite = values.masked_fill(values.isinf(), 0.0)
        (finite * torch.linspace(0.5, 2.0, len(values), dtype=values.dtype, device=DEVICE)).sum().backward()
        results.append((values.detach(), *(leaf.grad for leaf in leaves)))
    (value, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == dtype
        size = float(right.abs().max())
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0])
@pytest.mark.parametrize(("rows", "dim"), [(2, 1), (15, 5), (16, 16), (17, 20), (50, 33)])
def test_rows_among_themselves(rows, dim, scale):
    x = random(rows, dim, scale=scale)
    largest = float(x.double().square().sum(1).max())
    assert scale != 6.0 or rows < 15 or largest > fused.LARGEST_EXPONENT, "the online form is reached"
    ids = (torch.arange(rows) % 4).to(DEVICE)
    for period, numbers in itertools.product((None, max(1, rows // 2), 3), (None, ids)):
        assert_equals_float64(lambda z, p=period, i=numbers: self_logsumexp(z, p, i), x, exponent=largest)


@pytest.mark.parametrize("scale", [0.3, 6.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (5, 40), (40, 5), (20, 150)])
def test_queries_over_keys(queries, keys, scale):
    q, k = random(queries, 6, scale=scale), random(keys, 6, seed=1)
    numbers = (torch.arange(queries) % 3).to(DEVICE), (torch.arange(keys) % 5).to(DEVICE)
    for ids, period, shift in ((None, 0, 0), (numbers, 0, 0), (None, keys, 1), (numbers, 4, 3)):
        masks = {"query_ids": ids[0], "key_ids": ids[1]} if ids else {}
        masks |= {"period": period, "shift": shift}
        assert_equals_float64(lambda a, b, m=masks: cross_logsumexp(a, b, **m), q, k)
        # A queue: its keys want no gradient, and one pass gives the query's.
        assert_equals_float64(lambda a, m=masks: cross_logsumexp(a, k.to(a), **m), q)


def test_both_directions():
    a, b = random(17, 5), random(34, 5, seed=1)
    numbers = (torch.arange(17) % 7).to(DEVICE), (torch.arange(34) % 7).to(DEVICE)
    for ids in ((None, None), numbers):
        assert_equals_float64(lambda x, y, i=ids: torch.cat(two_way_logsumexp(x, y, *i)), a, b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.012])
@pytest.mark.parametrize("loss", [nt_xent, dcl])
def test_nt_xent_takes_features_of_any_type_as_they_are(loss, dtype, temperature):
    first, second = random(25, 24, dtype=dtype), random(25, 24, dtype=dtype, seed=1)
    for similarity in ("cosine", "dot"):
        scaled = temperature * (24 if similarity == "dot" else 1)
        assert_equals_float64(lambda a, b, s=similarity, t=scaled: loss(a, b, t, similarity=s), first, second)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_temperature_gets_its_gradient(dtype, similarity):
    first, second = random(20, 8, dtype=dtype), random(20, 8, dtype=dtype, seed=1)
    slopes = {}
    for form, wide in (("fused", dtype), ("plain", torch.float64)):
        temperature = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)
        with use_form(form):
            nt_xent(first.to(wide), second.to(wide), temperature, similarity).backward()
        slopes[form] = float(temperature.grad)
    assert slopes["fused"] == pytest.approx(slopes["plain"], rel=1e-4)


def test_other_losses_go_through_the_kernels_too():
    first, second, queue = random(20, 8), random(20, 8, seed=1), random(50, 8, seed=2)
    labels = (torch.arange(20) % 6).to(DEVICE)
    for compute in (
        lambda a, b: info_nce(a, b, queue.to(a), 0.2, symmetric=True, ids=labels),
        lambda a, b: info_nce(a, b, queue.to(a), 0.2, in_batch_negatives=False),
        lambda a, b: supcon(a, b, labels, 0.2),
    ):
        assert_equals_float64(compute, first, second)


def test_numbers_may_be_of_any_type_and_lie_anywhere():
    x, y = random(40, 6), random(40, 6, seed=1)
    table = torch.stack([torch.arange(40) // 2, torch.arange(40) * 7 % 40], dim=1).to(DEVICE)
    assert_equals_float64(lambda a, b: info_nce(a, b, ids=table[:, 0]), x, y)
    assert_equals_float64(lambda a, b: info_nce(a, b, ids=table[:, 0].to(torch.int16)), x, y)
    negative_ids = torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(40)
    assert_equals_float64(
        lambda a, b: info_nce(a, b, y.to(a), ids=table[:, 0], negative_ids=negative_ids), x, random(40, 6, seed=2)
    )


def test_a_row_that_is_compared_with_nothing_costs_nothing():
    x = random(40, 4).requires_grad_()
    with use_form("fused"):
        values = self_logsumexp(x, ids=torch.zeros(40, dtype=torch.long, device=DEVICE))
        total = torch.logaddexp(values, torch.zeros_like(values)).sum()
    total.backward()
    assert values.isinf().all()
    assert float(total.detach()) == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_values_that_are_not_numbers_come_out_as_such():
    x = random(40, 4)
    x[3, 1] = math.nan
    with use_form("fused"):
        assert self_logsumexp(x).isnan().all()
        assert cross_logsumexp(x, random(60, 4)).isnan().nonzero().flatten().tolist() == [3]


def test_on_demand_the_forward_pass_is_deterministic_and_the_same(monkeypatch):
    x = random(90, 8)
    with use_form("fused"):
        by_halves = self_logsumexp(x)
        monkeypatch.setattr(kernels, "half_forward", None)
        torch.use_deterministic_algorithms(True)
        try:
            by_rows = self_logsumexp(x)
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(by_rows, by_halves)


def test_the_fused_form_says_what_it_takes():
    for x in (random(20, 5, dtype=torch.float64), random(20, 300)):
        with use_form("fused"), pytest.raises(UserError, match="float32 up to D = 128, bfloat16 up to D = 256"):
            self_logsumexp(x)
    with pytest.raises(UserError, match="must be one of auto, plain, tiled, fused"), use_form("fast"):
        pass


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_the_interpreter_is_never_chosen_by_itself():
    assert operators.engine("auto", random(2000, 8)) is operators.tiled
    assert operators.engine("fused", random(2000, 8)) is fused


@pytest.mark.parametrize("name", ["self_forward", "_online", "_backward"])
@pytest.mark.parametrize("mistake", [1.2, math.nan])
def test_kernels_that_give_wrong_values_are_not_trusted(monkeypatch, name, mistake):
    right = getattr(fused, name)

    def wrong(*arguments):
        result = right(*arguments)
        return tuple(part * mistake for part in result) if isinstance(result, tuple) else result * mistake

    availability.is_trusted.cache_clear()
    assert availability.is_trusted(torch.device(DEVICE), torch.float32, 24)
    assert availability.is_trusted(torch.device(DEVICE), torch.bfloat16, 24)
    monkeypatch.setattr(fused, name, wrong)
    with pytest.warns(UserWarning, match="wrong values"):
        assert not availability.is_trusted(torch.device(DEVICE), torch.float32, 23)


def test_kernels_that_do_not_compile_are_not_trusted(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such instruction")

    availability.is_trusted.cache_clear()
    monkeypatch.setattr(fused, "self_forward", broken)
    with pytest.warns(UserWarning, match="no such instruction.*tiled form is used"):
        assert not availability.is_trusted(torch.device(DEVICE), torch.float32, 24)


def test_kernels_compile_for_ampere_and_hopper_and_fit_into_their_memory():
    if not hasattr(nvidia_compiler, "get_ptxas"):
        pytest.skip("this Triton compiles ahead of time in another way")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "triton_targets.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {case["kernel"] for case in found} == {"half_forward", "online_forward", "rows_backward"}
    for case in found:
        # The smallest of these GPUs (capability 8.6 and 8.9) give a program 99 KiB.
        assert case["shared"] <= 99 * 1024, case
        assert case["spilled"] <= 1536, case


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", TYPES)
def test_on_a_gpu_memory_is_a_few_times_the_features(dtype):
    rows, dim = 16384, 128
    first, second = (random(rows, dim, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    with use_form("fused"):
        nt_xent(first[:512], second[:512]).backward()
        first.grad = second.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nt_xent(first, second).backward()
        torch.cuda.synchronize()
    features = 2 * rows * dim * first.element_size()
    assert torch.cuda.max_memory_allocated() - before < 4 * features


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_the_form_is_chosen_by_itself_and_many_rows_are_right():
    x = random(5000, 64, scale=0.3)
    assert operators.engine("auto", x) is fused
    expected = (x.double() @ x.double().T).fill_diagonal_(-math.inf).logsumexp(1)
    torch.testing.assert_close(self_logsumexp(x).double(), expected, rtol=1e-5, atol=1e-5)
