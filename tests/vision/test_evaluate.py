import json

import pytest
import torch
from pictures import picture

from contrastive_mm.cli import main
from contrastive_mm.configuration import parse_run
from contrastive_mm.errors import UserError
from contrastive_mm.runs import open_run
from contrastive_mm.vision.evaluation import evaluate as command
from contrastive_mm.vision.evaluation.corruptions import KINDS
from contrastive_mm.vision.evaluation.evaluate import evaluate_images
from contrastive_mm.vision.evaluation.protocols import (
    FrozenFeatures,
    score_clustering,
    score_corruption,
    score_few_labels,
    score_knn,
    score_linear,
    score_retrieval,
)

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 60), "red": (220, 30, 30)}
PER_CLASS = 20
HELD_BACK = 5
WRONG = 2
"""Of each class's held-back images, those painted in the next class's colour."""


def plant(folder, wrong=0):
    """Images of one colour a class, each a little different; of the held-back ones some in a wrong colour."""
    names = list(COLOURS)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            painted = names[(number + 1) % 3] if i >= PER_CLASS - wrong else name
            colour = tuple(channel + i % 7 for channel in COLOURS[painted])
            picture(colour, (8, 8)).save(folder / name / f"{i:02}.png")
    return folder


def train(data, output, *options):
    arguments = [f"--data={data}", f"--output={output}", "--steps=2", "--batch-size=16", "--validation-share=0.25"]
    assert main(["vision", *arguments, *options]) == 0
    return output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on planted images of which 2 of 5 held-back ones of each class wear the next class's colour."""
    folder = tmp_path_factory.mktemp("planted")
    return train(plant(folder / "data", WRONG), folder / "run")


@pytest.fixture
def raw(run):
    """Raw pixels alone: their scores are known, and cost nothing."""
    _, domain = open_run(run)
    return FrozenFeatures(domain, {"raw input": None}, torch.device("cpu"), seed=0)


def test_every_score_of_planted_images_is_what_was_planted(raw):
    right = 1 - WRONG / HELD_BACK

    def scores(result):
        return result["scores"]["raw input"]

    knn = score_knn(raw)
    assert knn["neighbours"] == 7, "half of 15"
    assert scores(knn) == {"knn_accuracy": pytest.approx(right)}
    linear = score_linear(raw)
    assert scores(linear) == {"linear_accuracy": pytest.approx(right)}
    assert linear["per_class"]["raw input"] == pytest.approx([right] * 3)
    assert linear["confusion"] == [[3, 2, 0], [0, 3, 2], [2, 0, 3]]
    few = score_few_labels(raw)
    assert few["labels"] == {"1": 3, "10": 6}, "one of 15 at least; 1.5 is rounded up"
    assert scores(few)["few_label_accuracy_1_percent"] == pytest.approx(right)
    assert few["spread"]["raw input"]["few_label_accuracy_10_percent"] == 0
    # A wrong image finds its own class last of all (its rows come at ranks 16 to 30 or 31 to 45).
    retrieval = scores(score_retrieval(raw))
    assert (retrieval["recall_at_1"], retrieval["recall_at_10"]) == pytest.approx((right, right))
    assert (
        right < retrieval["mean_average_precision"] < right + 0.4 * sum(i / (15 + i) for i in range(1, 16)) / 15 + 1e-6
    )
    clustering = scores(score_clustering(raw))
    assert clustering["clustering_accuracy"] == pytest.approx(right)
    assert 0 < clustering["clustering_nmi"] < 1


def test_no_held_back_label_chooses_anything(raw, run):
    _, domain = open_run(run)
    shuffled = domain.labels.clone()
    shuffled[domain.validation_rows] = shuffled[domain.validation_rows].roll(1)
    domain.labels = shuffled
    other = FrozenFeatures(domain, raw.encoders, raw.device, seed=0)
    assert not torch.equal(other.held_back_labels, raw.held_back_labels)
    assert other.strengths == raw.strengths
    for name, probe in raw.probes.items():
        assert torch.equal(other.probes[name].predict(raw.held_back[name]), probe.predict(raw.held_back[name]))


