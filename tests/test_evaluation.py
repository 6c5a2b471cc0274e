import itertools
import math

import oracles
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler

from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    alignment,
    choose_strength,
    clustering_scores,
    default_neighbours,
    draw_share,
    effective_rank,
    extract_features,
    few_label_accuracy,
    fit_linear_probe,
    knn_accuracy,
    knn_predict,
    linear,
    linear_probe_accuracy,
    matched_accuracy,
    retrieval,
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


def test_recall_at_k_and_the_mean_average_precision_equal_the_loop_in_chunks(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_CELLS", 70)  # two queries at a time
    gallery, gallery_labels = clusters(30, spread=1.2)
    query, query_labels = clusters(11, spread=1.2, seed=1)
    found, average = {1: 0, 3: 0, 40: 0}, 0.0
    for row, label in zip(query.tolist(), query_labels.tolist(), strict=True):
        pairs = zip(gallery.tolist(), gallery_labels.tolist(), strict=True)
        ranked = sorted(((oracles.cosine(row, other), name) for other, name in pairs), reverse=True)
        hits = [name == label for _, name in ranked]
        for k in found:
            found[k] += any(hits[:k])
        average += sum(sum(hits[: place + 1]) / (place + 1) for place in range(30) if hits[place]) / sum(hits)
    scores = retrieval_scores(query, query_labels, gallery, gallery_labels, recall_at=(1, 3, 40))
    assert 0 < found[1] < found[3] < found[40] == 11
    assert {k: scores[f"recall_at_{k}"] for k in found} == {k: pytest.approx(n / 11) for k, n in found.items()}
    assert scores["recall_at_1"] == scores["precision_at_1"]
    assert scores["mean_average_precision"] == pytest.approx(average / 11, abs=1e-6)
    with pytest.raises(UserError, match="at least 1"):
        retrieval_scores(query, query_labels, gallery, gallery_labels, recall_at=(0,))


def test_knn_predicts_at_a_temperature_that_overflows_without_care():
    train, labels = clusters(30, spread=0.2)
    predicted = knn_predict(train, labels, train, neighbours=5, temperature=1e-4)
    assert torch.equal(predicted, labels)


@pytest.mark.parametrize(("smallest", "expected"), [(1, 1), (3, 1), (30, 15), (399, 199), (1000, 200)])
def test_neighbours_are_200_or_half_of_the_smallest_class(smallest, expected):
    labels = torch.tensor([7] * smallest + [3] * 1200)
    assert default_neighbours(labels) == expected


def best_matching(table):
    """By trying all of them."""
    columns = range(len(table[0]))
    return max(
        sum(table[row][column] for row, column in zip(rows, order, strict=True))
        for rows in itertools.permutations(range(len(table)), min(len(table), len(table[0])))
        for order in itertools.combinations(columns, len(rows))
    )


@pytest.mark.parametrize(("clusters_found", "classes"), [(4, 4), (3, 5), (5, 2), (1, 3)])
def test_matched_accuracy_equals_the_best_of_all_matchings(clusters_found, classes, generator):
    found = torch.randint(0, clusters_found, (60,), generator=generator) * 3 + 1
    labels = torch.randint(0, classes, (60,), generator=generator) * 10
    labels[::2] = found[::2] % classes * 10  # a relation, so that the best matching stands out
    table = [[int(((found == c) & (labels == k)).sum()) for k in labels.unique()] for c in found.unique()]
    assert matched_accuracy(found, labels) == pytest.approx(best_matching(table) / 60)


def pair_counts_ari(found, labels):
    """The adjusted Rand index by its definition over all pairs."""
    together, same_cluster, same_class, pairs = 0, 0, 0, 0
    for i in range(len(found)):
        for j in range(i):
            pairs += 1
            same_cluster += found[i] == found[j]
            same_class += labels[i] == labels[j]
            together += found[i] == found[j] and labels[i] == labels[j]
    chance = same_cluster * same_class / pairs
    return (together - chance) / ((same_cluster + same_class) / 2 - chance)


def test_clustering_finds_planted_clusters_and_scores_them_against_the_labels():
    rows, planted = clusters(60, spread=0.05)
    assert clustering_scores(rows * torch.linspace(0.1, 9, 60)[:, None], planted) == {
        "clustering_nmi": pytest.approx(1),
        "clustering_ari": pytest.approx(1),
        "clustering_accuracy": 1.0,
    }, "and the length of a feature counts for nothing"
    labels = planted.clone()
    labels[:15] = (labels[:15] + 1) % 3  # k-means still finds what is planted, and 45 of 60 labels agree with it
    scores = clustering_scores(rows, labels)
    assert scores["clustering_accuracy"] == pytest.approx(45 / 60)
    assert scores["clustering_ari"] == pytest.approx(pair_counts_ari(planted.tolist(), labels.tolist()))
    assert scores["clustering_nmi"] == pytest.approx(normalized_mutual_info_score(labels, planted))


def test_collapsed_features_are_scored_and_no_samples_are_refused():
    scores = clustering_scores(torch.ones(12, 3), torch.arange(12) % 3)
    assert scores["clustering_accuracy"] == pytest.approx(4 / 12)
    assert scores["clustering_nmi"] == pytest.approx(0)
    for score in (
        lambda: clustering_scores(torch.ones(0, 3), torch.zeros(0).long()),
        lambda: matched_accuracy(torch.zeros(0).long(), torch.zeros(0).long()),
    ):
        with pytest.raises(UserError, match="at least one"):
            score()


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_probe_is_scikit_learns_logistic_regression(strength, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK_ROWS", 64)
    train, labels = clusters(200, classes=4, spread=0.7)
    train = train * torch.tensor([1.0, 5.0, 0.3, 20.0]) + 3
    rows = clusters(50, classes=4, spread=0.7, seed=1)[0] * torch.tensor([1.0, 5.0, 0.3, 20.0]) + 3
    names = torch.tensor([2, 30, 5, 11])[labels]
    scaler = StandardScaler().fit(train.numpy())
    other = LogisticRegression(C=strength, max_iter=2000, tol=1e-9).fit(scaler.transform(train.numpy()), names.numpy())
    probe = fit_linear_probe(train, names, strength)
    assert probe.classes.tolist() == other.classes_.tolist()
    weight = torch.from_numpy(other.coef_).float()
    torch.testing.assert_close(probe.weight, weight, rtol=0, atol=2e-3)
    assert probe.predict(rows).tolist() == other.predict(scaler.transform(rows.numpy())).tolist()
    assert probe.accuracy(rows, torch.from_numpy(other.predict(scaler.transform(rows.numpy())))) == 1.0


def test_a_pixel_that_hardly_varied_in_training_does_not_outweigh_the_others():
    train, labels = clusters(300, classes=3, spread=0.1)
    rows, row_labels = clusters(90, classes=3, spread=0.1, seed=1)
    specks = torch.zeros(300, 1)
    specks[:3] = 1e-4 * torch.eye(3)[:, :1]
    probe = fit_linear_probe(torch.cat([train, specks], dim=1), labels)
    assert probe.accuracy(torch.cat([rows, torch.full((90, 1), 0.5)], dim=1), row_labels) > 0.95
    same = fit_linear_probe(torch.cat([train, torch.ones(300, 1)], dim=1), labels)
    assert same.accuracy(torch.cat([rows, torch.ones(90, 1)], dim=1), row_labels) > 0.95
    with pytest.raises(UserError, match="at least 2 classes"):
        fit_linear_probe(train, torch.zeros(300).long())


def test_the_penalty_is_chosen_on_training_rows_that_the_probe_did_not_learn_from(monkeypatch):
    labels = torch.tensor([0] * 20 + [1] * 10)
    features = torch.arange(30.0)[:, None]
    learned, scored = [], []

    class Probe:
        def __init__(self, strength):
            self.strength = strength

        def accuracy(self, rows, row_labels):
            assert torch.equal(row_labels, labels[rows[:, 0].long()])
            scored.append(rows[:, 0].tolist())
            return {0.1: 0.5, 1.0: 0.75, 10.0: 0.75}[self.strength]

    def fit(rows, row_labels, strength):
        assert torch.equal(row_labels, labels[rows[:, 0].long()])
        learned.append(rows[:, 0].tolist())
        return Probe(strength)

    monkeypatch.setattr(linear, "fit_linear_probe", fit)
    assert choose_strength(features, labels, (10.0, 0.1, 1.0)) == 1.0, "of equals the stronger penalty"
    for used, judged in zip(learned, scored, strict=True):
        assert sorted(used + judged) == list(range(30))
        assert [sum(row < 20 for row in judged), sum(row >= 20 for row in judged)] == [4, 2]
    assert choose_strength(features[18:22], labels[18:22], (0.1, 10.0)) == 1.0, "no row to spare"
    assert len(learned) == 3


def test_draws_keep_a_share_of_each_class_and_at_least_one_row():
    labels = torch.tensor([5] * 100 + [2] * 25 + [9] * 3)
    draws = draw_share(labels, 0.1, draws=4, seed=3)
    for rows in draws:
        assert len(rows.unique()) == len(rows)
        assert [int((labels[rows] == name).sum()) for name in (5, 2, 9)] == [10, 3, 1]
    assert not torch.equal(draws[0], draws[1])
    assert all(torch.equal(a, b) for a, b in zip(draws, draw_share(labels, 0.1, draws=4, seed=3), strict=True))
    assert draw_share(labels, 1.0, draws=1)[0].tolist() == list(range(128))
    with pytest.raises(UserError, match=r"in \(0, 1\]"):
        draw_share(labels, 0.0, draws=1)
