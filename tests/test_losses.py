import inspect
import math
import subprocess
import sys

import oracles
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.heads import BilinearSimilarity
from contrastive_mm.losses import (
    AlignmentLoss,
    BarlowTwinsLoss,
    DCLLoss,
    HardNegativeNTXentLoss,
    InfoNCELoss,
    LearnableTemperature,
    NegativeCosineLoss,
    NTXentLoss,
    RingInfoNCELoss,
    SigmoidLoss,
    SupConLoss,
    SwappedPredictionLoss,
    TripletMarginLoss,
    UniformityLoss,
    VICRegLoss,
    alignment_loss,
    barlow_twins,
    dcl,
    hard_negative_nt_xent,
    info_nce,
    negative_cosine,
    nt_xent,
    ring_info_nce,
    sigmoid_loss,
    supcon,
    swapped_prediction,
    triplet_margin,
    uniformity_loss,
    use_form,
    vicreg,
)
from contrastive_mm.positives import Positives


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
    # Half-precision features are the input's own rounding; the computation on them is in float32, whose last digit
    # is worth more the larger the logits 1 / temperature are.
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-7 * max(2, 1 / temperature))


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
    broken = good.clone()
    broken[2, 1] = math.nan
    with pytest.raises(UserError, match=r"`(second|key)` holds NaN or infinity in 1 of 4 rows \(row 2\)"):
        loss(good, broken)
    with pytest.raises(UserError, match="has no rows"):
        loss(good[:0], good[:0])


def test_negatives_of_other_dimensions_are_named():
    good = torch.randn(4, 3)
    with pytest.raises(UserError, match="floating point"):
        inspect.unwrap(nt_xent)(good.int(), good.int())
    with pytest.raises(UserError, match="`negatives` has 2 dimensions"):
        inspect.unwrap(info_nce)(good, good, torch.randn(5, 2))
    with pytest.raises(UserError, match="queue still empty"):
        info_nce(good, good, in_batch_negatives=False)


FORMS = pytest.mark.parametrize("form", ["plain", "tiled"])
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


@FORMS
@pytest.mark.parametrize("loss", [nt_xent, dcl, hard_negative_nt_xent])
def test_gradients_are_those_of_float64_in_every_form(form, loss):
    first, second = features(30, 8, dtype=torch.float32), features(30, 8, dtype=torch.float32, seed=1)
    wide = [first.double().requires_grad_(), second.double().requires_grad_()]
    loss(*wide).backward()
    narrow = [first.requires_grad_(), second.requires_grad_()]
    with use_form(form):
        loss(*narrow).backward()
    for mine, exact in zip(narrow, wide, strict=True):
        assert float((mine.grad - exact.grad).abs().max()) < 1e-5 * float(exact.grad.abs().max())


@FORMS
def test_dcl_equals_the_loop(form):
    first, second = features(6, 5), features(6, 5, seed=1)
    with use_form(form):
        plain, weighted = dcl(first, second, 0.2), dcl(first, second, 0.2, weight_concentration=0.5)
    assert float(plain) == pytest.approx(oracles.dcl(first.tolist(), second.tolist(), 0.2))
    assert float(weighted) == pytest.approx(oracles.dcl(first.tolist(), second.tolist(), 0.2, 0.5))