def test_corruption_curves_begin_clean_and_their_score_leaves_the_clean_images_out(raw):
    for kind in ("gaussian_noise", "contrast"):
        result = score_corruption(raw, kind)
        (curve,) = result["accuracy_by_severity"].values()
        assert curve[0] == score_linear(raw)["scores"]["raw input"]["linear_accuracy"]
        assert len(curve) == 6
        assert result["scores"]["raw input"] == {f"{kind}_accuracy": pytest.approx(sum(curve[1:]) / 5)}


def test_the_probe_meets_the_images_corrupted(raw, monkeypatch):
    """Images that a corruption turns into the next class's colour are found in the next class."""

    def turn(images, kind, severity, indices, seed):
        return images if severity < 3 else images[:, [2, 0, 1]]

    monkeypatch.setattr("contrastive_mm.vision.evaluation.protocols.corrupt", turn)
    result = score_corruption(raw, "jpeg")
    (curve,) = result["accuracy_by_severity"].values()
    assert curve[:3] == pytest.approx([0.6] * 3)
    assert max(curve[3:]) < 0.6
    assert result["scores"]["raw input"]["jpeg_accuracy"] == pytest.approx(sum(curve[1:]) / 5)
    assert sum(curve[1:]) / 5 < sum(curve) / 6 - 0.01, "or this would say nothing of the clean images"


def test_the_command_prints_a_table_and_keeps_every_result(run, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["vision", "evaluate", str(run), f"--output={output}"]) == 0
    table = capsys.readouterr().out
    for words in (
        "untrained encoder",
        "raw input",
        "trained encoder",
        "kNN accuracy (k = 7, T = 0.07)",
        "linear probe accuracy",
        "few labels: 1% (3 labels)",
        "retrieval: mAP",
        "retrieval: recall@10",
        "clustering: NMI",
        "corrupted: jpeg",
        "mean corruption accuracy (6 kinds, severities 1 to 5)",
        "alignment",
        "0.600 ± 0.000",
    ):
        assert words in table, words
    assert "Left out" not in table
    content = json.loads((output / "evaluation.json").read_text())
    assert set(content["scores"]) == {"untrained encoder", "raw input", "trained encoder"}
    corrupted = content["scores"]["raw input"]
    assert corrupted["mean_corruption_accuracy"] == pytest.approx(sum(corrupted[f"{k}_accuracy"] for k in KINDS) / 6)
    assert (content["step"], content["left_out"]) == (2, {})
    page = (output / "report.html").read_text()
    for title in (
        "few labels",
        "under corruption",
        "Confusion",
        "corruptions look like",
        "t-SNE",
        "Nearest neighbours",
    ):
        assert title in page, title
    assert not (run / "evaluation.json").exists(), "the run's folder is left alone"


@pytest.fixture
def done(monkeypatch):
    """Names of the protocols that are computed, in order; no pictures are drawn."""
    names = []
    keep = command.KeptResults.put

    def put(self, protocol, settings, result):
        names.append(protocol)
        keep(self, protocol, settings, result)

    monkeypatch.setattr(command, "_write_report", lambda *page: None)

    monkeypatch.setattr(command.KeptResults, "put", put)
    return names


def test_what_is_kept_is_not_computed_again(run, tmp_path, done):
    first = evaluate_images(run, only=("knn", "robustness"), corruption_kinds=("jpeg",), output=tmp_path)
    assert done == ["knn", "corruption:jpeg"]
    assert evaluate_images(run, only=("knn", "robustness"), corruption_kinds=("jpeg",), output=tmp_path) == first
    assert len(done) == 2
    wider = evaluate_images(run, only=("robustness",), corruption_kinds=("jpeg", "contrast"), output=tmp_path)
    assert done[2:] == ["corruption:contrast"]
    assert [row.metric for row in wider.rows] == ["contrast_accuracy", "jpeg_accuracy", "mean_corruption_accuracy"]
    assert "knn_accuracy" in json.loads(first.results_file.read_text())["scores"]["raw input"]
    evaluate_images(run, only=("knn", "robustness"), corruption_kinds=("jpeg",), seed=1, output=tmp_path)
    assert done[3:] == ["corruption:jpeg"], "kNN draws nothing, noise does"
    evaluate_images(run, only=("knn",), output=tmp_path, overwrite=True)
    assert done[4:] == ["knn"]


