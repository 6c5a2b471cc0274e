"""Banks and momentum encoders in two processes: the same on both, and the same as in one process."""

import pytest
import torch
from conftest import LinearEncoder
from processes import run_processes
from torch.nn.parallel import DistributedDataParallel

from contrastive_mm.distributed import gather_rows, process_index
from contrastive_mm.memory import FeatureQueue, InstanceBank
from contrastive_mm.methods.moco import MoCo, MoCoConfig
from contrastive_mm.methods.swav import SwAV, SwAVConfig
from contrastive_mm.views import Views

# Rows of each process, step by step: none, uneven, more than a queue of 8 holds.
STEPS = [(3, 1), (0, 2), (5, 0), (20, 13), (0, 0), (1, 1)]


def batches(rank):
    """One process's (features, ids) of every step; the same wherever they are made."""
    for step, counts in enumerate(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        yield (
            torch.randn(counts[rank], 4, generator=generator),
            torch.randint(10, (counts[rank],), generator=generator),
        )


def logits(rank):
    return torch.randn(2 + 3 * rank, 5, generator=torch.Generator().manual_seed(rank))


def written_banks(steps):
    queue, bank = FeatureQueue(8, 4, with_ids=True), InstanceBank(10, 4)
    half = FeatureQueue(8, 4, dtype=torch.bfloat16, device="cpu")
    lengths = []
    for features, ids in steps:
        queue.push(features, ids)
        lengths.append(len(queue))
        half.push(features)
        bank.write(ids, features)
    return {"lengths": lengths, "queue": queue.state_dict(), "half": half.state_dict(), "bank": bank.state_dict()}


def train_moco(rank):
    """Two accumulated batches a step under DistributedDataParallel, other data on each process."""
    torch.manual_seed(0)
    method = MoCo(LinearEncoder(), MoCoConfig(queue_size=7, momentum=0.5))
    wrapped = DistributedDataParallel(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        for _ in range(2):
            wrapped(Views((torch.randn(2 + rank, 6), torch.randn(2 + rank, 6)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    return method.state_dict()


def train_swav(ranks, wrap=lambda method: method):
    """Five steps on the rows of these ranks; BatchNorm is left out, since every process has its own statistics."""
    torch.manual_seed(0)
    config = SwAVConfig(
        num_prototypes=5,
        projection_layers=1,
        projection_dim=4,
        queue_size=8,
        queue_start_steps=2,
        freeze_prototypes_steps=1,
    )
    method = SwAV(LinearEncoder(), config)
    wrapped = wrap(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    used = []
    for step in range(5):
        seeds = [torch.Generator().manual_seed(10 * step + rank) for rank in ranks]
        rows = [torch.randn(2, 2 + rank, 6, generator=seed) for rank, seed in zip(ranks, seeds, strict=True)]
        used.append(method._queue_scores() is not None)
        wrapped(Views(tuple(torch.cat(rows, dim=1)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    return {**method.state_dict(), "used": used}


def work(rank):
    bank = InstanceBank(1000, 4)
    return {
        "rank": process_index(),
        **written_banks(batches(rank)),
        "gathered": [gather_rows(features) for features, _ in batches(rank)],
        "flags": gather_rows(torch.tensor([True, False, rank == 1])),
        "log_normaliser": bank.log_normaliser(logits(rank)),
        "negatives": bank.sample_negatives(3, 8),
        "after drawing": bank.state_dict(),
        "moco": train_moco(rank),
        # Nothing is copied from the first process: the queues must come out equal by themselves.
        "swav": train_swav([rank], lambda method: DistributedDataParallel(method, broadcast_buffers=False)),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(work, tmp_path_factory.mktemp("ranks"))


def together():
    """What one process would see of the two: rank 0's rows, then rank 1's."""
    for parts in zip(batches(0), batches(1), strict=True):
        yield tuple(torch.cat(column) for column in zip(*parts, strict=True))


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_are_gathered_in_the_order_of_the_processes(ranks):
    assert [result["rank"] for result in ranks] == [0, 1]
    for result in ranks:
        for gathered, (features, _) in zip(result["gathered"], together(), strict=True):
            same(gathered, features)
        assert result["flags"].tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize("name", ["lengths", "queue", "half", "bank"])
def test_banks_are_the_same_on_all_processes_and_as_in_one(ranks, name):
    expected = written_banks(together())[name]
    for result in ranks:
        same(result[name], expected)


def test_the_normaliser_is_that_of_the_whole_batch(ranks):
    expected = InstanceBank(1000, 4).log_normaliser(torch.cat([logits(0), logits(1)]))
    same(ranks[0]["log_normaliser"], ranks[1]["log_normaliser"])
    torch.testing.assert_close(ranks[0]["log_normaliser"], expected)


def test_each_process_draws_negatives_of_its_own_from_one_state(ranks):
    assert not torch.equal(ranks[0]["negatives"], ranks[1]["negatives"])
    same(ranks[0]["after drawing"], ranks[1]["after drawing"])


def test_a_momentum_method_trains_to_the_same_state_on_all_processes(ranks):
    same(ranks[0]["moco"], ranks[1]["moco"])
    queue = ranks[0]["moco"]["queue._extra_state"]
    assert (queue["filled"], queue["cursor"]) == (7, 3 * 2 * 5 % 7), "both processes' rows, in two batches a step"
    assert ranks[0]["moco"]["momentum_encoder._extra_state"] == {"updates": 3}


def test_swav_with_queues_trains_to_the_state_of_one_process_with_all_rows(ranks):
    one = train_swav([0, 1])
    assert one["used"] == [False, False, True, True, True]
    same(ranks[0]["swav"], ranks[1]["swav"])
    for result in ranks:
        for name, value in one.items():
            torch.testing.assert_close(result["swav"][name], value, msg=lambda said, name=name: f"{name}: {said}")
    assert one["queues.0._extra_state"] == {"filled": 8, "cursor": 5 * 5 % 8}, "both processes' rows"


def test_one_process_gathers_its_own_rows():
    features = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(gather_rows(features), features)
    assert not gather_rows(features).requires_grad
