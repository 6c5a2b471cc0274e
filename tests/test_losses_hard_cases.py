"""Input on which losses were seen to go wrong: silently, or with a message that says nothing."""

import inspect
import subprocess
import sys

import pytest
import torch
from processes import run_processes

from contrastive_mm.errors import UserError
from contrastive_mm.heads import BilinearSimilarity
from contrastive_mm.losses import (
    LearnableTemperature,
    SigmoidLoss,
    alignment_loss,
    cross_logsumexp,
    dcl,
    hard_negative_nt_xent,
    info_nce,
    nt_xent,
    ring_info_nce,
    self_logsumexp,
    sigmoid_loss,
    supcon,
    two_way_logsumexp,
    uniformity_loss,
    use_form,
)
from contrastive_mm.positives import Positives

LABELS = torch.arange(20) % 4


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


A, B = features(20, 16), features(20, 16, seed=1)


REFUSED = """
import torch
from contrastive_mm.errors import UserError
from contrastive_mm.losses import dcl, info_nce, nt_xent, supcon
from contrastive_mm.positives import Positives

a, b, labels = torch.randn(20, 16), torch.randn(20, 16), torch.arange(20) % 4
partner = torch.ones(20, dtype=torch.uint8)
for call, message in (
    (lambda: nt_xent(a, b, similarity="cos"), "similarity = 'cos'"),
    (lambda: dcl(a, b, similarity="Cosine"), "similarity = 'Cosine'"),
    (lambda: info_nce(a, b, similarity="cos"), "similarity = 'cos'"),
    (lambda: supcon(a, b, labels, similarity="cos"), "similarity = 'cos'"),
    (lambda: info_nce(a, b, positives=Positives.mixed(partner, a[:, 0])), "call .long()"),
    (lambda: info_nce(a, b, positives=Positives.mixed(partner.bool(), a[:, 0])), "call .long()"),
):
    try:
        call()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


def test_what_is_misspelt_or_of_a_wrong_type_is_refused():
    # In a process of its own: the checks of types that the tests put on refuse it before.
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def of_labels(first, second, **options):
    return inspect.unwrap(supcon)(first, second, LABELS, **options)


@pytest.mark.parametrize("loss", [nt_xent, dcl, of_labels])
def test_a_map_of_the_queries_is_refused_where_all_views_are_alike(loss):
    with pytest.raises(UserError, match="compared alike"):
        inspect.unwrap(loss)(A, B, similarity=lambda queries: queries)


def second_derivative(loss):
    query = features(300, 8).requires_grad_()
    (slope,) = torch.autograd.grad(loss(query), query, create_graph=True)
    return torch.autograd.grad((slope * features(300, 8, seed=3)).sum(), query)


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_second_derivative_against_fixed_keys_is_refused(in_batch):
    keys, queue = features(300, 8, seed=1), features(600, 8, seed=2)
    with pytest.raises(UserError, match="can't be differentiated twice"):
        second_derivative(lambda query: info_nce(query, keys, queue, in_batch_negatives=in_batch))


def test_a_second_derivative_of_the_ring_is_refused():
    with pytest.raises(UserError, match="can't be differentiated twice"):
        second_derivative(lambda query: ring_info_nce(query, features(300, 8, seed=1)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_partners_that_torch_would_take_as_a_mask_are_refused(dtype):
    positives = Positives.mixed(torch.ones(20, dtype=torch.int64).to(dtype), torch.full((20,), 0.7))
    with pytest.raises(UserError, match=r"partner holds.*call .long\(\)"):
        info_nce(A, B, positives=positives)


@pytest.mark.parametrize("temperature", [0.01, 0.003, 0.001])
@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_hard_negatives_keep_their_digits_at_low_temperatures(temperature, prior):
    first, second = features(32, 16), features(32, 16, seed=1)
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        leaf = first.to(dtype).requires_grad_()
        loss = hard_negative_nt_xent(leaf, second.to(dtype), temperature, positive_prior=prior)
        loss.backward()
        values.append(float(loss.detach()))
        slopes.append(leaf.grad.double())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert torch.isfinite(slopes[1]).all()
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-3 * float(slopes[1].abs().max()))


def test_pairs_that_coincide_have_no_slope():
    first = features(4, 3).requires_grad_()
    second = torch.cat([first.detach()[:2], features(2, 3, seed=1)])
    alignment_loss(first, second, power=1.0).backward()
    assert torch.equal(first.grad[:2], torch.zeros(2, 3, dtype=torch.float64))
    assert first.grad[2:].abs().sum() > 0


@pytest.mark.parametrize("form", ["plain", "tiled"])
@pytest.mark.parametrize(
    "loss",
    [
        nt_xent,
        dcl,
        info_nce,
        ring_info_nce,
        sigmoid_loss,
        alignment_loss,
        lambda a, b: supcon(a, b, LABELS),
        lambda a, b: uniformity_loss(a),
    ],
)
def test_a_row_of_zeros_gets_no_gradient_and_leaves_the_others_theirs(form, loss):
    first = A.clone()
    first[3] = 0
    first.requires_grad_()
    with use_form(form):
        loss(first, B).backward()
    assert torch.equal(first.grad[3], torch.zeros(16, dtype=torch.float64))
    assert 0 < float(first.grad.abs().max()) < 10


def test_a_bias_may_be_a_whole_number():
    assert float(SigmoidLoss(bias=-10)(A.float(), B.float()).detach()) > 0


def test_features_of_two_precisions_are_named():
    for rows in (20, 300):
        with pytest.raises(UserError, match=r"`first` holds torch.float32 and `second` torch.float64: cast one"):
            nt_xent(features(rows, 4, dtype=torch.float32), features(rows, 4))
    queue = features(9, 16, seed=2)
    torch.testing.assert_close(info_nce(A, B, queue.float()), info_nce(A, B, queue), rtol=1e-6, atol=0)


def test_labels_in_a_column_are_named():
    with pytest.raises(UserError, match=r"`labels` has shape \(20, 1\); give one class a row"):
        inspect.unwrap(supcon)(A, B, LABELS[:, None])


def test_sides_without_rows_give_nothing_in_every_form():
    for form in ("plain", "tiled"):
        with use_form(form):
            assert self_logsumexp(A[:0]).shape == (0,)
            assert cross_logsumexp(A[:0], B).shape == (0,)
            rows, columns = two_way_logsumexp(A, B[:0])
            assert rows.isneginf().all()
            assert columns.shape == (0,)


def test_prepared_features_of_half_precision_are_refused():
    for form in ("plain", "tiled"):
        with use_form(form), pytest.raises(UserError, match="need float32 or float64"):
            self_logsumexp(A.half())


def test_functional_gradients_are_those_of_autograd():
    first, second = features(150, 4), features(150, 4, seed=1)
    leaf = first.clone().requires_grad_()
    nt_xent(leaf, second).backward()
    torch.testing.assert_close(torch.func.grad(lambda x: nt_xent(x, second))(first), leaf.grad)


STRIDES = """
import torch
from contrastive_mm.losses import info_nce, nt_xent, uniformity_loss
first = torch.randn(16, 300).t().requires_grad_()
second = torch.randn(16, 300).t()
for loss in (nt_xent, uniformity_loss, lambda a, b=second: info_nce(a, a.flip(0), symmetric=True)):
    arguments = (first, second) if loss is nt_xent else (first,)
    (eager,) = torch.autograd.grad(loss(*arguments), first)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*arguments), first)
    torch.testing.assert_close(compiled, eager)
    assert compiled.stride() == eager.stride()
