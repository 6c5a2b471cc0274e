import copy
import math

import pytest
import torch
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.heads import BilinearSimilarity, LayerNormHead, ProjectionHead
from contrastive_mm.momentum import MomentumEncoder, cosine_momentum


def moved(source):
    """The same module with other weights, as after an optimizer's step."""
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    return source


def test_update_equals_the_formula():
    source = nn.Linear(3, 2)
    slow = MomentumEncoder(source, 0.9)
    before = [p.clone() for p in slow.module.parameters()]
    slow.update(moved(source))
    for old, new, fast in zip(before, slow.module.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * fast)


@pytest.mark.parametrize(("momentum", "arrives"), [(1.0, False), (0.0, True)])
def test_ends_of_the_range(momentum, arrives):
    source = nn.Linear(3, 2)
    slow = MomentumEncoder(source, momentum)
    with torch.no_grad():
        source.weight.add_(1.0)
    slow.update(source)
    assert torch.allclose(slow.module.weight, source.weight) is arrives


def test_no_gradient_reaches_the_copy():
    slow = MomentumEncoder(nn.Linear(3, 2), 0.9)
    assert not slow(torch.randn(4, 3)).requires_grad
    assert not any(parameter.requires_grad for parameter in slow.parameters())


def test_stays_in_train_mode_and_keeps_its_own_batch_statistics():
    source = nn.BatchNorm1d(2)
    slow = MomentumEncoder(source, 0.5)
    assert slow.train().module.training
    slow(torch.randn(64, 2) + 3)
    slow.update(source)
    assert float(slow.module.running_mean.mean()) > 0.2
    assert float(source.running_mean.abs().max()) == 0


def test_the_cosine_goes_from_the_base_to_one_and_stays():
    values = [cosine_momentum(0.96, step, 100) for step in range(103)]
    for step in range(101):
        assert values[step] == pytest.approx(1 - 0.04 * (math.cos(math.pi * step / 100) + 1) / 2, abs=1e-12)
    assert values[0] == pytest.approx(0.96)
    assert values[50] == pytest.approx(0.98)
    assert values[100:] == [1.0, 1.0, 1.0]
    assert values == sorted(values)


def test_scheduled_updates_equal_a_loop():
    source = nn.Linear(1, 1, bias=False)
    slow, expected = MomentumEncoder(source, 0.5, total_steps=4), source.weight.item()
    for step in range(6):
        fast = moved(source).weight.item()
        momentum = 1 - 0.5 * (math.cos(math.pi * min(step, 4) / 4) + 1) / 2
        assert slow.current_momentum == pytest.approx(momentum)
        slow.update(source)
        expected = momentum * expected + (1 - momentum) * fast
        assert slow.module.weight.item() == pytest.approx(expected, abs=1e-6)


def test_forwards_between_two_updates_do_not_move_the_schedule():
    slow = MomentumEncoder(nn.Linear(3, 2), 0.5, total_steps=10)
    for _ in range(4):
        slow(torch.randn(2, 3))
    assert slow.current_momentum == 0.5


def test_a_resumed_schedule_goes_on_where_it_was(tmp_path):
    source = nn.Linear(3, 2)
    slow, other = (MomentumEncoder(source, 0.5, total_steps=10) for _ in range(2))
    for _ in range(3):
        slow.update(moved(source))
    torch.save(slow.state_dict(), tmp_path / "slow.pt")
    other.load_state_dict(torch.load(tmp_path / "slow.pt", weights_only=True))
    moved(source)
    for each in (slow, other):
        each.update(source)
    assert other.current_momentum == slow.current_momentum == cosine_momentum(0.5, 4, 10)
    assert torch.equal(other.module.weight, slow.module.weight)


def test_buffers_follow_the_source_where_that_is_asked_for():
    source = nn.BatchNorm1d(2)
    slow = MomentumEncoder(source, 0.5, buffers="copy")
    source(torch.randn(64, 2) + 3)
    slow.update(source)
    assert torch.equal(slow.module.running_mean, source.running_mean)
    assert slow.module.num_batches_tracked == 1
    source(torch.randn(64, 2))
    assert not torch.equal(slow.module.running_mean, source.running_mean), "copied, not shared"


