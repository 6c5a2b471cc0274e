"""Each failure is provoked on purpose and named; healthy runs hear nothing."""

import math
import types

import pytest
import torch
from conftest import ROOT, LinearEncoder
from small_problem import SMALL as SMALL_OPTIONS

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.diagnosis import Doctor, feature_statistics
from contrastive_mm.errors import TrainingError
from contrastive_mm.methods import METHODS, Objective, get_method
from contrastive_mm.metrics import read_metrics
from contrastive_mm.training import Trainer, TrainerConfig
from contrastive_mm.views import RandomStream, Views

DATA = torch.randn(256, 16, generator=torch.Generator().manual_seed(5))
SMALL = SMALL_OPTIONS | {
    "simclr": {"hidden_dim": 32, "projection_dim": 32},
    "moco": {"hidden_dim": 32, "projection_dim": 32, "queue_size": 128},
    "simcse": {},
    "curl": {"latent_dim": 32},
}
VERDICTS = {
    "dimensional collapse",
    "full collapse",
    "learning rate too high",
    "learning rate too low",
    "loss stuck at log(N)",
    "prototype collapse",
    "queue contains its own positives",
    "temperature too high",
    "temperature too low",
}


class NoisyViews:
    """Two noisy copies; with ``shared``, copies that have only so many columns in common."""

    def __init__(self, noise=0.3, shared=16):
        self.noise, self.shared = noise, shared
        self.stream = RandomStream(0)

    def __call__(self, batch):
        x, generator = batch["x"], self.stream.on(batch["x"].device)
        views = []
        for _ in range(2):
            noise = torch.randn(x.shape, generator=generator)
            views.append(torch.cat([(x + self.noise * noise)[:, : self.shared], noise[:, self.shared :]], dim=1))
        index = batch.get("index", torch.arange(len(x)))
        return Views(tuple(views), sample_ids=index, labels=index % 8)

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


class Perceptron(torch.nn.Sequential):
    def __init__(self, feature_dim):
        super().__init__(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, feature_dim))
        self.feature_dim = feature_dim


def make_trainer(folder, name, options=None, views=None, encoder=None, batch=64, **trainer):
    torch.manual_seed(0)
    method_class = get_method(name)
    method = method_class(
        encoder or Perceptron(32), method_class.config_class(**{**SMALL.get(name, {}), **(options or {})})
    )
    batches = ShuffledBatches(len(DATA), batch, lambda rows: {"x": DATA[rows], "index": rows})
    config = TrainerConfig(**{"steps": 120, "device": "cpu", **trainer})
    return Trainer(method, views or NoisyViews(), batches, config, folder)


def diagnoses(folder):
    return [line["diagnosis"] for line in read_metrics(folder / "metrics.jsonl") if "diagnosis" in line]


def names(folder):
    return [text.split(":")[0] for text in diagnoses(folder)]


def run(folder, *arguments, **options):
    make_trainer(folder, *arguments, **options).train()
    return names(folder)


@pytest.mark.parametrize("name", METHODS)
def test_healthy_runs_of_every_method_hear_nothing(tmp_path, name):
    assert run(tmp_path, name) == []


@pytest.mark.parametrize("name", ["curl", "moco", "simclr", "simcse"])
@pytest.mark.parametrize(("batch", "every", "noise"), [(4, 1, 0.3), (2, 10, 0.3), (64, 5, 1.0)], ids=str)
def test_small_batches_and_hard_views_hear_nothing(tmp_path, name, batch, every, noise):
    assert run(tmp_path, name, views=NoisyViews(noise), batch=batch, log_every=every) == []


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [
        ("dcl", {"weight_concentration": None}, 8),
        ("dcl", {"weight_concentration": None}, 2),
        ("dcl", {"temperature": 1e-3}, 8),
        ("nnclr", {"temperature": 0.1}, 2),
        ("simclr-v2", {"queue_size": 256}, 2),
        ("npid", {"temperature": 0.07}, 64),
    ],
)
def test_losses_that_sway_by_more_than_a_nat_hear_nothing(tmp_path, name, options, batch):
    assert run(tmp_path, name, options, batch=batch, steps=250) == []


