"""Which samples belong together: each kind against weights written out as a matrix, in every loss that takes them."""

import inspect

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_mm.errors import UserError
from contrastive_mm.losses import dcl, info_nce, nt_xent, supcon, use_form
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.positives import Positives

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])
TIMES = torch.tensor([0.0, 1.0, 5.0, 1.5, 4.0, 9.0, 2.0])
PARTNER = torch.tensor([2, 0, 2, 6, 4, 1, 1])  # rows 2 and 4 are their own; nobody's partner is 3 or 5
SHARE = torch.tensor([0.9, 0.0, 0.5, 1.0, 0.6, 0.75, 0.5])
WEIGHTS = torch.tensor([[float((3 * i + 5 * j) % 7 in (0, 2)) * (1 + i + j) for j in range(7)] for i in range(7)])


def written_out(related, partner=None, share=None):
    """W by its definition: related rows, mixed where there are partners."""
    rows = [[float(related(i, j)) for j in range(7)] for i in range(7)]
    if partner is None:
        return rows
    partner, share = partner.tolist(), share.tolist()
    return [
        [share[i] * own + (1 - share[i]) * other for own, other in zip(rows[i], rows[partner[i]], strict=True)]
        for i in range(7)
    ]


KINDS = {
    "same row": (Positives(), written_out(lambda i, j: i == j)),
    "groups": (Positives.of_groups(LABELS), written_out(lambda i, j: LABELS[i] == LABELS[j])),
    "weights": (Positives.weighted(WEIGHTS), written_out(lambda i, j: WEIGHTS[i, j])),
    "booleans": (Positives.weighted(WEIGHTS > 0), written_out(lambda i, j: WEIGHTS[i, j] > 0)),
    "mixed": (Positives.mixed(PARTNER, SHARE), written_out(lambda i, j: i == j, PARTNER, SHARE)),
    "mixed classes": (
        Positives.mixed(PARTNER, SHARE, LABELS),
        written_out(lambda i, j: LABELS[i] == LABELS[j], PARTNER, SHARE),
    ),
    "window": (Positives.within(TIMES, 1.0), written_out(lambda i, j: abs(TIMES[i] - TIMES[j]) <= 1)),
    "window in episodes": (
        Positives.within(TIMES, 4.0, LABELS),
        written_out(lambda i, j: abs(TIMES[i] - TIMES[j]) <= 4 and LABELS[i] == LABELS[j]),
    ),
}
BOTH = pytest.mark.parametrize("name", KINDS)


def features(seed, rows=7):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("swapped", [False, True])
def test_sums_are_those_of_the_matrix(name, swapped):
    positives, rows = KINDS[name]
    matrix, keys = torch.tensor(rows, dtype=torch.float64), features(0).requires_grad_()
    if swapped:
        positives, matrix = positives.transposed(), matrix.T
    positives.check(7)
    torch.testing.assert_close(positives.weighted_sum(keys), matrix @ keys)
    torch.testing.assert_close(positives.totals(keys), matrix.sum(1))
    torch.testing.assert_close(positives.diagonal(keys), matrix.diagonal())
    assert torch.equal(positives.belonging(0, 7, keys), matrix > 0)
    assert torch.equal(positives.belonging(2, 4, keys), (matrix > 0)[2:4])
    weights = features(1)
    (gradient,) = torch.autograd.grad((positives.weighted_sum(keys) * weights).sum(), keys)
    torch.testing.assert_close(gradient, matrix.T @ weights)
    back = positives.transposed().transposed()
    assert torch.equal(back.weighted_sum(keys), positives.weighted_sum(keys))


def of_one_direction(query, key, weights):
    return oracles.mean(
        [
            oracles.cross_entropy(oracles.positives_mean(row, similar), similar)
            for row, similar in (
                (row, [oracles.cosine(anchor, other) / 0.3 for other in key])
                for anchor, row in zip(query, weights, strict=True)
            )
        ]
    )