"""


def test_the_compiler_is_told_the_right_strides_of_features_in_columns():
    done = subprocess.run([sys.executable, "-c", STRIDES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from contrastive_mm.losses import operators

    x = features(16, 40, dtype=torch.float32).t().requires_grad_()
    torch.library.opcheck(operators.self_logsumexp.compiled, (x, 40, None, "tiled"), test_utils="test_faketensor")
    scale = torch.tensor([5.0])
    torch.library.opcheck(
        operators.views_logsumexp.compiled, (x, scale, True, 40, "tiled"), test_utils="test_faketensor"
    )


def second_derivative_of_gathered(rank):
    rows = slice(0, 5) if rank == 0 else slice(5, 8)
    first = A[:8].clone().requires_grad_()
    with use_form("plain"):
        loss = nt_xent(first[rows], B[:8][rows], 0.5, gather=True)
    (slope,) = torch.autograd.grad(loss, first, create_graph=True)
    (twice,) = torch.autograd.grad((slope * B[:8]).sum(), first)
    torch.distributed.all_reduce(twice)
    return twice / 2


def test_gathered_features_can_be_differentiated_twice(tmp_path):
    first = A[:8].clone().requires_grad_()
    with use_form("plain"):
        (slope,) = torch.autograd.grad(nt_xent(first, B[:8], 0.5), first, create_graph=True)
    # The averaged slope is linear in each process's own: so is its derivative.
    found = run_processes(second_derivative_of_gathered, tmp_path)
    (expected,) = torch.autograd.grad((slope * B[:8]).sum(), first)
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], expected)


def test_the_temperature_of_hard_negatives_can_be_learned():
    temperature = LearnableTemperature(0.5)
    hard_negative_nt_xent(A.float(), B.float(), temperature()).backward()
    assert float(temperature.log_scale.grad.abs()) > 0


def test_a_similarity_with_weights_is_trained_with_the_sigmoid_loss():
    loss = SigmoidLoss(0.2, similarity=BilinearSimilarity(16))
    loss(A.float(), B.float()).backward()
    assert "similarity.weight" in loss.state_dict()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in loss.parameters())


def test_one_sample_is_no_batch_for_supcon():
    with pytest.raises(UserError, match="supcon needs at least 2 samples"):
        supcon(A[:1], B[:1], LABELS[:1])


def test_a_learned_temperature_prints_its_value():
    assert "0.07" in repr(LearnableTemperature(0.07))
