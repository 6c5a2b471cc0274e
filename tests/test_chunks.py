"""Encoding in chunks: the direct step's loss and gradient, with the activations of one chunk."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_problem import SMALL, Encoder, build, make_views
from torch import nn

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.errors import UserError
from contrastive_mm.methods import METHODS, SimCLR, SimCLRConfig
from contrastive_mm.training import Trainer, TrainerConfig, Updater
from contrastive_mm.training.chunks import encode_in_chunks
from contrastive_mm.views import Views


def step(method, views, seed=0):
    torch.manual_seed(seed)
    method.zero_grad()
    loss = method(views).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 5, 16, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_whole_batch(name, size, generator):
    direct = build(name).double()
    chunked = copy.deepcopy(direct)
    encode_in_chunks(chunked, size)
    for _ in range(2):  # the second step meets filled banks
        views = make_views(16, generator)
        views = Views(tuple(each.double() for each in views.inputs), sample_ids=views.sample_ids, labels=views.labels)
        loss, gradients = step(direct, views)
        chunked_loss, chunked_gradients = step(chunked, views)
        assert chunked_loss == pytest.approx(loss, rel=1e-12)
        assert gradients.keys() == chunked_gradients.keys()
        for key, expected in gradients.items():
            torch.testing.assert_close(chunked_gradients[key], expected, rtol=1e-9, atol=1e-12)
        direct.after_step()
        chunked.after_step()
    assert chunked.state_dict().keys() == direct.state_dict().keys()


class Noisy(nn.Module):
    """An encoder whose layers are random (dropout), and that counts the rows it meets with and without gradient."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 8))
        self.met = []

    def forward(self, inputs):
        self.met.append(len(inputs))
        return self.layers(inputs)


def method_with(make_encoder):
    torch.manual_seed(0)
    return SimCLR(make_encoder(), SimCLRConfig(hidden_dim=16, projection_dim=8))


def test_dropout_masks_are_the_same_when_a_chunk_is_encoded_again(generator):
    """Against the same chunks with all activations held, which draw their masks once."""

    class HeldInChunks(Noisy):
        def forward(self, inputs):
            return torch.cat([self.layers(chunk) for chunk in inputs.split(6)])

    views = make_views(16, generator)
    held, chunked = method_with(HeldInChunks), method_with(Noisy)
    encode_in_chunks(chunked, 6)
    (loss, gradients), (chunked_loss, chunked_gradients) = step(held, views), step(chunked, views)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for key, expected in gradients.items():
        torch.testing.assert_close(chunked_gradients[key], expected)
    assert sorted(chunked.encoder.met) == [2] * 2 + [6] * 10, "each chunk twice"


def test_the_program_draws_the_same_random_numbers_afterwards(generator):
    views = make_views(16, generator)
    drawn = []
    for size in (6, 6):
        method = method_with(Noisy)
        encode_in_chunks(method, size)
        step(method, views, seed=1)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_running_statistics_count_each_chunk_once(generator):
    class Normalised(nn.Sequential):
        feature_dim = 8

    def fresh():
        torch.manual_seed(5)
        return Normalised(nn.Linear(16, 8), nn.BatchNorm1d(8))

    views, expected = make_views(16, generator), fresh().train()
    for chunk in torch.cat(views.inputs).split(8):
        expected(chunk)
    method = method_with(fresh)
    encode_in_chunks(method, 8)
    step(method, views)
    assert int(method.encoder[1].num_batches_tracked) == 4
    torch.testing.assert_close(method.encoder[1].running_mean, expected[1].running_mean)
    assert method.encoder[1].track_running_stats


def held_numbers(method, views):
    """How many numbers the graph of a step holds for its backward pass, parameters not counted."""
    own, held = {id(p) for p in method.parameters()}, {}

    def pack(tensor):
        if id(tensor) not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method(views).loss
    assert loss.requires_grad
    return sum(held.values())


def test_activations_of_the_encoder_are_not_held(generator):
    class Wide(Noisy):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)
            )

    views = make_views(64, generator)
    direct, chunked = method_with(Wide), method_with(Wide)
    encode_in_chunks(chunked, 8)
    assert held_numbers(chunked, views) < held_numbers(direct, views) / 5


@pytest.mark.parametrize(
    ("name", "rows"), [("moco", 32), ("moco-v3", 64), ("byol", 64), ("curl", 32), ("simclr-v2", 64)]
)
def test_slow_copies_of_the_encoder_take_chunks_too(name, rows, generator):
    method = build(name)
    met = []

    class Counting(Encoder):
        def forward(self, inputs):
            met.append(len(inputs))
            return super().forward(inputs)

    for module in method.modules():
        if type(module) is Encoder:
            module.__class__ = Counting
    encode_in_chunks(method, 5)
    method(make_views(16, generator))
    assert max(met) == 5
    assert sum(met) == rows, "queries and keys"


def test_a_method_made_to_chunk_twice_takes_the_last_size(generator):
    method = method_with(Noisy)
    encode_in_chunks(method, 4)
    encode_in_chunks(method, 32)
    method(make_views(16, generator))
    assert method.encoder.met == [32]
    assert isinstance(method.encoder, Noisy)
    assert copy.deepcopy(method.encoder)(torch.zeros(40, 16)).shape == (40, 8)


def test_a_size_below_one_is_refused():
    with pytest.raises(UserError, match="chunk_size = 0; it must be at least 1"):
        encode_in_chunks(build("simclr", **SMALL["simclr"]), 0)


def test_an_updater_and_a_trainer_take_the_size_as_an_option(tmp_path, generator):
    method = method_with(Noisy)
    updater = Updater(
        method, torch.optim.SGD(method.parameters(), 0.1), lambda batch: make_views(16, generator), chunk_size=5
    )
    updater.step({"x": torch.zeros(1)})
    assert max(method.encoder.met) == 5
    method = method_with(Noisy)
    batches = ShuffledBatches(16, 16, lambda rows: {"x": rows})
    config = TrainerConfig(steps=1, chunk_size=5)
    Trainer(method, lambda batch: make_views(16, generator), batches, config, tmp_path).train()
    assert max(method.encoder.met) == 5
    assert load_file(tmp_path / "encoder.safetensors").keys() == Noisy().state_dict().keys()
    with pytest.raises(UserError, match="--chunk-size = 0; it must be at least 1"):
        TrainerConfig(chunk_size=0)
