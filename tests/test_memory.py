import copy
import inspect

import pytest
import torch
from conftest import LinearEncoder

from contrastive_mm.errors import UserError
from contrastive_mm.memory import FeatureQueue, InstanceBank, storage
from contrastive_mm.methods.moco import MoCo, MoCoConfig
from contrastive_mm.views import Views

HALF = [torch.float16, torch.bfloat16]


def rows(start, count):
    return torch.arange(start, start + count).float()[:, None].expand(count, 2)


def saved_and_loaded(module, path):
    """The state dict after a way through a file that is read without running code."""
    torch.save(module.state_dict(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("pushes", [[1, 1, 1], [3, 3, 3, 3], [7], [20, 3], [0, 4], [5, 5], [2, 13, 1]])
def test_holds_the_newest_rows_whatever_the_batch_size(size, pushes):
    queue, seen = FeatureQueue(size, 2), []
    for count in pushes:
        queue.push(rows(len(seen), count))
        seen += range(len(seen), len(seen) + count)
        held = sorted(queue.features()[:, 0].int().tolist())
        assert held == seen[-size:], "the newest rows, none lost and none twice"
        assert len(queue) == len(held)


def test_starts_empty_and_carries_no_gradient():
    queue = FeatureQueue(4, 2)
    assert queue.features().shape == (0, 2)
    queue.push(torch.ones(2, 2, requires_grad=True))
    assert not queue.features().requires_grad


def test_state_dict_brings_back_content_and_place():
    queue = FeatureQueue(5, 2)
    queue.push(rows(0, 7))
    other = FeatureQueue(5, 2)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(rows(7, 2))
    assert torch.equal(queue.features(), other.features())
    assert len(other) == 5


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_state_dict_is_read_without_running_code(tmp_path, with_ids, dtype):
    queue, other = (FeatureQueue(5, 2, with_ids=with_ids, dtype=dtype) for _ in range(2))
    push = lambda to, start, count: to.push(rows(start, count), *([torch.arange(start, start + count)] * with_ids))  # noqa: E731
    push(queue, 0, 8)
    other.load_state_dict(saved_and_loaded(queue, tmp_path / "queue.pt"))
    for each in (queue, other):
        push(each, 8, 3)
    assert torch.equal(queue.features(), other.features())
    assert other.features().dtype == dtype
    assert sorted(other.features()[:, 0].tolist()) == [6, 7, 8, 9, 10]
    if with_ids:
        assert other.ids().tolist() == queue.ids().tolist() == other.features()[:, 0].tolist()


@pytest.mark.parametrize("pushes", [[3, 3, 3], [13, 2], [0, 1]])
def test_ids_stay_with_their_rows(pushes):
    queue, start = FeatureQueue(5, 2, with_ids=True), 0
    for count in pushes:
        queue.push(rows(start, count), torch.arange(start, start + count, dtype=torch.int32))
        start += count
        assert queue.ids().tolist() == queue.features()[:, 0].int().tolist()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_holds_the_rounded_features(dtype):
    queue, features = FeatureQueue(5, 2, dtype=dtype), torch.randn(3, 2)
    queue.push(features)
    assert torch.equal(queue.features(), features.to(dtype))


def test_a_push_writes_in_place_and_only_its_rows():
    queue = FeatureQueue(6, 2)
    queue.push(rows(0, 6))
    before = queue.features()
    version = before._version
    queue.push(rows(6, 2))
    assert queue.features().data_ptr() == before.data_ptr(), "the bank was copied"
    assert before[:, 0].tolist() == [6, 7, 2, 3, 4, 5], "features() is a view of the storage"
    assert before._version > version


@pytest.mark.parametrize("bank", [FeatureQueue(6, 2, with_ids=True), InstanceBank(6, 2)])
def test_a_bank_is_state_without_being_a_buffer_or_following_casts(bank):
    assert not list(bank.buffers()), "DistributedDataParallel would send it to all processes at each forward"
    assert bank.state_dict()
    assert bank.half().features().dtype == torch.float32


# On a machine without an accelerator "meta" stands in for another device: it has shapes, but no content (the way
# back is therefore called to_empty).
@pytest.mark.parametrize("stays", [True, False])
def test_rows_kept_on_the_cpu_stay_there_when_the_module_moves(stays):
    queue = FeatureQueue(5, 2, with_ids=True, device="cpu" if stays else None)
    queue.push(rows(0, 3), torch.arange(3))
    queue.to("meta")
    assert queue.features().device.type == queue.ids().device.type == "meta", "handed out where the module is"
    kept_on = queue.state_dict()["features"].device.type
    assert kept_on == ("cpu" if stays else "meta")
    if stays:
        queue.to_empty(device="cpu")
        assert queue.features()[:, 0].tolist() == queue.ids().tolist() == [0, 1, 2]


def test_a_prefetched_copy_is_used_until_the_next_push_and_never_after_it(monkeypatch):
    started, start = [], storage._start_copy
    monkeypatch.setattr(storage, "_start_copy", lambda *arguments: started.append(1) or start(*arguments))
    queue = FeatureQueue(8, 2, device="cpu")
    queue.push(rows(0, 3))
    queue.prefetch()
    assert queue.features().data_ptr() == queue.features().data_ptr()
    assert not started, "rows on the module's device need no copy"
    queue.to("meta").prefetch()
    assert len(started) == 1, "prefetch() starts the copy"
    assert queue.features() is queue.features()
    assert len(started) == 1, "copied again without need"
    queue.push(rows(3, 2))
    assert queue.features().shape == (5, 2)
    queue.prefetch()
    queue.load_state_dict(FeatureQueue(8, 2).state_dict())
    assert queue.features().shape == (0, 2)
    assert copy.deepcopy(queue).features().shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ahead", [True, False])
def test_rows_kept_on_the_cpu_reach_the_gpu_in_time(ahead):
    queue, bank = FeatureQueue(4096, 128, device="cpu").cuda(), InstanceBank(512, 128, device="cpu").cuda()
    for step in range(20):
        queue.push(torch.full((1000, 128), float(step), device="cuda"))
        if ahead:
            queue.prefetch()
        read = queue.features()
        assert read.is_cuda
        assert torch.equal(read.cpu(), queue.state_dict()["features"][: len(queue)])
    ids = torch.arange(7, device="cuda")
    bank.write(ids, torch.ones(7, 128, device="cuda"))
    assert torch.equal(bank.read(ids).cpu(), bank.features()[:7].cpu())


def test_gradient_accumulation_fills_the_queue_as_one_large_batch():
    whole, parts = (MoCo(LinearEncoder(), MoCoConfig(queue_size=9, momentum=0.9)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for _ in range(2):
        first, second = torch.randn(8, 6), torch.randn(8, 6)
        whole(Views((first, second)))
        for start in range(0, 8, 2):
            parts(Views((first[start : start + 2], second[start : start + 2])))
        for method in (whole, parts):
            method.after_step()
    torch.testing.assert_close(parts.queue.features(), whole.queue.features())
    assert parts.queue.get_extra_state()["cursor"] == whole.queue.get_extra_state()["cursor"] == 16 % 9
    assert parts.momentum_encoder.get_extra_state() == {"updates": 2}


def test_bad_input_is_named():
    for make, problem in [
        (lambda: FeatureQueue(0, 2), "size=0"),
        (lambda: FeatureQueue(4, 2, dtype=torch.int8), r"torch\.int8"),
        (lambda: FeatureQueue(4, 2, device="cuda"), "'cuda'; it must be 'cpu'"),
        (lambda: FeatureQueue(4, 2).push(torch.ones(1, 3)), "`features` has 3 dimensions, but the queue holds 2"),
        (lambda: FeatureQueue(4, 2).push(torch.ones(1, 2), torch.ones(1).long()), "keeps no ids"),
        (lambda: FeatureQueue(4, 2).ids(), "with_ids=True"),
        (lambda: FeatureQueue(4, 2, with_ids=True).push(torch.ones(1, 2)), "one integer for each row"),
        (
            lambda: FeatureQueue(4, 2).load_state_dict(FeatureQueue(5, 2).state_dict()),
            r"features has shape \(5, 2\), this FeatureQueue\'s \(4, 2\)",
        ),
    ]:
        with pytest.raises(UserError, match=problem):
            make()


@pytest.mark.parametrize("make", [lambda: FeatureQueue(4, 2), lambda: InstanceBank(4, 2)])
def test_a_bank_made_or_copied_under_inference_mode_is_written_and_read_outside(make):
    outside = make()
    with torch.inference_mode():
        banks = [make(), copy.deepcopy(outside)]
    for bank in banks:
        query = torch.ones(2, requires_grad=True)
        if isinstance(bank, FeatureQueue):
            bank.push(torch.ones(1, 2))
        (bank.features() @ query).sum().backward()
        assert torch.equal(query.grad, bank.features().sum(0))
        if isinstance(bank, InstanceBank):
            bank.write(torch.tensor([2]), torch.ones(1, 2))
            assert torch.equal(bank.read(torch.tensor([2]))[0], bank.features()[2])
        with torch.inference_mode():
            bank.load_state_dict(bank.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bank_without_memory_starts_anew_where_it_gets_some(dtype):
    queue, bank = FeatureQueue(4, 2, with_ids=True, dtype=dtype), InstanceBank(4, 2, seed=3, dtype=dtype)
    queue.push(rows(0, 3), torch.arange(3))
    queue.to("meta").to_empty(device="cpu")
    assert len(queue) == 0
    queue.push(rows(5, 1), torch.tensor([7]))
    assert queue.features().tolist() == [[5, 5]]
    assert queue.ids().tolist() == [7]
    bank.fix_normaliser(torch.tensor(2.0))
    bank.to("meta").to_empty(device="cpu")
    assert bank.get_extra_state() == InstanceBank(4, 2, seed=3).get_extra_state()
    assert torch.equal(bank.features(), InstanceBank(4, 2, seed=3, dtype=dtype).features())


def test_a_lone_row_is_told_to_be_a_matrix():
    # Without the tests' own shape checks, as a user calls it.
    with pytest.raises(UserError, match=r"`features` has shape \(2,\); the queue takes a matrix"):
        inspect.unwrap(FeatureQueue.push)(FeatureQueue(4, 2), torch.randn(2))


def test_a_missing_and_a_surplus_column_are_reported():
    plain, labelled = FeatureQueue(4, 2), FeatureQueue(4, 2, with_ids=True)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.ids"'):
        torch.nn.Sequential(labelled).load_state_dict(torch.nn.Sequential(plain).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.ids"'):
        torch.nn.Sequential(plain).load_state_dict(torch.nn.Sequential(labelled).state_dict())
    assert "ids" in labelled.state_dict(), "loading leaves the given state as it was"


def test_ids_of_another_number_than_the_rows_leave_the_queue_as_it_was():
    queue = FeatureQueue(4, 2, with_ids=True)
    # Without the tests' own shape checks, as a user calls it.
    with pytest.raises(UserError, match="`ids` has 1 entries, but `features` has 2 rows"):
        inspect.unwrap(FeatureQueue.push)(queue, torch.ones(2, 2), torch.zeros(1, dtype=torch.long))
    assert len(queue) == 0


@pytest.mark.parametrize("bad", ["whole", "nan"])
def test_features_that_are_no_finite_floats_are_not_taken_up(bad):
    features = torch.ones(3, 2)
    features[1, 0] = float("nan") if bad == "nan" else 1.0
    features = features.long() if bad == "whole" else features
    for write in (
        lambda: inspect.unwrap(FeatureQueue.push)(FeatureQueue(4, 2), features),
        lambda: inspect.unwrap(InstanceBank.write)(InstanceBank(4, 2), torch.arange(3), features),
    ):
        with pytest.raises(UserError, match="floating point" if bad == "whole" else "NaN or infinity in row 1"):
            write()
