import math

import oracles
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    alignment,
    effective_rank,
    extract_features,
    few_label_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
    retrieval_scores,
    ridge_r2,
    split_rows,
    uniformity,
    unlabelled_scores,
)


def clusters(count, classes=3, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.eye(classes)[labels] + spread * torch.randn(count, classes, generator=generator), labels


def test_knn_equals_the_loop():
    train, train_labels = clusters(40, spread=0.8)
    test, test_labels = clusters(25, spread=0.8, seed=1)
    right = 0
    for row, label in zip(test.double().tolist(), test_labels.tolist(), strict=True):
        similarity = sorted(
            (
                (oracles.cosine(row, other), int(name))
                for other, name in zip(train.tolist(), train_labels, strict=True)
            ),
            reverse=True,
        )
        votes = [0.0, 0.0, 0.0]
        for value, name in similarity[:7]:
            votes[name] += math.exp(value / 0.07)
        right += votes.index(max(votes)) == label
    assert 0.4 < right / 25 < 1
    assert knn_accuracy(train, train_labels, test, test_labels, neighbours=7) == pytest.approx(right / 25)


def test_retrieval_equals_the_loop():
    gallery, gallery_labels = clusters(30, spread=0.8)
    query, query_labels = clusters(12, spread=0.8, seed=1)
    query_labels = query_labels.clone()
    query_labels[0] = 9  # a label that the gallery lacks is left out
    first, average = [], []
    for row, label in list(zip(query.tolist(), query_labels.tolist(), strict=True))[1:]:
        ranked = sorted(
            ((oracles.cosine(row, g), int(n)) for g, n in zip(gallery.tolist(), gallery_labels, strict=True)),
            reverse=True,
        )
        hits = [name == label for _, name in ranked]
        first.append(hits[0])
        precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
        average.append(sum(precisions) / len(precisions))
    scores = retrieval_scores(query, query_labels, gallery, gallery_labels)
    assert scores["precision_at_1"] == pytest.approx(sum(first) / 11, abs=1e-6)
    assert scores["mean_average_precision"] == pytest.approx(sum(average) / 11, abs=1e-6)


def test_probes_read_what_is_there_and_nothing_else():
    train, labels = clusters(300)
    test, test_labels = clusters(90, seed=1)
    noise, other = torch.randn(300, 3), torch.randn(90, 3)
    assert linear_probe_accuracy(train, labels, test, test_labels) > 0.95
    assert linear_probe_accuracy(noise, labels, other, test_labels) < 0.5
    one, ten = (few_label_accuracy(train, labels, test, test_labels, n, draws=5) for n in (1, 10))
    assert 0.6 < one < ten
    with pytest.raises(UserError, match="200 labels a class"):
        few_label_accuracy(train, labels, test, test_labels, 200)


def test_ridge_reads_linear_targets():
    features = torch.randn(500, 5)
    targets = torch.stack([features @ torch.arange(5.0), torch.randn(500)], dim=1)
    readable, noise = ridge_r2(features[:400], targets[:400], features[400:], targets[400:])
    assert readable > 0.99
    assert noise < 0.1


def test_ridge_survives_a_pixel_that_is_first_seen_in_the_test():
    features, noise = torch.randn(300, 5), 1e-6 * torch.randn(300, 1)
    noise[250:] = 1.0
    both = torch.cat([features, noise], dim=1)
    (score,) = ridge_r2(both[:250], features[:250, :1], both[250:], features[250:, :1])
    assert score > 0.9


def test_geometry_at_known_points():
    same = torch.ones(6, 3)
    assert alignment(same, 2 * same) == pytest.approx(0)
    assert alignment(same, -same) == pytest.approx(4)
    assert uniformity(same) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)
    assert effective_rank(torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])) == pytest.approx(1, abs=1e-3)
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert effective_rank(square) == pytest.approx(2)


def test_the_split_takes_the_last_of_each_class():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2])
    train, validation = split_rows(8, labels, 0.4)
    assert train.tolist() == [0, 1, 2, 3, 7]
    assert validation.tolist() == [4, 5, 6]
    assert len(split_rows(8, None, 0.4)[1]) == 0


def test_extraction_switches_dropout_off_and_back_on():
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)).train()
    batches = [torch.randn(5, 3), torch.randn(2, 3)]
    features = extract_features(encoder, batches)
    assert features.shape == (7, 4)
    torch.testing.assert_close(features, encoder[0](torch.cat(batches)).detach())
    assert encoder.training


def ridge_of_one_feature(features, targets, penalty):
    mean_x, mean_y = sum(features) / len(features), sum(targets) / len(targets)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(features, targets, strict=True))
    slope = covariance / (sum((x - mean_x) ** 2 for x in features) + penalty)
    return lambda x: mean_y + slope * (x - mean_x)


