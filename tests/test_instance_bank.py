"""The bank of instances against loops over plain lists."""

import copy
import inspect
import math

import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.memory import FeatureQueue, InstanceBank


def unit(row):
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def written(bank, momentum, ids, features):
    """The slots after a write, in float64: of several rows with one id the last counts."""
    slots = [list(slot) for slot in bank]
    for i in set(ids):
        new = unit(features[max(place for place, other in enumerate(ids) if other == i)])
        slots[i] = unit([momentum * old + (1 - momentum) * value for old, value in zip(bank[i], new, strict=True)])
    return slots


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ids", [[2], [4, 0, 3], [1, 1, 1], [3, 1, 3, 0, 1, 4, 3], []])
def test_write_equals_the_formula_whatever_the_batch(momentum, ids):
    bank, features = InstanceBank(5, 3, momentum), 4 * torch.randn(len(ids), 3)
    expected = written(bank.features().double().tolist(), momentum, ids, features.double().tolist())
    bank.write(torch.tensor(ids, dtype=torch.long), features)
    torch.testing.assert_close(bank.features().double(), torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-6)


def test_a_write_touches_its_slots_alone_and_carries_no_gradient():
    bank = InstanceBank(6, 3)
    storage, before = bank.features(), bank.features().clone()
    bank.write(torch.tensor([4, 1]), torch.randn(2, 3, requires_grad=True))
    assert bank.features().data_ptr() == storage.data_ptr(), "the bank was copied"
    changed = (bank.features() != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]
    assert not bank.features().requires_grad


def test_slots_start_as_seeded_unit_vectors_in_all_directions():
    bank = InstanceBank(4000, 3, seed=7)
    torch.testing.assert_close(bank.features().norm(dim=1), torch.ones(4000))
    assert float(bank.features().mean(dim=0).abs().max()) < 0.05
    torch.testing.assert_close(bank.features().T.cov(), torch.eye(3) / 3, rtol=0, atol=0.03)
    assert torch.equal(bank.features(), InstanceBank(4000, 3, seed=7).features())
    assert not torch.equal(bank.features(), InstanceBank(4000, 3, seed=8).features())


@pytest.mark.parametrize("shape", [(3,), (2, 4), (0,)])
def test_read_gives_the_slots_in_the_shape_asked_for(shape):
    bank, ids = InstanceBank(5, 3), torch.randint(5, shape)
    assert bank.read(ids).shape == (*shape, 3)
    assert torch.equal(bank.read(ids), bank.features()[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mixed_in_float32(dtype):
    bank, features = InstanceBank(5, 3, 0.9, dtype=dtype), torch.randn(2, 3)
    expected = written(bank.features().double().tolist(), 0.9, [1, 3], features.double().tolist())
    bank.write(torch.tensor([1, 3]), features)
    rounded = torch.tensor(expected).to(dtype)
    assert torch.equal(bank.features(), rounded)


def test_negatives_are_uniform_over_all_slots():
    draws = InstanceBank(10, 2).sample_negatives(100, 2000)
    assert draws.shape == (100, 2000)
    counts = draws.flatten().bincount(minlength=10)
    assert len(counts) == 10
    assert float((counts / 20_000 - 1).abs().max()) < 0.05


def test_the_stream_of_negatives_moves_on_and_follows_its_seed():
    one, same, other = InstanceBank(1000, 2, seed=1), InstanceBank(1000, 2, seed=1), InstanceBank(1000, 2, seed=2)
    before = torch.get_rng_state()
    first = one.sample_negatives(2, 8)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not touched"
    assert torch.equal(first, same.sample_negatives(2, 8))
    assert not torch.equal(first, other.sample_negatives(2, 8))
    assert not torch.equal(first, one.sample_negatives(2, 8))


def test_the_normaliser_equals_equation_8_and_stays_as_it_was_first_fixed():
    bank, logits = InstanceBank(50, 2), torch.randn(4, 6)
    exponentials = [math.exp(logit) for logit in logits.double().flatten().tolist()]
    expected = math.log(50 * sum(exponentials) / len(exponentials))
    estimate = bank.log_normaliser(logits)
    assert float(estimate) == pytest.approx(expected, abs=1e-6)
    assert float(bank.log_normaliser(logits + 1)) == pytest.approx(expected + 1, abs=1e-5), "reading fixes nothing"
    bank.fix_normaliser(estimate)
    bank.fix_normaliser(estimate + 5)
    assert float(bank.log_normaliser(logits + 1)) == pytest.approx(expected, abs=1e-6)
    assert float(InstanceBank(50, 2).log_normaliser(logits + 200)) == pytest.approx(expected + 200, abs=1e-4)


def test_a_resumed_bank_goes_on_bit_for_bit(tmp_path):
    bank, other = InstanceBank(20, 3, seed=1), InstanceBank(20, 3, seed=2)
    bank.write(torch.tensor([3, 3, 9]), torch.randn(3, 3))
    bank.sample_negatives(2, 5)
    bank.fix_normaliser(bank.log_normaliser(torch.randn(2, 5)))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    features = torch.randn(2, 3)
    for each in (bank, other):
        each.write(torch.tensor([9, 0]), features)
    assert torch.equal(bank.features(), other.features())
    assert torch.equal(bank.sample_negatives(3, 40), other.sample_negatives(3, 40))
    assert torch.equal(bank.log_normaliser(torch.zeros(1, 1)), other.log_normaliser(torch.zeros(1, 1)))


def test_a_loaded_or_copied_bank_shares_nothing():
    bank, loaded = InstanceBank(4, 2), InstanceBank(4, 2)
    bank.fix_normaliser(torch.tensor(2.0))
    loaded.load_state_dict(bank.state_dict())
    before, copied = bank.features().clone(), copy.deepcopy(bank)
    for each in (loaded, copied):
        each.write(torch.tensor([0]), torch.ones(1, 2))
        each.log_normaliser(torch.zeros(1, 1)).add_(1)
    assert torch.equal(bank.features(), before)
    assert float(bank.log_normaliser(torch.zeros(1, 1))) == 2.0


def test_a_bank_kept_on_the_cpu_reads_and_draws_for_the_modules_device():
    bank = InstanceBank(6, 2, device="cpu").to("meta")
    assert bank.read(torch.tensor([1, 2])).device.type == bank.sample_negatives(2, 3).device.type == "meta"
    assert torch.equal(bank.to_empty(device="cpu").features(), InstanceBank(6, 2).features())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32])