@FORMS
@pytest.mark.parametrize("concentration", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("prior", [0.0, 0.1, 0.6])
def test_reweighted_negatives_equal_the_loop(form, concentration, prior):
    first, second = features(6, 5), features(6, 5, seed=1)
    expected = oracles.hard_negative_nt_xent(first.tolist(), second.tolist(), 0.5, concentration, prior)
    with use_form(form):
        loss = hard_negative_nt_xent(first, second, 0.5, concentration, prior)
    assert float(loss) == pytest.approx(expected)


def test_without_weights_and_prior_the_negatives_are_nt_xents():
    first, second = features(6, 5), features(6, 5, seed=1)
    assert float(hard_negative_nt_xent(first, second, 0.5, 0.0, 0.0)) == pytest.approx(
        float(nt_xent(first, second, 0.5))
    )
    assert torch.isfinite(hard_negative_nt_xent(first.float(), second.float(), 0.01))


def as_lists(matrix):
    return matrix.double().tolist()


TIMES = torch.tensor([0.0, 1.0, 5.0, 1.5, 4.0, 9.0])
RELATIONS = {
    "labels": (LABELS, LABELS[:, None] == LABELS),
    "boolean": ((LABELS[:, None] == LABELS) & (torch.arange(6)[:, None] <= torch.arange(6)), None),
    "weights": (torch.rand(6, 6, generator=torch.Generator().manual_seed(3)), None),
    "window": (
        Positives.within(torch.tensor([0.0, 1.0, 5.0, 1.5, 4.0, 9.0]), 1.0),
        (torch.tensor([0.0, 1.0, 5.0, 1.5, 4.0, 9.0])[:, None] - torch.tensor([0.0, 1.0, 5.0, 1.5, 4.0, 9.0])).abs()
        <= 1,
    ),
}


@FORMS
@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("views", [1, 2])
def test_supcon_equals_the_loop(form, name, views):
    relation, matrix = RELATIONS[name]
    weights = as_lists(relation if matrix is None else matrix)
    first, second = features(6, 5), features(6, 5, seed=1)
    rows = first.tolist() + (second.tolist() if views == 2 else [])
    expected = oracles.supcon(rows, list(range(6)) * views, weights, 0.3)
    with use_form(form):
        loss = supcon(first, second if views == 2 else None, relation, 0.3)
    assert float(loss) == pytest.approx(expected)


def test_supcon_of_classes_of_one_is_nt_xent():
    first, second = features(6, 5), features(6, 5, seed=1)
    assert float(supcon(first, second, torch.arange(6))) == pytest.approx(float(nt_xent(first, second)))
    with pytest.raises(UserError, match="No view has a positive"):
        supcon(first, None, torch.arange(6))
    with pytest.raises(UserError, match=r"`labels` has shape \(5,\), but `first` has 6 rows"):
        inspect.unwrap(supcon)(first, second, LABELS[:5])
    with pytest.raises(UserError, match="must be whole numbers"):
        inspect.unwrap(supcon)(first, second, LABELS.float())


POSITIVES = {
    "groups": (Positives.of_groups(LABELS), (LABELS[:, None] == LABELS).double()),
    "weights": (Positives.weighted(RELATIONS["weights"][0]), RELATIONS["weights"][0].double()),
    "mixed": (
        Positives.mixed(torch.tensor([1, 0, 2, 5, 4, 3]), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 1.0])),
        torch.tensor(
            [
                [0.9, 0.1, 0, 0, 0, 0],
                [0.2, 0.8, 0, 0, 0, 0],
                [0, 0, 1.0, 0, 0, 0],
                [0, 0, 0, 0.6, 0, 0.4],
                [0, 0, 0, 0, 1.0, 0],
                [0, 0, 0, 0, 0, 1.0],
            ]
        ),
    ),
    "window": (
        Positives.within(TIMES, 4.0, LABELS),
        ((TIMES[:, None] - TIMES).abs() <= 4) & (LABELS[:, None] == LABELS),
    ),
}


@FORMS
@pytest.mark.parametrize("name", POSITIVES)
def test_soft_positives_equal_the_loop(form, name):
    positives, matrix = POSITIVES[name]
    first, second, weights = features(6, 5), features(6, 5, seed=1), as_lists(matrix)
    with use_form(form):
        symmetric = nt_xent(first, second, 0.3, positives=positives)
        one_way = info_nce(first, second, temperature=0.3, positives=positives)
        two_way = info_nce(first, second, temperature=0.3, positives=positives, symmetric=True)
    assert float(symmetric) == pytest.approx(
        oracles.soft_nt_xent(*map(as_lists, (first, second)), weights, 0.3), rel=1e-6
    )

    def direction(query, key, rows):
        total = 0.0
        for anchor, row in zip(query, rows, strict=True):
            similar = [oracles.cosine(anchor, other) / 0.3 for other in key]
            total += oracles.cross_entropy(oracles.positives_mean(row, similar), similar)
        return total / len(query)

    forth = direction(first.tolist(), second.tolist(), weights)
    back = direction(second.tolist(), first.tolist(), as_lists(matrix.T))
    assert float(one_way) == pytest.approx(forth, rel=1e-6)
    assert float(two_way) == pytest.approx((forth + back) / 2, rel=1e-6)