@pytest.mark.parametrize(("name", "options"), [("simclr", {"projection_layers": 0}), ("moco", {}), ("simcse", {})])
@pytest.mark.parametrize("feature_dim", [2, 8])
def test_healthy_runs_of_few_dimensions_hear_nothing(tmp_path, name, options, feature_dim):
    options = {"projection_layers": 0} if name == "moco" else options
    assert run(tmp_path, name, options, encoder=Perceptron(feature_dim)) == []


@pytest.mark.parametrize("name", ["simclr", "moco", "simcse"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_usual_temperatures_hear_nothing(tmp_path, name, temperature):
    assert run(tmp_path, name, {"temperature": temperature}) == []


@pytest.mark.parametrize("name", ["moco", "simclr-v2"])
def test_a_tiny_temperature_against_a_queue_is_not_put_down_to_the_learning_rate(tmp_path, name):
    said = run(tmp_path, name, {"temperature": 1e-3, "queue_size": 256}, NoisyViews(1.0), steps=250)
    assert said[:1] == ["temperature too low"]
    assert "learning rate too high" not in said


def test_a_method_without_a_temperature_is_not_told_to_change_it():
    first = torch.randn(64, 16)
    for temperature, expected in ((None, []), (8.0, ["temperature too high"]), (0.5, [])):
        objective = Objective(torch.tensor(0.0), features=(first, first), candidates=64, temperature=temperature)
        doctor = Doctor(log_every=10, total_steps=100)
        feed(doctor, objective, [1], loss=8.0)
        assert list(feed(doctor, objective, range(2, 301), loss=4.1).values()) == expected


@pytest.mark.parametrize("name", ["simclr", "simcse"])
def test_a_loss_solved_at_a_tiny_temperature_is_named(tmp_path, name):
    assert run(tmp_path, name, {"temperature": 1e-3}, steps=240) == ["temperature too low"]


def test_a_loss_that_a_tiny_temperature_blows_up_is_named(tmp_path):
    said = run(tmp_path, "simclr", {"temperature": 1e-3}, NoisyViews(3.0), steps=250)
    assert said == ["temperature too low"]


def near(distance, positive=0.5, rows=64, dim=64, **told):
    """Negatives at 1 - cosine about ``distance``, positives at a share of it."""
    generator = torch.Generator().manual_seed(1)
    own, noise = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    base = math.sqrt(dim / distance - dim) * torch.nn.functional.one_hot(torch.tensor(0), dim)
    first, second = base + own, base + math.sqrt(1 - positive) * own + math.sqrt(positive) * noise
    return Objective(torch.tensor(0.0), features=(first, second), **told)


@pytest.mark.parametrize(("distance", "loss"), [(0.011, 2.2), (0.0015, 5.0)])
def test_features_that_a_tiny_temperature_draws_together_are_named(distance, loss):
    told = {"candidates": 127, "temperature": 1e-3}
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, near(0.7, **told), [1], loss=231.0)
    said = feed(doctor, near(distance, **told), range(2, 301), loss=loss)
    assert list(said.values()) == ["temperature too low"]
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, near(2 * distance / 1.1, **told), [1], loss=loss)
    assert feed(doctor, near(distance, **told), range(2, 301), loss=loss) != said, "no nearer than untrained"


@pytest.mark.parametrize(("told", "expected"), [({}, ["full collapse"]), ({"candidates": 127}, [])])
def test_a_regression_loss_that_is_solved_by_one_feature_is_named(told, expected):
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, near(0.7, **told), [1], loss=5.0)
    assert list(feed(doctor, near(0.009, **told), range(2, 301), loss=2e-4).values()) == expected


def test_features_that_were_alike_from_the_start_have_not_collapsed():
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, near(0.012), [1], loss=5.0)
    assert feed(doctor, near(0.009), range(2, 301), loss=2e-4) == {}


def test_vicreg_without_variance_and_covariance_collapses(tmp_path):
    options = {"variance": 0.0, "covariance": 0.0}
    assert run(tmp_path, "vicreg", options, steps=200, learning_rate=1e-2) == ["full collapse"]


