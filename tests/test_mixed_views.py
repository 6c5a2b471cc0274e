"""Mixed views (Mixup, CutMix, i-Mix) and other positives in every method that compares the samples of a batch."""

import pytest
import torch
from small_problem import Encoder, build, neighbour_accuracy, samples, view

from contrastive_mm.errors import UserError
from contrastive_mm.losses import supcon
from contrastive_mm.methods import METHODS
from contrastive_mm.positives import Positives
from contrastive_mm.views import Views

CONTRASTIVE = ["curl", "dcl", "moco", "moco-v3", "nnclr", "simclr", "simclr-v2", "simcse", "supcon"]
# These hold a sample against itself only; NPID compares views with slots of a bank, and not with each other.
OTHERS = ["barlow-twins", "byol", "npid", "simsiam", "swav", "vicreg"]
# Those that look in both directions; the others have queries in the first view and keys in the second.
BOTH_WAYS = ["dcl", "moco-v3", "nnclr", "simclr", "simclr-v2"]

PARTNER = torch.tensor([3, 0, 1, 2, 4, 7, 5, 6])
SHARE = torch.tensor([0.9, 0.5, 0.6, 0.8, 0.7, 0.5, 0.6, 1.0])
MIXING = SHARE.diag() + (1 - SHARE)[:, None] * torch.eye(8)[PARTNER]
GROUPS = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])
TIMES = torch.tensor([0.0, 5.0, 1.0, 9.0, 13.0, 5.5, 13.5, 30.0])
KINDS = {
    "mixed": (Positives.mixed(PARTNER, SHARE), MIXING),
    "groups": (Positives.of_groups(GROUPS), (GROUPS[:, None] == GROUPS).float()),
    "window": (Positives.within(TIMES, 1.0), ((TIMES[:, None] - TIMES).abs() <= 1).float()),
}


def pair(seed=0):
    return tuple(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(seed)))


def ready(name):
    """A method whose queues hold something, and whose momentum encoder differs from its encoder."""
    method = build(name)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for seed in (1, 2):
        method(Views(pair(seed), labels=torch.arange(8))).loss.backward()
        optimizer.step()
        method.after_step()
    return method


def loss_of(method, views, positives, labels=None):
    return float(method(Views(views, positives=positives, labels=labels)).loss.detach())


def test_every_method_takes_positives_or_says_why_not():
    assert sorted(CONTRASTIVE + OTHERS) == sorted(METHODS)
    for name in OTHERS:
        with pytest.raises(UserError, match=r"against its own sample only, and takes no Views.positives"):
            build(name)(Views(pair(), sample_ids=torch.arange(8), positives=KINDS["mixed"][0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_positives_of_every_kind_are_those_of_the_matrix(name, kind):
    method, (positives, matrix) = ready(name), KINDS[kind]
    soft = loss_of(method, pair(), positives)
    assert soft == pytest.approx(loss_of(method, pair(), Positives.weighted(matrix)), rel=1e-5)
    assert soft != pytest.approx(loss_of(method, pair(), Positives(), torch.arange(8)), rel=1e-4)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_views_that_are_not_mixed_are_the_plain_method(name):
    method = ready(name)
    whole = Positives.mixed(PARTNER, torch.ones(8))
    if name == "moco":  # whose only candidates are otherwise in its queue
        method.queue = build("moco").queue
    labels = torch.arange(8) if name == "supcon" else None
    assert loss_of(method, pair(), whole) == pytest.approx(loss_of(method, pair(), None, labels), rel=1e-5)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_other_direction_has_the_transposed_weights(name):
    method, (positives, _) = ready(name), KINDS["mixed"]
    there = loss_of(method, pair(), positives)
    assert there == pytest.approx(loss_of(method, pair()[::-1], positives.transposed()), rel=1e-5)
    assert there != pytest.approx(loss_of(method, pair()[::-1], positives), rel=1e-5)


def test_supcon_mixes_the_labels_of_mixed_samples():
    method, views = ready("supcon"), pair()
    mixed = loss_of(method, views, KINDS["mixed"][0], GROUPS)
    first, second = (method.projector(method.encoder(each)).detach() for each in views)
    weights = MIXING @ (GROUPS[:, None] == GROUPS).float()
    assert mixed == pytest.approx(float(supcon(first, second, weights)), rel=1e-5)
    times = KINDS["window"][0]
    assert loss_of(method, views, times, GROUPS) == loss_of(method, views, times), "which stand for themselves"


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_methods_learn_from_mixed_samples(name):
    """The first view is mixed, as in i-Mix; the second one is not."""
    method, generator = build(name), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    for _ in range(100):
        signal, cluster = samples(96, generator)
        partner = torch.randperm(96, generator=generator)
        share = 0.6 + 0.4 * torch.rand(96, generator=generator)
        first, second = view(signal, generator), view(signal, generator)
        first = share[:, None] * first + (1 - share)[:, None] * first[partner]
        labels = cluster if name == "supcon" else None
        loss = method(Views((first, second), labels=labels, positives=Positives.mixed(partner, share))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    torch.manual_seed(0)
    before, after = neighbour_accuracy(Encoder()), neighbour_accuracy(method.encoder)
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert after > before + 0.3
