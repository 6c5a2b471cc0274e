"""The contracts leave room: what no method or domain of the project needs today, and works without a change to it."""

import pytest
import torch
from conftest import LinearEncoder
from torch import nn
from torch.optim.swa_utils import AveragedModel

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.evaluation import extract_features
from contrastive_mm.losses import nt_xent
from contrastive_mm.methods import Method, MoCo, MoCoConfig, Objective, SimCLR
from contrastive_mm.positives import Positives
from contrastive_mm.training import Trainer, TrainerConfig, Updater, make_accelerator
from contrastive_mm.views import RandomStream, Views, encode_views

DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
SERIES = torch.randn(16, 10, 3, generator=torch.Generator().manual_seed(4))


def moco(encoder):
    return MoCo(encoder, MoCoConfig(queue_size=32))


def make_updater(method, make_views):
    return Updater(method, torch.optim.SGD(method.parameters(), 0.1), make_views, make_accelerator("no", "cpu"))


class DenseEncoder(nn.Module):
    """Features (B, T, D) for each step of series (B, T, 3)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, series):
        return self.layer(series).tanh()


class MaskedMean(nn.Module):
    """Pools a dense encoder's features over the steps that are there: (B, T, D) to (B, D)."""

    feature_dim = 8

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, inputs):
        present = inputs["present"].float()[..., None]
        return (self.dense(inputs["series"]) * present).sum(1) / present.sum(1)


class SubSeries:
    """Parts of each series, padded to one length: the steps, which of them are there, and their time."""

    def __init__(self, padding=0.0):
        self.padding = padding
        self.stream = RandomStream(0)

    def __call__(self, batch):
        return Views((self._view(batch["series"]), self._view(batch["series"])))

    def _view(self, series):
        rows, generator = len(series), self.stream.on(series.device)
        start = torch.randint(4, (rows, 1), generator=generator)
        length = torch.randint(3, 7, (rows, 1), generator=generator)
        steps = torch.arange(6)
        present = steps < length
        time = start + steps
        part = series.gather(1, time[..., None].expand(-1, -1, 3))
        return {"series": part.masked_fill(~present[..., None], self.padding), "present": present, "time": time}