def test_ids_may_be_whole_numbers_of_any_type(dtype):
    bank, other, ids, features = InstanceBank(5, 2), InstanceBank(5, 2), torch.tensor([3, 1]), torch.randn(2, 2)
    bank.write(ids.to(dtype), features)
    other.write(ids, features)
    assert torch.equal(bank.features(), other.features())
    assert torch.equal(bank.read(ids.to(dtype)), bank.features()[ids])


@pytest.mark.parametrize("ids", [torch.tensor([0.7, 1.0]), torch.tensor([True, False])])
def test_ids_that_number_nothing_are_refused_and_not_rounded(ids):
    bank = InstanceBank(5, 2)
    queue = FeatureQueue(5, 2, with_ids=True)
    for owner, call in [
        (InstanceBank, lambda write: write(bank, ids, torch.ones(2, 2))),
        (FeatureQueue, lambda push: push(queue, torch.ones(2, 2), ids)),
    ]:
        with pytest.raises(UserError, match=f"`ids` holds {ids.dtype}.* whole numbers"):
            # Without the tests' own type checks, as a user calls it.
            call(inspect.unwrap(owner.write if owner is InstanceBank else owner.push))
    with pytest.raises(UserError, match="whole numbers"):
        inspect.unwrap(InstanceBank.read)(bank, ids)
    assert torch.equal(bank.features(), InstanceBank(5, 2).features())
    assert len(queue) == 0


def test_bad_input_is_named():
    bank = InstanceBank(4, 2)
    for call, problem in [
        (lambda: InstanceBank(4, 0), "dim=0"),
        (lambda: InstanceBank(4, 2, momentum=1.0), r"momentum = 1\.0"),
        (lambda: InstanceBank(4, 2, seed=-1), "seed = -1"),
        (lambda: bank.read(torch.tensor([[0, 4]])), "id 4 is outside the instance bank, which has size=4"),
        (lambda: bank.write(torch.tensor([2, -1]), torch.ones(2, 2)), "id -1 is outside"),
        (lambda: bank.write(torch.tensor([2]), torch.ones(1, 3)), "`features` has 3 dimensions, but the bank holds 2"),
        (lambda: bank.sample_negatives(3, 0), "can't draw 0 negatives"),
        (lambda: bank.log_normaliser(torch.ones(0, 3)), "`logits` is empty"),
        (
            lambda: bank.load_state_dict(InstanceBank(5, 2).state_dict()),
            r"features has shape \(5, 2\), this InstanceBank\'s \(4, 2\)",
        ),
    ]:
        with pytest.raises(UserError, match=problem):
            call()
    with pytest.raises(UserError, match="`ids` has 1 entries, but `features` has 2 rows"):
        # Without the tests' own shape checks, as a user calls it.
        inspect.unwrap(InstanceBank.write)(bank, torch.tensor([2]), torch.ones(2, 2))
    assert torch.equal(bank.features(), InstanceBank(4, 2).features())
