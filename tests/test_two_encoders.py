"""Two different encoders behind one method, with a learned scale and bias: CLIP and SigLIP in thirty lines."""

from dataclasses import dataclass

import pytest
import torch
from conftest import LinearEncoder
from torch import nn

from contrastive_mm.losses import LearnableTemperature, info_nce, sigmoid_loss
from contrastive_mm.methods import Method, Objective, SimCLR
from contrastive_mm.training import Updater, make_accelerator
from contrastive_mm.views import Views, encode_views

DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))


def make_updater(method, make_views, optimizer):
    return Updater(method, optimizer, make_views, make_accelerator("no", "cpu"))


class TwoTowers(nn.Module):
    """One encoder for each kind of view, told apart by the view's names."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleDict({"left": LinearEncoder(4), "right": LinearEncoder(2)})

    def forward(self, inputs):
        ((name, tensor),) = inputs.items()
        return self.towers[name](tensor)


def test_two_different_encoders_stand_behind_one_method():
    def halves(batch):
        return Views(({"left": batch["x"][:, :4]}, {"right": batch["x"][:, 4:]}))

    method = SimCLR(TwoTowers())
    before = [parameter.detach().clone() for parameter in method.encoder.parameters()]
    make_updater(method, halves, torch.optim.SGD(method.parameters(), 0.1)).step({"x": DATA})
    for old, new in zip(before, method.encoder.parameters(), strict=True):
        assert not torch.equal(old, new)


@dataclass(frozen=True)
class TwoTowerConfig:
    """How two towers are compared."""

    temperature: float = 0.1
    """The first temperature; it is learned."""
    bias: float | None = None
    """The first bias, which is learned too (SigLIP); none compares by softmax both ways (CLIP)."""


class TwoTowerContrast(Method):
    """CLIP (Radford et al. 2021, figure 3) or, with a bias, SigLIP (Zhai et al. 2023, algorithm 1)."""

    config_class = TwoTowerConfig

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.temperature = LearnableTemperature(config.temperature)
        self.bias = None if config.bias is None else nn.Parameter(torch.tensor(config.bias))

    def forward(self, views):
        first, second = encode_views(self.encoder, views.require_pair("Two towers"))
        temperature = self.temperature()
        if self.bias is None:
            loss = info_nce(first, second, temperature=temperature, symmetric=True, gather=True)
            metrics = {}
        else:
            loss = sigmoid_loss(first, second, temperature, self.bias, gather=True)
            metrics = {"bias": self.bias.detach().clone()}
        metrics["temperature"] = temperature.detach()
        return Objective(loss, metrics, features=(first, second), candidates=len(first))


def paired_halves(batch):
    """Two kinds of input that say the same: four numbers, and two sums of them."""
    left = batch["x"][:, :4]
    sums = torch.stack([left[:, 0] + left[:, 1], left[:, 2] - left[:, 3]], dim=1)
    return Views(({"left": left}, {"right": sums}))


@pytest.mark.parametrize("bias", [None, -4.0])
def test_two_encoders_learn_a_scale_and_a_bias(bias):
    def build(seed):
        torch.manual_seed(seed)
        return TwoTowerContrast(TwoTowers(), TwoTowerConfig(bias=bias))

    method = build(0)
    learned = [name for name, _ in method.named_parameters() if "encoder" not in name]
    assert learned == (["temperature.log_scale"] if bias is None else ["bias", "temperature.log_scale"])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    updater = Updater(
        method, torch.optim.Adam(method.parameters(), 0.02), paired_halves, make_accelerator("no", "cpu")
    )
    steps = [updater.step({"x": DATA}) for _ in range(60)]
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    for name, value in method.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert steps[0]["temperature"] == pytest.approx(0.1)
    assert bias is None or steps[0]["bias"] == bias
    # Both numbers come back with the state, and with them the loss.
    other = build(1)
    other.load_state_dict(method.state_dict())
    views = paired_halves({"x": DATA})
    assert torch.equal(other(views).loss, method(views).loss)


@pytest.mark.parametrize("bias", [None, -4.0])
def test_gradients_of_scale_and_bias_are_the_slopes_of_the_loss(bias):
    method, views = (
        TwoTowerContrast(TwoTowers(), TwoTowerConfig(bias=bias)).double(),
        paired_halves({"x": DATA.double()}),
    )
    method(views).loss.backward()
    for number in (method.temperature.log_scale, *([] if bias is None else [method.bias])):
        losses = []
        for step in (1e-6, -2e-6):
            number.data.add_(step)
            losses.append(method(views).loss.detach())
        number.data.add_(1e-6)
        assert abs(number.grad) > 0.01
        assert float((losses[0] - losses[1]) / 2e-6) == pytest.approx(float(number.grad), rel=1e-5)


@pytest.mark.parametrize("bias", [None, -4.0])
def test_the_learned_scale_stays_within_its_bound_and_can_come_back(bias):
    torch.manual_seed(0)
    method = TwoTowerContrast(TwoTowers(), TwoTowerConfig(temperature=0.0105, bias=bias))
    optimizer = torch.optim.SGD([method.temperature.log_scale], 1e-6)
    updater = make_updater(method, paired_halves, optimizer)
    for _ in range(3):
        method.temperature.log_scale.data.add_(1.0)  # far more than the bound allows
        assert updater.step({"x": DATA})["temperature"].item() == pytest.approx(0.01)
    assert method.temperature.log_scale.grad is not None
    assert method.temperature.log_scale.grad != 0, "a clamped scale is not a dead one"