def test_an_existing_slow_copy_is_used_frozen_and_moved():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    slow = MomentumEncoder(source, 0.9, module=target)
    before = target.weight.clone()
    slow.update(source)
    assert slow.module is target
    assert not target.weight.requires_grad
    torch.testing.assert_close(target.weight, 0.9 * before + 0.1 * source.weight)
    assert source.weight.requires_grad


def test_a_copy_that_its_owner_moves_is_left_alone():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    slow, before = MomentumEncoder(source, 0.0, module=target, updated_elsewhere=True), target.weight.clone()
    slow.update(source)
    assert torch.equal(target.weight, before)
    with torch.no_grad():
        target.weight.zero_()
        target.bias.zero_()
    assert torch.equal(slow(torch.randn(4, 3)), torch.zeros(4, 2)), "what its owner did is seen"


def test_bad_input_is_named():
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    tied = nn.Sequential(copy.deepcopy(source[0]), source[1])
    for options, problem in [
        ({"momentum": 1.5}, r"momentum = 1\.5"),
        ({"total_steps": 0}, "total_steps = 0"),
        ({"updated_elsewhere": True}, "needs `module`"),
        ({"module": source}, r"0\.weight in common with `source`"),
        ({"module": tied}, r"1\.weight in common with `source`"),
        ({"module": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4))}, r"1\.weight has shape \(4, 2\), there \(3, 2\)"),
        ({"module": nn.Linear(2, 2)}, "2 of them, there 4"),
    ]:
        with pytest.raises(UserError, match=problem):
            MomentumEncoder(source, **options)
    slow = MomentumEncoder(source, 0.5)
    with pytest.raises(UserError, match=r"not the module that is followed: .*shape \(2, 2\), there \(5, 2\)"):
        slow.update(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3)))
    with pytest.raises(UserError, match="total_steps = 0"):
        slow.total_steps = 0
    assert slow.current_momentum == 0.5
    assert all(parameter.requires_grad for parameter in source.parameters())


class Crossed(nn.Module):
    """Layers of one shape, registered in an order of choice."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(2, 2))


def test_an_existing_copy_has_its_layers_in_the_same_order():
    with pytest.raises(UserError, match=r"b\.weight stands in the place of a\.weight\. Build both alike"):
        MomentumEncoder(Crossed("a", "b"), module=Crossed("b", "a"))
    source, wrapped = Crossed("a", "b"), nn.Sequential(Crossed("a", "b"))
    MomentumEncoder(source, 0.0, module=wrapped).update(source)
    assert torch.equal(wrapped[0].b.weight, source.b.weight), "names of another wrapper are no hindrance"


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_projection_head_shapes(layers, batch_norm):
    head = ProjectionHead(6, 5, 4, layers, batch_norm)
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert sum(isinstance(layer, nn.Linear) for layer in head) == layers
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in head) == (layers - 1 if batch_norm else 0)


def test_projection_head_of_no_layers_is_the_identity():
    head, features = ProjectionHead(6, 5, 4, 0), torch.randn(3, 6)
    assert torch.equal(head(features), features)
    assert head.output_dim == 6
    with pytest.raises(UserError, match="0 layers or more"):
        ProjectionHead(6, 5, 4, -1)


def test_layer_norm_bounds_the_latent():
    latent = LayerNormHead(6, 10)(1e6 * torch.randn(3, 6)).detach()
    assert float(latent.norm(dim=1).max()) <= 10**0.5 + 1e-3


def test_bilinear_is_q_w_k():
    bilinear = BilinearSimilarity(4)
    nn.init.normal_(bilinear.weight)
    query, key = torch.randn(3, 4), torch.randn(5, 4)
    expected = torch.einsum("id,de,je->ij", query, bilinear.weight, key)
    torch.testing.assert_close(bilinear(query) @ key.T, expected)
