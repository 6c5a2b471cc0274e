import pytest
import torch

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.errors import UserError


def make(**options):
    return ShuffledBatches(10, 3, lambda rows: {"row": rows}, **{"seed": 1, **options})


def epoch(batches):
    return [batch["row"].tolist() for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_epoch_has_no_sample_twice_and_the_next_has_another_order(prefetch):
    batches = make(prefetch=prefetch)
    first, second = epoch(batches), epoch(batches)
    assert len(first) == len(batches) == 3
    assert len({row for batch in first for row in batch}) == 9
    assert first != second


@pytest.mark.parametrize("prefetch", [0, 2])
def test_continues_in_the_middle_of_an_epoch(prefetch):
    whole = make()
    expected = [epoch(whole), epoch(whole)]
    stopped = make(prefetch=prefetch)
    running = iter(stopped)
    next(running)
    state = stopped.state_dict()
    resumed = make(prefetch=prefetch)
    resumed.load_state_dict(state)
    assert [epoch(resumed), epoch(resumed)] == [expected[0][1:], expected[1]]


def test_the_seed_decides_the_order():
    assert epoch(make()) == epoch(make())
    assert epoch(make()) != epoch(make(seed=2))


def test_another_size_or_seed_is_refused_on_resume():
    with pytest.raises(UserError, match="seed = 1, this run has 5"):
        make(seed=5).load_state_dict(make().state_dict())


@pytest.mark.parametrize("size", [1, 11])
def test_a_batch_size_that_does_not_fit_is_refused(size):
    with pytest.raises(UserError, match=f"batch_size = {size}, but there are 10"):
        ShuffledBatches(10, size, lambda rows: {"row": rows})


def test_an_error_while_prefetching_reaches_the_caller():
    def load(rows):
        raise UserError("no such image")

    with pytest.raises(UserError, match="no such image"):
        list(ShuffledBatches(4, 2, load, prefetch=2))


def test_arrange_gets_the_order():
    batches = ShuffledBatches(6, 2, lambda rows: {"row": rows}, arrange=lambda order, _: order.sort().values)
    assert torch.tensor(epoch(batches)).flatten().tolist() == list(range(6))


def test_as_many_but_other_samples_are_refused_on_resume():
    saved = make(identity="these").state_dict()
    make(identity="these").load_state_dict(saved)
    with pytest.raises(UserError, match="10 training samples as when the checkpoint was made, but not the same "):
        make(identity="others").load_state_dict(saved)
    del saved["data"]
    make(identity="others").load_state_dict(saved)  # of an earlier release, which noted nothing
