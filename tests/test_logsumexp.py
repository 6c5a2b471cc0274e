"""The tiled form equals the plain one, which equals a loop; on shapes, masks, scales and types of all kinds."""

import itertools
import math

import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.losses import cross_logsumexp, self_logsumexp, tiled, two_way_logsumexp, use_form


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(tiled.BLOCKS, "cpu", 8)


def random(*shape, dtype=torch.float64, scale=1.0, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * scale).to(dtype)


def both_forms(compute, *inputs):
    """Values and gradients (of a sum with unequal weights) in the plain and in the tiled form."""
    results = []
    for form in ("plain", "tiled"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_form(form):
            values = compute(*leaves)
        finite = values.masked_fill(values.isinf(), 0.0)
        (finite * torch.linspace(0.5, 2.0, len(values), dtype=values.dtype)).sum().backward()
        results.append((values.detach(), *(leaf.grad for leaf in leaves)))
    return zip(*results, strict=True)


def assert_same(compute, *inputs, tolerance):
    for plain, tiles in both_forms(compute, *inputs):
        size = float(plain.masked_fill(plain.isinf(), 0.0).abs().max())
        torch.testing.assert_close(tiles, plain, rtol=tolerance, atol=tolerance * max(1.0, size))


SCALES = {torch.float64: (0.3, 3.0, 12.0), torch.float32: (0.3, 1.5, 6.0)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}
CASES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


@pytest.mark.parametrize(("dtype", "scale"), CASES)
@pytest.mark.parametrize("rows", [2, 7, 8, 9, 16, 23])
def test_rows_among_themselves(dtype, scale, rows):
    x = random(rows, 5, dtype=dtype, scale=scale)
    for period, ids in itertools.product((None, max(1, rows // 2), 3), (None, torch.arange(rows) % 4)):
        assert_same(lambda z, p=period, i=ids: self_logsumexp(z, p, i), x, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "scale"), CASES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 20), (20, 5), (16, 8), (9, 17)])
def test_queries_over_keys(dtype, scale, queries, keys):
    q, k = random(queries, 5, dtype=dtype, scale=scale), random(keys, 5, dtype=dtype, seed=1)
    numbers = torch.arange(queries) % 3, torch.arange(keys) % 5
    for ids, period, shift in itertools.product((None, numbers), (0, keys, 4), (0, 3)):
        masks = {"query_ids": ids[0], "key_ids": ids[1]} if ids else {}
        masks |= {"period": period, "shift": shift}
        assert_same(lambda a, b, m=masks: cross_logsumexp(a, b, **m), q, k, tolerance=TOLERANCE[dtype])
        # A queue: its keys want no gradient, and one pass gives the query's.
        assert_same(lambda a, m=masks: cross_logsumexp(a, k, **m), q, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "scale"), CASES)
def test_both_directions(dtype, scale):
    a, b = random(19, 5, dtype=dtype, scale=scale), random(10, 5, dtype=dtype, seed=1)
    for ids in ((None, None), (torch.arange(19) % 7, torch.arange(10) % 7)):
        assert_same(lambda x, y, i=ids: torch.cat(two_way_logsumexp(x, y, *i)), a, b, tolerance=TOLERANCE[dtype])


def test_the_plain_form_equals_a_loop():
    x, y = random(6, 3).tolist(), random(4, 3, seed=1).tolist()

    def expected(row, others):
        return math.log(sum(math.exp(sum(a * b for a, b in zip(row, other, strict=True))) for other in others))

    with use_form("plain"):
        among = self_logsumexp(torch.tensor(x, dtype=torch.float64), period=3)
        across = cross_logsumexp(*(torch.tensor(v, dtype=torch.float64) for v in (x, y)), period=4, shift=1)
    for i in range(6):
        assert float(among[i]) == pytest.approx(expected(x[i], [x[j] for j in range(6) if (i - j) % 3]))
        assert float(across[i]) == pytest.approx(expected(x[i], [y[j] for j in range(4) if (j - i - 1) % 4]))


@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_a_row_that_is_compared_with_nothing_costs_nothing(form):
    x = random(10, 4, dtype=torch.float32).requires_grad_()
    with use_form(form):
        values = self_logsumexp(x, ids=torch.zeros(10, dtype=torch.long))
        together = torch.logaddexp(values, torch.zeros(10)).sum()
    assert values.isinf().all()
    together.backward()
    assert float(together.detach()) == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert cross_logsumexp(x, x[:0]).isinf().all()


def test_many_shapes_at_random(generator):
    for _ in range(40):
        rows, dim = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(2))
        scale = float(torch.rand((), generator=generator)) * 4
        seed = int(torch.randint(1000, (), generator=generator))
        x = random(rows + 1, dim, dtype=torch.float64, scale=scale, seed=seed)
        assert_same(self_logsumexp, x, tolerance=1e-10)


def test_gradients_equal_finite_differences():
    x, y = random(11, 3).requires_grad_(), random(9, 3, seed=1).requires_grad_()
    with use_form("tiled"):
        assert torch.autograd.gradcheck(self_logsumexp, x)
        assert torch.autograd.gradcheck(two_way_logsumexp, (x, y))
        assert torch.autograd.gradcheck(lambda a: cross_logsumexp(a, y.detach()), x)


def test_small_inputs_can_be_differentiated_twice_and_the_tiled_form_says_that_it_can_not():
    x = random(12, 3).requires_grad_()
    with use_form("plain"):
        assert torch.autograd.gradgradcheck(self_logsumexp, x)
    with use_form("tiled"):
        (slope,) = torch.autograd.grad(self_logsumexp(x).sum(), x, create_graph=True)
        with pytest.raises(UserError, match="can't be differentiated twice"):
            slope.sum().backward()


def test_the_form_is_chosen_by_size_and_put_back():
    x = random(40, 3, dtype=torch.float32).requires_grad_()
    assert "self_logsumexp" not in repr(self_logsumexp(x).grad_fn), "small: plain"
    with use_form("tiled"):
        assert "self_logsumexp" in repr(self_logsumexp(x).grad_fn)
    big = random(300, 3, dtype=torch.float32).requires_grad_()
    assert "self_logsumexp" in repr(self_logsumexp(big).grad_fn)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_keep_their_contract_with_the_compiler():
    from contrastive_mm.losses import operators

    x = random(20, 4, dtype=torch.float32).requires_grad_()
    y = random(9, 4, dtype=torch.float32, seed=1).requires_grad_()
    torch.library.opcheck(operators.self_logsumexp.compiled, (x, 20, None, "tiled"))
    torch.library.opcheck(operators.cross_logsumexp.compiled, (x, y, None, None, 0, 0, True, False, "tiled"))
    torch.library.opcheck(operators.cross_logsumexp.compiled, (x, y.detach(), None, None, 9, 1, False, True, "tiled"))
    scale = torch.tensor([5.0], requires_grad=True)
    torch.library.opcheck(operators.views_logsumexp.compiled, (x, scale, True, 10, "tiled"))