@pytest.mark.parametrize("form", ["plain", "tiled"])
@BOTH
def test_every_loss_takes_every_kind(name, form):
    positives, weights = KINDS[name]
    first, second = features(0), features(1)
    plain = first.tolist(), second.tolist()
    forth = of_one_direction(*plain, weights)
    back = of_one_direction(*plain[::-1], oracles.columns(weights))
    expected = {
        "nt_xent": oracles.soft_nt_xent(*plain, weights, 0.3),
        "info_nce": forth,
        "info_nce both ways": (forth + back) / 2,
        "info_nce back": back,
        "ring": forth,
        "ring both ways": (forth + back) / 2,
        "supcon": oracles.supcon(plain[0] + plain[1], list(range(7)) * 2, weights, 0.3),
        "supcon, one view": None,
        "dcl": oracles.soft_dcl(*plain, weights, 0.3),
        "dclw": oracles.soft_dcl(*plain, weights, 0.3, 0.5),
    }
    if name != "same row":  # where a lone view has no positive
        expected["supcon, one view"] = oracles.supcon(plain[0], list(range(7)), weights, 0.3)
    with use_form(form):
        found = {
            "nt_xent": nt_xent(first, second, 0.3, positives=positives),
            "info_nce": info_nce(first, second, temperature=0.3, positives=positives),
            "info_nce both ways": info_nce(first, second, temperature=0.3, positives=positives, symmetric=True),
            "info_nce back": info_nce(second, first, temperature=0.3, positives=positives.transposed()),
            "ring": ring_info_nce(first, second, 0.3, positives=positives),
            "ring both ways": ring_info_nce(first, second, 0.3, symmetric=True, positives=positives),
            "supcon": supcon(first, second, positives, 0.3),
            "supcon, one view": None if name == "same row" else supcon(first, None, positives, 0.3),
            "dcl": dcl(first, second, 0.3, positives=positives),
            "dclw": dcl(first, second, 0.3, weight_concentration=0.5, positives=positives),
        }
    for loss, value in found.items():
        assert value == expected[loss] or float(value) == pytest.approx(expected[loss], rel=1e-9), loss


def test_the_ring_leaves_equal_numbers_out_as_info_nce_does():
    first, second = features(0), features(1)
    for symmetric in (False, True):
        expected = info_nce(first, second, temperature=0.3, symmetric=symmetric, ids=LABELS)
        found = ring_info_nce(first, second, 0.3, symmetric, ids=LABELS)
        assert float(found) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(UserError, match="give one of the two"):
        ring_info_nce(first, second, ids=LABELS, positives=Positives.of_groups(LABELS))


def test_decoupled_gradients_do_not_depend_on_the_blocks(monkeypatch):
    first, second = features(0, 40).requires_grad_(), features(1, 40)
    positives = Positives.mixed(torch.arange(40).roll(3), torch.full((40,), 0.7))

    def gradient():
        return torch.autograd.grad(dcl(first, second, 0.3, positives=positives), first)[0]

    whole = gradient()
    monkeypatch.setattr("contrastive_mm.losses.unrelated.BLOCK_ROWS", 7)
    torch.testing.assert_close(gradient(), whole)
    dense = Positives.weighted(torch.eye(40) * 0.7 + 0.3 * torch.eye(40).roll(-3, 1))
    torch.testing.assert_close(torch.autograd.grad(dcl(first, second, 0.3, positives=dense), first)[0], whole)


class Memory(TorchDispatchMode):
    """The most elements in one tensor that anything inside makes, and in all tensors kept for a backward pass."""

    largest = kept = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def keep(self, tensor):
        self.kept += tensor.numel()
        return tensor


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("small", [1e-6, 1e-9, 1e-14])
def test_supcon_keeps_small_weights_beside_a_views_own(small, views):
    first, second = torch.randn(7, 5), torch.randn(7, 5)
    # With two views some rows have small weights alone: their own would outweigh these in the result too.
    weights = small * torch.rand(7, 7) + torch.diag((torch.arange(7) > 3).float() if views == 2 else torch.ones(7))
    rows = [*first.double().tolist(), *second.double().tolist()][: 7 * views]
    expected = oracles.supcon(rows, list(range(7)) * views, weights.double().tolist(), 0.3)
    loss = supcon(first, second if views == 2 else None, Positives.weighted(weights), 0.3)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_supcon_of_one_view_keeps_a_partners_small_share():
    first, partner, share = torch.randn(7, 5), torch.tensor([1, 2, 3, 4, 5, 6, 0]), torch.full((7,), 1 - 2**-22)
    weights = torch.diag(share.double())
    weights[torch.arange(7), partner] += 1 - share.double()
    expected = oracles.supcon(first.double().tolist(), list(range(7)), weights.tolist(), 0.3)
    assert float(supcon(first, None, Positives.mixed(partner, share), 0.3)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [nt_xent, info_nce, dcl, ring_info_nce, supcon])