@pytest.mark.parametrize("make_method", [SimCLR, moco])
def test_views_may_be_mappings_with_masks_and_times_and_padding_never_counts(make_method):
    losses = []
    for padding in (0.0, 1e4):
        torch.manual_seed(0)
        method = make_method(MaskedMean(DenseEncoder()))
        updater = make_updater(method, SubSeries(padding))
        losses.append([updater.step({"series": SERIES})["loss"].item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_times_align_the_steps_of_two_views():
    first, second = SubSeries()({"series": SERIES}).inputs
    same = (first["time"][:, :, None] == second["time"][:, None, :]) & (
        first["present"][:, :, None] & second["present"][:, None, :]
    )
    row, i, j = same.nonzero().T
    assert len(row) > 10
    assert torch.equal(first["series"][row, i], second["series"][row, j])


def test_a_dense_encoder_is_trained_through_a_pooling_wrapper_and_stays_dense():
    dense = DenseEncoder()
    before = dense.layer.weight.detach().clone()
    method = SimCLR(MaskedMean(dense))
    make_updater(method, SubSeries()).step({"series": SERIES})
    assert not torch.equal(dense.layer.weight, before)
    assert method.encoder.dense(SERIES).shape == (16, 10, 8)
    whole = {"series": SERIES, "present": torch.ones(16, 10, dtype=torch.bool)}
    pooled = extract_features(method.encoder, [whole])
    torch.testing.assert_close(pooled, dense(SERIES).mean(1).detach())


class TimeContrast(Method):
    """Every step of a series is a sample; steps near in time, of the same series, belong together."""

    config_class = dict
    window = 1.0

    def forward(self, views):
        pair = views.require_pair("TimeContrast")
        first, second = (features.flatten(0, 1) for features in encode_views(self.encoder, pair))
        rows, steps = pair[0].shape[:2]
        series = torch.arange(rows).repeat_interleave(steps)
        together = Positives.within(torch.arange(steps).float().repeat(rows), self.window, series)
        return Objective(nt_xent(first, second, 0.2, positives=together), features=(first, second))


def test_dense_features_are_trained_with_positives_in_a_window_of_time():
    dense = DenseEncoder()
    dense.feature_dim = 8
    method = TimeContrast(dense, {})
    updater = make_updater(method, lambda batch: Views((batch["series"][:, :8], batch["series"][:, 2:])))
    losses = [updater.step({"series": SERIES.cumsum(1)})["loss"].item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    views = Views((SERIES[:, :8], SERIES[:, 2:]))
    narrow = method(views).loss.item()
    method.window = 3.0
    assert method(views).loss.item() != pytest.approx(narrow, rel=1e-3), "a wider window has more positives"


class StandardisedViews:
    """Noise in units of each column's spread in the training data, which `fit` measures and the state keeps."""

    def __init__(self):
        self.stream = RandomStream(0)
        self.spread = None

    def fit(self, data):
        self.spread = data.std(0)
        return self

    def __call__(self, batch):
        x, generator = batch["x"], self.stream.on(batch["x"].device)
        return Views(tuple(x + 0.1 * self.spread * torch.randn(x.shape, generator=generator) for _ in range(2)))

    def state_dict(self):
        return {"stream": self.stream.state_dict(), "spread": self.spread}

    def load_state_dict(self, state):
        self.stream.load_state_dict(state["stream"])
        self.spread = state["spread"]


def test_a_view_maker_is_fitted_on_the_training_data_first_and_resumes_as_fitted(tmp_path):
    def trainer(make_views):
        torch.manual_seed(0)
        batches = ShuffledBatches(len(DATA), 8, lambda rows: {"x": DATA[rows]})
        config = TrainerConfig(steps=6, checkpoint_every=3, device="cpu")
        return Trainer(SimCLR(LinearEncoder()), make_views, batches, config, tmp_path)

    whole = trainer(StandardisedViews().fit(DATA))
    whole.train()
    whole.checkpoints.paths()[-1].unlink()
    resumed = trainer(StandardisedViews())
    resumed.train(resume=True)
    assert torch.equal(resumed.updater.make_views.spread, DATA.std(0))
    for mine, other in zip(resumed.method.parameters(), whole.method.parameters(), strict=True):
        assert torch.equal(mine, other)


class FillingEncoder(LinearEncoder):
    """Takes whole rows, or rows with a mask of what is known, whose gaps it fills with a learned value."""

    def __init__(self):
        super().__init__()
        self.filling = nn.Parameter(torch.zeros(6))

    def forward(self, inputs):
        if isinstance(inputs, torch.Tensor):
            return super().forward(inputs)
        return super().forward(torch.where(inputs["known"], inputs["x"], self.filling))


@pytest.mark.parametrize("make_method", [SimCLR, moco])
def test_views_may_differ_in_kind(make_method):
    def corrupted_and_clean(batch):
        known = torch.rand(batch["x"].shape) > 0.3
        return Views(({"x": batch["x"], "known": known}, batch["x"]))

    method = make_method(FillingEncoder())
    updater = make_updater(method, corrupted_and_clean)
    for _ in range(3):
        updater.step({"x": DATA})
    assert method.encoder.filling.abs().sum() > 0, "the corrupted view reaches its own parameters"


def test_weights_are_averaged_beside_the_momentum_encoder():
    method = moco(LinearEncoder())
    updater = make_updater(method, lambda batch: Views((batch["x"], batch["x"] + 0.1)))
    averaged = AveragedModel(method.encoder)
    passed = []
    for _ in range(4):
        updater.step({"x": DATA})
        averaged.update_parameters(method.encoder)
        passed.append(method.encoder.layer.weight.detach().clone())
    torch.testing.assert_close(averaged.module.layer.weight, torch.stack(passed).mean(0))
    follower = method.momentum_encoder.module[0].layer.weight
    assert not torch.equal(follower, averaged.module.layer.weight)
    assert extract_features(averaged.module, [DATA]).shape == (24, averaged.module.feature_dim)