def test_assignments_that_are_all_alike_keep_the_loss_at_the_log_of_the_prototypes(tmp_path):
    assert run(tmp_path, "swav", {"epsilon": 10.0}, steps=200, learning_rate=1e-2) == ["loss stuck at log(N)"]
    assert "Lower --epsilon" in diagnoses(tmp_path)[0]


@pytest.mark.parametrize(("queue_size", "expected"), [(512, ["queue contains its own positives"]), (256, [])])
def test_a_queue_longer_than_the_data_set_is_named(tmp_path, queue_size, expected):
    assert run(tmp_path, "moco", {"queue_size": queue_size}) == expected


def test_a_queue_longer_than_the_data_set_hides_no_other_failure(tmp_path):
    said = run(tmp_path, "moco", {"queue_size": 512, "temperature": 8.0})
    assert said[:1] == ["temperature too high"]


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_a_temperature_that_is_too_high_is_named_with_its_size(tmp_path, name):
    assert run(tmp_path, name, {"temperature": 8.0}) == ["temperature too high"]
    (text,) = diagnoses(tmp_path)
    implied = float(text.split("at a temperature of ")[1].split(". ")[0])
    assert implied == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simclr", {"learning_rate": 100.0, "optimizer": "sgd"}),
        ("simcse", {"learning_rate": 10.0, "optimizer": "adamw"}),
        ("curl", {"learning_rate": 3.0, "optimizer": "sgd", "gradient_clip": 1.0}),
    ],
)
def test_a_learning_rate_that_is_too_high_is_named(tmp_path, name, options):
    assert run(tmp_path, name, **options)[0] == "learning rate too high"
    assert ("gradients were clipped" in diagnoses(tmp_path)[0]) == ("gradient_clip" in options)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "npid"])
def test_a_learning_rate_that_moves_nothing_is_named(tmp_path, name):
    assert run(tmp_path, name, learning_rate=1e-9, batch=32) == ["learning rate too low"]


def test_the_loss_of_npid_does_not_rise_where_nothing_is_learned(tmp_path):
    assert "learning rate too high" not in run(tmp_path, "npid", {"temperature": 0.07}, learning_rate=1e-9)


@pytest.mark.parametrize("name", ["simclr", "simcse"])
def test_views_with_nothing_in_common_are_stuck_at_log_n(tmp_path, name):
    assert run(tmp_path, name, views=NoisyViews(shared=0)) == ["loss stuck at log(N)"]


def test_a_queue_that_gets_its_keys_before_it_is_read_is_named(tmp_path):
    trainer = make_trainer(tmp_path, "moco")
    method, right = trainer.method, trainer.method.forward

    def push_first(self, views):
        self.queue.push(torch.nn.functional.normalize(self.momentum_encoder(views.inputs[1])))
        objective = right(views)
        self._new_keys.clear()
        return objective

    method.forward = types.MethodType(push_first, method)
    trainer.train()
    assert names(tmp_path) == ["queue contains its own positives"]


def test_views_that_share_one_dimension_collapse_to_few(tmp_path):
    options = {"temperature": 0.1, "mlp": False}
    encoder = LinearEncoder(16, 32)
    said = run(tmp_path, "simcse", options, NoisyViews(0.0, shared=1), encoder, steps=260, learning_rate=3e-2)
    assert said == ["dimensional collapse"]


def test_features_that_fall_together_are_named(tmp_path):
    trainer = make_trainer(tmp_path, "simcse")
    right = trainer.method.forward

    def attract(self, views):
        objective = right(views)
        features = self._project(views.inputs[0])
        pull = (features - features.mean(0).detach()).square().sum()
        return Objective(pull, objective.metrics, objective.features)

    trainer.method.forward = types.MethodType(attract, trainer.method)
    trainer.config = TrainerConfig(steps=400, learning_rate=1e-2, device="cpu")
    trainer.total_steps = 400
    trainer.train()
    assert names(tmp_path) == ["full collapse"]


def feed(doctor, objective, steps, loss=1.0, skipped=False):
    """Log the first step and every tenth; returns what is said, by step."""
    said = {}
    for step in steps:
        logged = step == 1 or step % 10 == 0
        if logged:
            doctor.examine(objective)
        doctor.count_step({"loss": torch.tensor(loss)}, skipped)
        if logged:
            _, verdict = doctor.report(step, loss)
            if verdict:
                said[step] = verdict.name
    return said