@FORMS
@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_ids_are_no_negatives(form, symmetric):
    query, key, queue = features(6, 5), features(6, 5, seed=1), features(9, 5, seed=2)
    queue_ids = torch.arange(9) % 4

    def direction(a, b):
        total = 0.0
        for i in range(6):
            positive = oracles.cosine(a[i], b[i]) / 0.3
            others = [b[j] for j in range(6) if LABELS[j] != LABELS[i]]
            others += [queue[j].tolist() for j in range(9) if queue_ids[j] != LABELS[i]]
            total += oracles.cross_entropy(positive, [positive, *(oracles.cosine(a[i], o) / 0.3 for o in others)])
        return total / 6

    forth, back = direction(query.tolist(), key.tolist()), direction(key.tolist(), query.tolist())
    with use_form(form):
        loss = info_nce(query, key, queue, 0.3, symmetric, ids=LABELS, negative_ids=queue_ids)
    assert float(loss) == pytest.approx((forth + back) / 2 if symmetric else forth)


def test_a_bilinear_similarity_is_trained_by_the_loss():
    bilinear = BilinearSimilarity(5).double()
    query, key = features(6, 5), features(6, 5, seed=1)
    loss = info_nce(query, key, temperature=1.0, similarity=bilinear)
    mapped = (query @ bilinear.weight.detach()).tolist()
    assert float(loss.detach()) == pytest.approx(oracles.info_nce(mapped, key.tolist(), [], 1.0, oracles.dot, True))
    loss.backward()
    assert float(bilinear.weight.grad.abs().sum()) > 0
    with pytest.raises(UserError, match="one direction"):
        info_nce(query, key, similarity=bilinear, symmetric=True)
    with pytest.raises(UserError, match="use info_nce"):
        inspect.unwrap(nt_xent)(query, key, similarity=bilinear)


@FORMS
@pytest.mark.parametrize(
    "loss",
    [
        nt_xent,
        dcl,
        hard_negative_nt_xent,
        lambda a, b, t: info_nce(a, b, temperature=t),
        lambda a, b, t: info_nce(a, b, features(7, 5, seed=4), t, symmetric=True),
        lambda a, b, t: supcon(a, b, LABELS, t),
    ],
)
def test_the_temperature_has_the_gradient_of_finite_differences(form, loss):
    first, second = features(6, 5), features(6, 5, seed=1)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with use_form(form):
        assert torch.autograd.gradcheck(lambda t: loss(first, second, t), temperature)
        assert float(loss(first, second, temperature).detach()) == pytest.approx(float(loss(first, second, 0.3)))


def test_a_learnable_temperature_is_kept_from_running_away():
    temperature = LearnableTemperature(0.07)
    assert float(temperature().detach()) == pytest.approx(0.07)
    with torch.no_grad():
        temperature.log_scale.fill_(9.0)
    assert float(temperature().detach()) == pytest.approx(0.01)
    temperature().backward()
    assert float(temperature.log_scale.grad) == pytest.approx(-0.01), "it can still come back"
    with pytest.raises(UserError, match="temperature = -1"):
        LearnableTemperature(-1.0)
    with pytest.raises(UserError, match="below 1 / largest_scale"):
        LearnableTemperature(0.001)
    with pytest.raises(UserError, match="largest_scale = 0"):
        LearnableTemperature(0.07, largest_scale=0)
    with pytest.raises(UserError, match=r"`temperature` has shape \(2,\)"):
        inspect.unwrap(nt_xent)(features(3, 2), features(3, 2), torch.ones(2))