def test_an_interrupted_evaluation_has_kept_what_was_done(run, tmp_path, monkeypatch):
    def stop(features):
        raise KeyboardInterrupt

    monkeypatch.setitem(command.PROTOCOLS, "retrieval", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_images(run, only=("knn", "retrieval"), output=tmp_path)
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["protocols"]) == ["knn"]


def test_an_encoder_trained_further_is_evaluated_anew(tmp_path, done):
    run = train(plant(tmp_path / "data"), tmp_path / "run")
    evaluate_images(run, only=("knn",), output=tmp_path)
    (run / "encoder.safetensors").write_bytes(
        (train(tmp_path / "data", tmp_path / "other", "--steps=3") / "encoder.safetensors").read_bytes()
    )
    evaluate_images(run, only=("knn",), output=tmp_path)
    assert done == ["knn", "knn"]


def test_the_evaluation_of_every_domain_keeps_the_protocols(tmp_path, done):
    run = train(plant(tmp_path / "data"), tmp_path / "run")
    evaluate_images(run, only=("knn",))
    assert main(["evaluate", str(run)]) == 0
    content = json.loads((run / "evaluation.json").read_text())
    assert "linear_probe_accuracy" in content["scores"]["raw input"]
    evaluate_images(run, only=("knn",))
    assert done == ["knn"]


def test_other_data_has_a_split_of_its_own_and_files_of_its_own(run, tmp_path):
    other = plant(tmp_path / "others", wrong=1)
    found = evaluate_images(run, data=str(other), only=("linear",), output=tmp_path)
    assert found.results_file == tmp_path / "evaluation-others.json"
    assert found.report.exists()
    assert found.rows[0].values["raw input"] == pytest.approx(1 - 1 / HELD_BACK)


def test_images_without_labels_have_their_geometry_and_the_rest_is_said_to_be_left_out(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        picture((10 * i, 200 - 5 * i, 90), (8, 8)).save(folder / f"{i}.png")
    run = train(folder, tmp_path / "run")
    capsys.readouterr()
    assert main(["vision", "evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    for words in ("uniformity", "effective rank", "alignment", "Left out: knn, linear", "the data has no labels"):
        assert words in said, words
    content = json.loads((run / "evaluation.json").read_text())
    assert list(content["protocols"]) == ["geometry"]
    assert "retrieval" in content["left_out"]
    assert "the data has no labels" in (run / "report.html").read_text()


def test_images_of_which_none_is_held_back_are_not_scored_on_what_the_probe_learned(tmp_path):
    run = train(plant(tmp_path / "data"), tmp_path / "run", "--validation-share=0")
    found = evaluate_images(run, only=("knn", "geometry"))
    assert [row.metric for row in found.rows] == ["uniformity", "effective_rank", "alignment"]
    assert "--validation-share" in found.left_out["knn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("knnn",)}, "Unknown protocol 'knnn' in --only. Did you mean 'knn'"),
        ({"corruption_kinds": ("blur",)}, "Unknown corruption 'blur' in --corruption-kinds"),
        ({"data": "digitz"}, "digitz"),
    ],
)
def test_misspelt_names_are_refused_before_any_work(run, options, message, monkeypatch):
    monkeypatch.setattr(command, "_compute", None)
    with pytest.raises(UserError, match=message):
        evaluate_images(run, **options)


def test_an_output_that_is_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        evaluate_images(run, output=tmp_path / "file")


def test_a_run_of_another_domain_is_named(tmp_path):
    config, _ = parse_run("nlp", ["--data=pydoc-topics"])
    config.save(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="is a run of nlp, not of vision"):
        evaluate_images(tmp_path)


@pytest.mark.slow
def test_a_short_training_on_digits_spreads_their_features(tmp_path, done):
    """By far more than from seed to seed (0.05); accuracies need a longer training to stand out of their noise."""
    run = tmp_path / "run"
    recipe = ["--config=digits-simclr", "--image-size=8", "--steps=70", "--batch-size=64", f"--output={run}"]
    assert main(["vision", *recipe]) == 0
    rows = {row.metric: row.values for row in evaluate_images(run, only=("geometry",)).rows}
    assert rows["uniformity"]["trained encoder"] < rows["uniformity"]["untrained encoder"] - 0.25
    assert rows["effective_rank"]["trained encoder"] < rows["effective_rank"]["untrained encoder"] / 3
    assert rows["alignment"]["raw input"] > 4 * rows["alignment"]["trained encoder"]