def test_ridge_equals_the_loop_whatever_the_scale_of_the_targets(generator):
    features = torch.randn(60, 1, generator=generator)
    targets = features + 0.5 * torch.randn(60, 1, generator=generator)
    scale = float((features[:40] - features[:40].mean()).square().mean().sqrt())
    x, y = (features[:, 0].double() / scale).tolist(), targets[:, 0].double().tolist()

    def left_out_loss(penalty):
        others = [[*range(row), *range(row + 1, 40)] for row in range(40)]
        fits = [ridge_of_one_feature([x[i] for i in rows], [y[i] for i in rows], penalty) for rows in others]
        return sum((fits[row](x[row]) - y[row]) ** 2 for row in range(40))

    # All 40 rows are drawn each time, so every draw fits the same model.
    fitted = ridge_of_one_feature(x[:40], y[:40], min((10.0**power for power in range(-3, 5)), key=left_out_loss))
    mean = sum(y[40:]) / 20
    residual = sum((y[row] - fitted(x[row])) ** 2 for row in range(40, 60))
    expected = 1 - residual / sum((value - mean) ** 2 for value in y[40:])
    assert 0.3 < expected < 0.95
    for factor in (1.0, 1e-9, 1e9):
        (score,) = ridge_r2(features[:40], factor * targets[:40], features[40:], factor * targets[40:])
        assert score == pytest.approx(expected, abs=1e-4)


def test_no_target_outweighs_the_others_by_its_unit():
    features = torch.randn(60, 8)
    targets = torch.stack([features[:, 0], torch.randn(60)], dim=1)
    scaled = targets * torch.tensor([1.0, 1e4])
    expected = ridge_r2(features[:30], targets[:30], features[30:], targets[30:])
    assert ridge_r2(features[:30], scaled[:30], features[30:], scaled[30:]) == pytest.approx(expected, abs=1e-4)


def test_a_target_that_never_varies_has_no_score():
    features, target = torch.randn(40, 3), torch.randn(40, 1)
    both = torch.cat([torch.full((40, 1), 0.1), target], dim=1)
    constant, varied = ridge_r2(features[:30], both[:30], features[30:], both[30:])
    assert math.isnan(constant)
    assert math.isfinite(varied)
    ends = torch.cat([torch.randn(30, 1), torch.full((10, 1), 0.1)])
    assert math.isnan(ridge_r2(features[:30], ends[:30], features[30:], ends[30:])[0])
    starts = torch.cat([torch.zeros(30, 1), torch.randn(10, 1)])
    (unlearnable,) = ridge_r2(features[:30], starts[:30], features[30:], starts[30:])
    assert -1 < unlearnable <= 0, "constant in training, varied in the test: no better than the mean"


@pytest.mark.parametrize(("train", "test"), [(0, 5), (1, 5), (5, 0), (5, 1)])
def test_ridge_names_too_few_rows(train, test):
    few = "training" if train < 2 else "test"
    with pytest.raises(UserError, match=rf"at least 2 {few} rows, but there are {min(train, test)}"):
        ridge_r2(torch.randn(train, 3), torch.randn(train, 1), torch.randn(test, 3), torch.randn(test, 1))


def test_ridge_takes_two_rows():
    (score,) = ridge_r2(torch.randn(2, 3), torch.randn(2, 1), torch.randn(2, 3), torch.randn(2, 1))
    assert math.isfinite(score)
    with pytest.raises(UserError, match="at least 2 labelled rows, but there are 1"):
        ridge_r2(torch.randn(5, 3), torch.randn(5, 1), torch.randn(5, 3), torch.randn(5, 1), labelled=1)


@pytest.mark.parametrize(("classes", "test"), [(0, 3), (1, 3), (2, 0)])
def test_probes_name_too_few_classes_and_rows(classes, test):
    train, labels = torch.randn(3 * classes, 2), torch.arange(classes).repeat(3)
    rows, row_labels = torch.randn(test, 2), torch.zeros(test).long()
    message = rf"{3 * classes} training rows of {classes} classes and {test} test rows"
    with pytest.raises(UserError, match=message):
        linear_probe_accuracy(train, labels, rows, row_labels)
    with pytest.raises(UserError, match=message):
        few_label_accuracy(train, labels, rows, row_labels, 1)
    if classes == 0 or test == 0:
        with pytest.raises(UserError, match=f"there are {3 * classes} and {test}"):
            knn_accuracy(train, labels, rows, row_labels)


def test_retrieval_without_a_known_class_is_named():
    with pytest.raises(UserError, match="Not one of the 3 queries has a label"):
        retrieval_scores(torch.randn(3, 2), torch.tensor([5, 6, 7]), torch.randn(4, 2), torch.tensor([0, 1, 2, 3]))


def test_the_spread_of_one_sample_is_not_scored():
    features = torch.randn(5, 3)
    assert unlabelled_scores(features) == {
        "uniformity": uniformity(features),
        "effective_rank": effective_rank(features),
    }
    for few in (features[:1], features[:0]):
        with pytest.raises(UserError, match=f"{len(few)} samples have no spread"):
            unlabelled_scores(few)
