"""A small problem whose answer is known: samples of a cluster share six numbers, ten more are noise."""

import copy

import torch
from torch import nn

from contrastive_mm.methods import get_method
from contrastive_mm.views import Views

CLUSTERS, SIGNAL, NOISE = 8, 6, 10
HEAD = {"hidden_dim": 64, "projection_dim": 32}
SMALL = {
    "barlow-twins": {"hidden_dim": 64, "projection_dim": 64},
    "byol": {**HEAD, "momentum": 0.9},
    "curl": {"latent_dim": 32},
    "dcl": {**HEAD, "weight_concentration": 0.5},
    "moco": {**HEAD, "queue_size": 512, "momentum": 0.9},
    "moco-v3": {**HEAD, "momentum": 0.9},
    "nnclr": {**HEAD, "queue_size": 512},
    "npid": {"projection_dim": 32, "bank_size": 256, "negatives": 64, "temperature": 0.2},
    "simclr": HEAD,
    "simclr-v2": {**HEAD, "queue_size": 256, "momentum": 0.9},
    "simcse": {"temperature": 0.1},
    "simsiam": {"hidden_dim": 64, "projection_dim": 64, "prediction_hidden_dim": 32},
    "supcon": HEAD,
    "swav": {"hidden_dim": 64, "projection_dim": 32, "num_prototypes": 24, "freeze_prototypes_steps": 10},
    "vicreg": {"hidden_dim": 64, "projection_dim": 64},
}


class Encoder(nn.Sequential):
    feature_dim = 16

    def __init__(self):
        super().__init__(nn.Linear(SIGNAL + NOISE, 64), nn.ReLU(), nn.Linear(64, 16))


def samples(count, generator):
    centres = torch.randn(CLUSTERS, SIGNAL, generator=torch.Generator().manual_seed(9))
    cluster = torch.arange(count) % CLUSTERS
    return centres[cluster] + 0.2 * torch.randn(count, SIGNAL, generator=generator), cluster


def view(signal, generator):
    noise = 2 * torch.randn(len(signal), NOISE, generator=generator)
    return torch.cat([signal + 0.2 * torch.randn(signal.shape, generator=generator), noise], dim=1)


def make_views(count, generator, crops=0):
    signal, cluster = samples(count, generator)
    views = tuple(view(signal, generator) for _ in range(2 + crops))
    return Views(views, sample_ids=torch.arange(count), labels=cluster)


def neighbour_accuracy(encoder):
    generator = torch.Generator().manual_seed(77)
    signal, cluster = samples(256, generator)
    with torch.no_grad():
        features = nn.functional.normalize(encoder.eval()(view(signal, generator)), dim=1)
    encoder.train()
    nearest = (features @ features.T).fill_diagonal_(-1).topk(5).indices
    return float((cluster[nearest] == cluster[:, None]).float().mean())


def build(name, **options):
    torch.manual_seed(0)
    method_class = get_method(name)
    return method_class(Encoder(), method_class.config_class(**{**SMALL.get(name, {}), **options}))


def train(method, steps, generator=None, crops=0, batch=128):
    generator = generator or torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    for _ in range(steps):
        objective = method(make_views(batch, generator, crops))
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        method.after_step()
    return objective


def slow_encoder(method):
    """The key encoder as it is now, as plain code: a copy of weights into a fresh pair of encoder and head."""
    return copy.deepcopy(method.momentum_encoder.module).train()


def unit_lists(features):
    return nn.functional.normalize(features.detach(), dim=1).tolist()