def test_modules_are_the_functions_with_options():
    first, second, queue = features(6, 5), features(6, 5, seed=1), features(4, 5, seed=2)
    pairs = [
        (NTXentLoss(0.2)(first, second), nt_xent(first, second, 0.2)),
        (InfoNCELoss(0.2, symmetric=True)(first, second, queue), info_nce(first, second, queue, 0.2, True)),
        (InfoNCELoss(1.0, similarity="dot")(first, second), info_nce(first, second, None, 1.0, similarity="dot")),
        (SupConLoss(0.2)(first, second, LABELS), supcon(first, second, LABELS, 0.2)),
        (DCLLoss(weight_concentration=0.5)(first, second), dcl(first, second, 0.1, weight_concentration=0.5)),
        (HardNegativeNTXentLoss()(first, second), hard_negative_nt_xent(first, second)),
    ]
    pairs += [
        (TripletMarginLoss(margin=0.5)(first, second), triplet_margin(first, second, 0.5)),
        (BarlowTwinsLoss(offdiagonal_weight=0.1)(first, second), barlow_twins(first, second, 0.1)),
        (VICRegLoss(variance=5.0)(first, second), vicreg(first, second, variance=5.0)),
        (NegativeCosineLoss()(first, second), negative_cosine(first, second)),
        (AlignmentLoss(power=1.0)(first, second), alignment_loss(first, second, 1.0)),
        (UniformityLoss(concentration=3.0)(first), uniformity_loss(first, 3.0)),
        (RingInfoNCELoss(0.2, symmetric=True)(first, second), ring_info_nce(first, second, 0.2, symmetric=True)),
        (SwappedPredictionLoss(0.2, epsilon=0.1)([first, second]), swapped_prediction([first, second], 2, 0.2, 0.1)),
    ]
    for module, function in pairs:
        assert torch.equal(module, function)
    siglip = SigmoidLoss(0.2, -3.0)
    assert float(siglip(first, second).detach()) == pytest.approx(float(sigmoid_loss(first, second, 0.2, -3.0)))
    siglip(first, second).backward()
    assert all(float(p.grad.abs()) > 0 for p in siglip.parameters())
    learned = InfoNCELoss(LearnableTemperature(0.1), similarity=BilinearSimilarity(5))
    learned(first.float(), second.float()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in learned.parameters())
    assert len(list(learned.parameters())) == 2
    assert "0.2" in repr(NTXentLoss(0.2))
    with pytest.raises(UserError, match="temperature = 0"):
        NTXentLoss(0.0)


@FORMS
def test_alignment_and_uniformity_equal_the_loop(form):
    first, second = features(6, 5), features(6, 5, seed=1)
    with use_form(form):
        spread = uniformity_loss(first, 2.0)
    assert float(spread) == pytest.approx(oracles.uniformity(first.tolist(), 2.0))
    cosines = [oracles.cosine(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert float(alignment_loss(first, second)) == pytest.approx(sum(2 - 2 * c for c in cosines) / 6)
    assert float(uniformity_loss(torch.ones(8, 3))) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="at least 2 rows"):
        uniformity_loss(first[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_lose_nothing_in_the_loss(dtype):
    first, second = features(300, 32, dtype=dtype), features(300, 32, dtype=dtype, seed=1)
    for loss in (nt_xent, dcl, lambda a, b: info_nce(a, b, a.flip(0), 0.1, symmetric=True)):
        assert abs(float(loss(first, second)) - float(loss(first.double(), second.double()))) < 2e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_ids": torch.arange(3)}, "needs `ids`"),
        ({"positives": Positives.of_groups(LABELS), "ids": LABELS}, "give one of the two"),
        ({"positives": Positives.of_groups(LABELS[:4])}, r"Positives.ids has shape \(4,\), but the batch has 6"),
        ({"positives": Positives.weighted(torch.ones(2, 2))}, r"needs \(6, 6\)"),
        ({"positives": Positives(partner=LABELS)}, "go together"),
        ({"ids": LABELS[:3]}, r"`ids` has shape \(3,\)"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        inspect.unwrap(info_nce)(features(6, 5), features(6, 5, seed=1), **options)
    with pytest.raises(UserError, match="needs in_batch_negatives=True"):
        info_nce(
            features(6, 5),
            features(6, 5, seed=1),
            features(3, 5),
            in_batch_negatives=False,
            positives=Positives.of_groups(LABELS),
        )


COMPILED = """
import torch
from contrastive_mm.losses import dcl, info_nce, nt_xent
from contrastive_mm.positives import Positives

first, second = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
mixed = {"positives": Positives.mixed(torch.arange(200).roll(1), torch.full((200,), 0.7))}
for loss in (
    nt_xent,
    lambda a, b: info_nce(a, b, b, 0.2, symmetric=True),
    lambda a, b: info_nce(a, b, **mixed) + nt_xent(a, b, **mixed) + dcl(a, b, **mixed),
):
    (eager,) = torch.autograd.grad(loss(first, second), first)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(whole(first, second), first)
    torch.testing.assert_close(compiled, eager)
"""


def test_the_compiler_takes_the_losses_whole():
    # In a process of its own: the compiler can't look through the shape checks that the tests put on.
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