@pytest.mark.parametrize("name", ["groups", "mixed", "mixed classes", "window in episodes"])
def test_no_matrix_of_all_pairs_is_ever_held(name, loss):
    rows = 1600
    ids, partner, share = torch.arange(rows) % 400, torch.arange(rows).roll(1), torch.full((rows,), 0.7)
    positives = {
        "groups": Positives.of_groups(ids),
        "mixed": Positives.mixed(partner, share),
        "mixed classes": Positives.mixed(partner, share, ids),
        "window in episodes": Positives.within(torch.arange(rows) / 10, 5.0, ids % 3),
    }[name]
    first, second = features(0, rows).float().requires_grad_(), features(1, rows).float()
    options = {"labels" if loss is supcon else "positives": positives}
    memory = Memory()
    with memory, torch.autograd.graph.saved_tensors_hooks(memory.keep, lambda tensor: tensor):
        loss(first, second, **options).backward()
    assert memory.largest < rows * rows / 2
    assert memory.kept < rows * rows / 4


def without_type_check(**fields):
    positives = Positives()
    for name, value in fields.items():
        object.__setattr__(positives, name, value)
    return positives


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (Positives.of_groups(LABELS[:4]), r"Positives.ids has shape \(4,\), but the batch has 7"),
        (without_type_check(ids=LABELS.float()), "Positives.ids holds torch.float32"),
        (Positives.weighted(WEIGHTS[:2, :2]), r"needs \(7, 7\)"),
        (Positives.weighted(WEIGHTS - 1), "Positives.matrix holds a value outside 0 to inf"),
        (Positives.weighted(WEIGHTS * torch.nan), "Positives.matrix holds a value outside"),
        (Positives(matrix=WEIGHTS, ids=LABELS), "give no ids, partner or times beside it"),
        (Positives(partner=PARTNER), "go together"),
        (Positives(share=SHARE), "go together"),
        (Positives.mixed(PARTNER + 1, SHARE), "Positives.partner holds a value outside 0 to 6"),
        (Positives.mixed(PARTNER, SHARE + 0.1), "Positives.share holds a value outside 0 to 1"),
        (Positives.within(TIMES, -1.0), "window = -1.0"),
        (Positives.within(TIMES * torch.inf, 1.0), "Positives.times holds a value outside"),
        (Positives(ids=LABELS, window=2.0), "give times"),
    ],
)
def test_values_that_do_not_fit_are_named(positives, message):
    first, second = features(0), features(1)
    for loss in (nt_xent, info_nce, dcl, ring_info_nce):
        with pytest.raises(UserError, match=message):
            inspect.unwrap(loss)(first, second, positives=positives)
    with pytest.raises(UserError, match=message):
        inspect.unwrap(supcon)(first, second, positives)


def test_a_row_that_is_left_without_positive_or_negative_is_named():
    first, second = features(0), features(1)
    lone = WEIGHTS.clone()
    lone[4] = 0
    for loss in (nt_xent, info_nce, ring_info_nce, dcl):
        with pytest.raises(UserError, match="row 4 of the weights sums to 0"):
            loss(first, second, positives=Positives.weighted(lone))
    with pytest.raises(UserError, match="column 4 of the weights sums to 0"):
        nt_xent(first, second, positives=Positives.weighted(lone.T.contiguous()))
    assert torch.isfinite(supcon(first, None, Positives.weighted(lone))), "which leaves it out"
    with pytest.raises(UserError, match="no negative to row 0: all samples of the batch belong with it"):
        dcl(first, second, positives=Positives.of_groups(torch.zeros(7, dtype=torch.long)))
