import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.memory import FeatureQueue


def rows(start, count):
    return torch.arange(start, start + count).float()[:, None].expand(count, 2)


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


def test_state_dict_is_read_without_running_code(tmp_path):
    queue = FeatureQueue(5, 2)
    queue.push(rows(0, 3))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = FeatureQueue(5, 2)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    assert torch.equal(queue.features(), other.features())


def test_bad_input_is_named():
    with pytest.raises(UserError, match="size=0"):
        FeatureQueue(0, 2)
    with pytest.raises(UserError, match="2 dimensions, but `features` has 3"):
        FeatureQueue(4, 2).push(torch.ones(1, 3))