def spread(rows=32, dim=16):
    first = torch.randn(rows, dim)
    return Objective(torch.tensor(0.0), features=(first, first + 0.1 * torch.randn(rows, dim)))


def collapsed(rows=32, dim=16):
    first = torch.ones(rows, dim)
    return Objective(torch.tensor(0.0), features=(first, first))


def test_a_failure_is_said_once_and_again_only_after_a_long_absence():
    doctor = Doctor(log_every=10, total_steps=5_000, warmup_steps=50)
    feed(doctor, spread(), range(1, 11), loss=5.0)
    said = feed(doctor, spread(), range(11, 301))
    assert said == {}
    said = feed(doctor, collapsed(), range(301, 801))
    assert list(said.values()) == ["full collapse"]
    assert feed(doctor, spread(), range(801, 1201)) == {}
    assert feed(doctor, collapsed(), range(1201, 1601)) == {}, "away for 400 steps only"
    assert feed(doctor, spread(), range(1601, 4001)) == {}
    assert list(feed(doctor, collapsed(), range(4001, 4401)).values()) == ["full collapse"]


def test_steps_that_gradient_scaling_skips_are_counted():
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, spread(), range(1, 9), loss=5.0, skipped=True)  # how every fp16 run begins
    said = feed(doctor, spread(), range(9, 401))
    assert said == {}
    for step in range(401, 701, 3):
        said |= feed(doctor, spread(), [step, step + 1])
        said |= feed(doctor, spread(), [step + 2], skipped=True)
    assert list(said.values()) == ["learning rate too high"]


def test_an_encoder_that_was_narrow_from_the_start_has_not_collapsed():
    first = torch.randn(64, 2) @ torch.randn(2, 32)
    narrow = Objective(torch.tensor(0.0), features=(first, first))
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, narrow, [1], loss=5.0)
    assert feed(doctor, narrow, range(2, 301)) == {}


def test_a_long_queue_on_a_circle_has_neighbours_not_positives():
    first, queue = torch.randn(64, 2), torch.randn(4096, 2)
    objective = Objective(torch.tensor(0.0), features=(first, first), negatives=queue)
    assert feature_statistics(objective)["queued_positives"] > 0.5
    doctor = Doctor(log_every=10, total_steps=100)
    feed(doctor, objective, [1], loss=5.0)
    assert feed(doctor, objective, range(2, 301)) == {}


@pytest.mark.parametrize(("share", "collapse"), [([1.0] + [0.0] * 15, True), ([1 / 16] * 16, False)])
def test_prototypes_that_all_samples_share_are_named(share, collapse):
    doctor = Doctor(log_every=10, total_steps=100)
    objective = Objective(torch.tensor(0.0), prototype_use=torch.tensor(share))
    assert list(feed(doctor, objective, range(1, 301)).values()) == ["prototype collapse"] * collapse
    entropy = feature_statistics(objective)["prototype_entropy"]
    assert entropy == pytest.approx(0.0 if collapse else 1.0, abs=1e-6)


