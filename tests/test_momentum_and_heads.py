import pytest
import torch
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.heads import BilinearSimilarity, LayerNormHead, ProjectionHead
from contrastive_mm.momentum import MomentumEncoder


def test_update_equals_the_formula():
    source = nn.Linear(3, 2)
    slow = MomentumEncoder(source, 0.9)
    before = [p.clone() for p in slow.module.parameters()]
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    slow.update(source)
    for old, new, fast in zip(before, slow.module.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * fast)


@pytest.mark.parametrize(("momentum", "moved"), [(1.0, False), (0.0, True)])
def test_ends_of_the_range(momentum, moved):
    source = nn.Linear(3, 2)
    slow = MomentumEncoder(source, momentum)
    with torch.no_grad():
        source.weight.add_(1.0)
    slow.update(source)
    assert torch.allclose(slow.module.weight, source.weight) is moved


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


def test_momentum_outside_the_range_is_refused():
    with pytest.raises(UserError, match=r"momentum = 1\.5"):
        MomentumEncoder(nn.Linear(2, 2), 1.5)


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
