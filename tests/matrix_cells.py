"""Every method in every domain: the settings of each cell, and how one is trained and scored.

`test_matrix.py` asks each cell for its margin; `benchmarks/matrix_spread.py` measures where the margins come from.
"""

import copy
import dataclasses
import functools

from contrastive_mm.configuration import parse_run
from contrastive_mm.domain import load_domain
from contrastive_mm.evaluation import extract_features, ridge_r2
from contrastive_mm.methods import METHODS, get_method
from contrastive_mm.rl.crops import RandomCrops
from contrastive_mm.rl.domain import ObservationDomain
from contrastive_mm.runs import untrained_encoder
from contrastive_mm.training import Trainer

# Domain -> recipe flags, the metric, and the least gain over the untrained encoder.
DOMAIN_CELLS = {
    "vision": (["--config=digits-simclr", "--image-size=8", "--steps=80"], "few_label_accuracy_1", 0.04),
    "nlp": (["--config=pydoc-simcse", "--views=crops", "--dropout=0", "--steps=60"], "mean_average_precision", 0.005),
    "rl": (["--config=cartpole-curl", "--batch-size=64", "--steps=120"], "r2_angle", 0.2),
}

CAREFUL = ["--projection-layers=2", "--prediction-hidden-dim=512"]
FEW_CLUSTERS = ["--num-prototypes=60", "--epsilon=0.03"]
HEADLESS = ["--projection-layers=0"]

FLAGS = {
    ("barlow-twins", "nlp"): [*HEADLESS, "--offdiagonal-weight=0.02"],
    ("byol", "rl"): ["--momentum=0.95", "--steps=200"],
    ("byol", "vision"): ["--batch-size=64", "--crop-scale=0.5", "--learning-rate=1e-3", "--steps=160"],
    ("curl", "nlp"): ["--latent-dim=128"],
    ("curl", "rl"): ["--latent-dim=128", "--learning-rate=3e-4", "--steps=250"],
    ("dcl", "nlp"): HEADLESS,
    ("moco", "nlp"): [*HEADLESS, "--queue-size=512", "--momentum=0.9"],
    ("moco", "rl"): [
        *HEADLESS,
        "--queue-size=1024",
        "--momentum=0.999",
        "--learning-rate=1e-4",
        "--batch-size=128",
        "--steps=300",
    ],
    ("moco", "vision"): ["--queue-size=512", "--temperature=0.2", "--momentum=0.95"],
    ("moco-v3", "nlp"): [*HEADLESS, "--momentum=0.9", "--steps=120"],
    ("moco-v3", "rl"): ["--momentum=0.9", "--steps=160"],
    ("moco-v3", "vision"): ["--momentum=0.95", "--steps=120"],
    ("nnclr", "nlp"): ["--projection-layers=1", "--queue-size=2048", "--learning-rate=2e-3", "--steps=150"],
    ("nnclr", "rl"): ["--queue-size=512", "--steps=160"],
    ("nnclr", "vision"): ["--queue-size=1024", "--temperature=0.2", "--projection-layers=2", "--steps=120"],
    ("npid", "nlp"): [
        "--negatives=0",
        "--temperature=0.1",
        "--learning-rate=2e-3",
        "--steps=150",
    ],
    ("npid", "vision"): ["--negatives=0", "--temperature=0.2", "--bank-momentum=0"],
    ("simclr", "nlp"): HEADLESS,
    ("simclr", "vision"): ["--temperature=0.5"],
    ("simclr-v2", "nlp"): ["--projection-layers=1", "--kept-layers=0", "--temperature=0.2"],
    ("simclr-v2", "rl"): ["--steps=160"],
    ("simcse", "nlp"): ["--views=dropout", "--dropout=0.1"],
    ("simcse", "rl"): ["--temperature=0.2", "--steps=160"],
    ("simcse", "vision"): ["--temperature=0.5"],
    ("simsiam", "nlp"): [*CAREFUL, "--learning-rate=2e-3", "--steps=300"],
    ("simsiam", "rl"): [*CAREFUL, "--learning-rate=5e-4"],
    ("simsiam", "vision"): [*CAREFUL, "--batch-size=64", "--crop-scale=0.5", "--learning-rate=3e-4", "--steps=240"],
    ("supcon", "nlp"): [*HEADLESS, "--steps=40"],
    ("swav", "nlp"): [*HEADLESS, *FEW_CLUSTERS, "--freeze-prototypes-steps=10", "--steps=100"],
    ("swav", "rl"): [*FEW_CLUSTERS, "--freeze-prototypes-steps=10"],
    ("swav", "vision"): [
        *FEW_CLUSTERS,
        "--freeze-prototypes-steps=20",
        "--batch-size=64",
        "--learning-rate=1e-3",
        "--steps=200",
    ],
    ("vicreg", "nlp"): [*HEADLESS, "--covariance=10"],
}