@pytest.mark.parametrize("queue", [False, True])
def test_statistics_equal_the_loops(queue):
    first, second = torch.randn(9, 5), torch.randn(9, 5)
    negatives = torch.randn(7, 5) if queue else None
    a, b, others = (
        [[value / math.hypot(*row) for value in row] for row in features.double().tolist()]
        for features in (first, second, second if negatives is None else negatives)
    )

    def dot(x, y):
        return sum(i * j for i, j in zip(x, y, strict=True))

    def std(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    positive = [dot(a[i], b[i]) for i in range(9)]
    negative = [dot(a[i], other) for i in range(9) for j, other in enumerate(others) if queue or i != j]
    potential = [math.exp(-2 * (2 - 2 * dot(a[i], a[j]))) for i in range(9) for j in range(i)]
    expected = {
        "feature_std": sum(std(column) for column in zip(*a, strict=True)) / 5,
        "positive_similarity": sum(positive) / 9,
        "alignment": 2 - 2 * sum(positive) / 9,
        "negative_similarity": sum(negative) / len(negative),
        "uniformity": math.log(sum(potential) / len(potential)),
    }
    found = feature_statistics(Objective(torch.tensor(0.0), features=(first, second), negatives=negatives))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 1 < found["effective_rank"] <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_own_keys_are_found_in_a_queue_of_any_type(dtype):
    first, second = torch.randn(8, 32), torch.randn(8, 32)
    queue = torch.nn.functional.normalize(torch.cat([torch.randn(50, 32), 3 * second[:4]])).to(dtype)
    objective = Objective(torch.tensor(0.0), features=(first, second), negatives=queue)
    assert feature_statistics(objective)["queued_positives"] == 0.5


def test_features_that_are_not_finite_or_alone_are_passed_over():
    broken = torch.full((4, 3), math.nan)
    assert feature_statistics(Objective(torch.tensor(0.0), features=(broken, broken))) == {}
    assert feature_statistics(Objective(torch.tensor(0.0), features=(torch.ones(1, 3), torch.ones(1, 3)))) == {}
    assert feature_statistics(Objective(torch.tensor(0.0))) == {}


@pytest.mark.parametrize("name", METHODS)
def test_the_doctor_changes_no_run(tmp_path, name):
    states = []
    for diagnose in (True, False):
        trainer = make_trainer(tmp_path / str(diagnose), name, steps=12, log_every=2, diagnose=diagnose)
        trainer.train()
        states.append((trainer.method.state_dict(), torch.get_rng_state()))
    (with_doctor, random), (without, same_random) = states
    assert torch.equal(random, same_random)
    assert all(torch.equal(a, without[key]) for key, a in with_doctor.items() if isinstance(a, torch.Tensor))
    keys = [set(read_metrics(tmp_path / folder / "metrics.jsonl")[-1]) for folder in ("True", "False")]
    figures = {"alignment", "effective_rank", "feature_std", "negative_similarity", "uniformity"}
    assert keys[0] - keys[1] - {"candidates", "prototype_entropy", "queued_positives"} == {*figures, "nonfinite_share"}


def comparable(folder):
    changing = {"seconds", "samples_per_second"}
    return [
        {key: value for key, value in line.items() if key not in changing}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("stopped_at", [57, 133])
def test_a_resumed_run_says_what_the_whole_run_says(tmp_path, stopped_at):
    options = {"options": {"temperature": 8.0}, "steps": 150, "checkpoint_every": 11, "gradient_clip": 0.036}
    make_trainer(tmp_path / "whole", "simclr", **options).train()
    stopped = make_trainer(tmp_path / "stopped", "simclr", **options)
    right = stopped.updater.step

    def step(batch):
        if stopped.step == stopped_at:
            raise KeyboardInterrupt
        return right(batch)

    stopped.updater.step = step
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make_trainer(tmp_path / "stopped", "simclr", **options).train(resume=True)
    assert comparable(tmp_path / "stopped") == comparable(tmp_path / "whole")
    assert names(tmp_path / "whole") == ["temperature too high"]
    assert any(0 < line["clipped_share"] < 1 for line in comparable(tmp_path / "whole"))


def test_a_run_begun_without_the_doctor_goes_on_with_it(tmp_path):
    make_trainer(tmp_path, "simclr", steps=20, checkpoint_every=10, diagnose=False).train()
    (tmp_path / "checkpoints" / "step-000000020.pt").unlink()
    make_trainer(tmp_path, "simclr", steps=20, checkpoint_every=10).train(resume=True)
    assert "effective_rank" in read_metrics(tmp_path / "metrics.jsonl")[-1]


def test_the_line_is_printed_with_name_evidence_and_remedy(tmp_path, capfd):
    run(tmp_path / "warm", "simclr", {"temperature": 8.0})
    (text,) = diagnoses(tmp_path / "warm")
    assert f"warm, step 100: {text}\n" in capfd.readouterr().err
    assert "Lower --temperature" in text
    assert "\n" not in text


def test_a_loss_that_is_not_a_number_still_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, "curl", optimizer="sgd", learning_rate=10.0)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        trainer.train()


def test_every_verdict_is_explained_in_the_documents():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in text for name in VERDICTS)
