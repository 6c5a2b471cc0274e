"""Methods in two processes: the averaged gradient is that of one process with the whole batch."""

import torch
import torch.distributed as dist
from conftest import LinearEncoder
from processes import run_processes
from torch import nn

from contrastive_mm.methods import METHODS, get_method
from contrastive_mm.views import Views

ROWS, STEPS, RATE = 12, 3, 0.2
HEAD = {"hidden_dim": 10, "projection_dim": 6}
SMALL = {
    "barlow-twins": HEAD,
    "byol": {**HEAD, "momentum": 0.8},
    "curl": {"latent_dim": 6, "momentum": 0.8},
    "dcl": {**HEAD, "weight_concentration": 0.5},
    "moco": {**HEAD, "queue_size": 16, "momentum": 0.8},
    "moco-v3": {**HEAD, "momentum": 0.8},
    "nnclr": {**HEAD, "queue_size": 16},
    "simclr": HEAD,
    "simclr-v2": {**HEAD, "queue_size": 40, "momentum": 0.8},
    "simcse": {},
    "simsiam": {**HEAD, "prediction_hidden_dim": 4},
    "supcon": HEAD,
    "swav": {**HEAD, "num_prototypes": 5, "queue_size": 8, "queue_start_steps": 1, "freeze_prototypes_steps": 0},
    "vicreg": HEAD,
}
# Methods, and how many views each gets: SimCSE's third is a hard negative, SwAV's a crop. NPID isn't here: each
# process draws its own noise.
CASES = [*((name, 2) for name in SMALL), ("simcse", 3), ("swav", 3)]


def without_batch_norm(module):
    """Each process normalises over its own rows, unless the layers are made SyncBatchNorm: no part of a method."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


def build(name):
    torch.manual_seed(0)
    method_class = get_method(name)
    method = method_class(LinearEncoder(), method_class.config_class(**SMALL[name])).double()
    without_batch_norm(method)
    return method


def make_views(step, count, rows):
    generator = torch.Generator().manual_seed(step)
    samples = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, ROWS, 6, generator=generator, dtype=torch.float64)
    ids = torch.arange(ROWS)
    views = tuple((samples + 0.5 * each)[rows] for each in noise)
    return Views(views, num_global=2, sample_ids=ids[rows], labels=(ids % 3)[rows])


def gradients(name, count, rank=0, processes=1):
    """The gradient of each trained weight at each step, averaged over processes as DistributedDataParallel does."""
    method, part, steps = build(name), ROWS // processes, []
    trained = {key: weight for key, weight in method.named_parameters() if weight.requires_grad}
    for step in range(STEPS):
        method(make_views(step, count, slice(rank * part, (rank + 1) * part))).loss.backward()
        for weight in trained.values():
            if processes > 1:
                dist.all_reduce(weight.grad)
                weight.grad /= processes
        steps.append({key: weight.grad.clone() for key, weight in trained.items()})
        with torch.no_grad():
            for weight in trained.values():
                weight -= RATE * weight.grad
                weight.grad = None
        method.after_step()
    return steps


def all_gradients(rank):
    return {f"{name} of {count}": gradients(name, count, rank, 2) for name, count in CASES}


def difference(found, whole):
    """The largest difference between two gradients of all weights, as a share of the largest entry."""
    assert found.keys() == whole.keys()
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    return max(float((found[key] - gradient).abs().max()) for key, gradient in whole.items()) / largest


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    assert sorted(SMALL) == sorted(set(METHODS) - {"npid"})
    # One test for all methods: to start the processes takes longer than all of their steps.
    found, wrong = run_processes(all_gradients, tmp_path), {}
    for name, count in CASES:
        expected = gradients(name, count)
        assert all(float(step["encoder.layer.weight"].abs().max()) > 1e-4 for step in expected)
        for rank in range(2):
            for step, whole in enumerate(expected):
                apart = difference(found[rank][f"{name} of {count}"][step], whole)
                if not apart < 1e-6:
                    wrong[f"{name}, {count} views, process {rank}, step {step}"] = apart
    assert not wrong