MARGINS = {
    ("barlow-twins", "nlp"): 0.002,
    ("barlow-twins", "vision"): 0.02,
    ("curl", "nlp"): 0.002,
    ("moco", "rl"): 0.1,
    ("simsiam", "nlp"): 0.002,
    ("swav", "rl"): 0.25,
}

NO_GAIN = {
    ("supcon", "rl"): "frames have no labels",
    # Told apart from its gain on unrelated views with no setting of seven; see benchmarks/README.md.
    ("npid", "rl"): "frames of one pole: spreading them teaches as much as knowing which belong together",
    # Rates, momenta, batches, heads of 0 to 3 layers and up to 300 steps were tried; see benchmarks/README.md.
    ("byol", "nlp"): "from scratch on 2,500 sentences it gains less than noise does",
}

CELLS = [(method, domain) for method in METHODS for domain in DOMAIN_CELLS]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All scores of one cell with one seed, by name."""

    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    def gain(self, metric):
        return self.after[metric] - self.before[metric]


def margin(method_name, domain_name):
    """The least gain that the cell has to show."""
    return MARGINS.get((method_name, domain_name), DOMAIN_CELLS[domain_name][2])


def metric(domain_name):
    return DOMAIN_CELLS[domain_name][1]


def flags(method_name, domain_name):
    """What the cell is on the command line."""
    own = FLAGS.get((method_name, domain_name), [])
    return [*DOMAIN_CELLS[domain_name][0], f"--method={method_name}", *own]


def scores(domain, encoder):
    """The domain's own scores; of observations, how well the state is read from frames that are cropped anywhere.

    The domain's score takes the middle of each frame and 200 labelled ones. From those an untrained encoder tells
    the state nearly as well as a trained one, and one trained on unrelated views as well.
    """
    if not isinstance(domain, ObservationDomain):
        return domain.evaluate(encoder)
    crops, stack = RandomCrops(domain.config.crop_size, seed=1000), domain.config.frame_stack
    parts = (domain.train_rows, domain.validation_rows)
    train, test = (
        extract_features(encoder, (crops.crop(domain.store.stacked(some, stack)) for some in rows.split(256)))
        for rows in parts
    )
    states = [domain.store.states[rows] for rows in parts]
    found = ridge_r2(train, states[0], test, states[1], labelled=50)
    return {f"r2_{name}": score for name, score in zip(domain.store.state_names, found, strict=True)}


@functools.lru_cache(maxsize=8)
def prepared(domain_name, options, seed):
    """A domain and the scores of its untrained encoder, once for all cells with the same options of the domain."""
    domain = load_domain(domain_name)(options, seed)
    return domain, scores(domain, untrained_encoder(domain, seed))


def run_cell(arguments, domain_name, folder, seed=0, change_views=lambda views: views):
    """Train with these flags; the seed decides initial weights, data order and views.

    ``change_views`` may put another view maker in the place of the domain's.
    """
    config, _ = parse_run(domain_name, [*arguments, f"--seed={seed}"])
    trainer_config = dataclasses.replace(config.trainer, log_every=25)
    domain, untrained = prepared(domain_name, config.domain_options, seed)
    encoder = untrained_encoder(domain, seed)
    method = get_method(config.method)(encoder, config.method_options)
    # A copy: the domain's own view maker is never called, so that each cell draws from the stream's beginning.
    views = change_views(copy.deepcopy(domain.make_views))
    result = Trainer(method, views, domain.train_batches(), trainer_config, folder).train()
    return Outcome(untrained, scores(domain, encoder), result["seconds"])
