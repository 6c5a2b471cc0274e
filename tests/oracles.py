"""Losses as loops over plain floats in double precision: slow, and easy to hold against the formula."""

import math


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(positive, all_logits):
    top = max(all_logits)
    return top + math.log(sum(math.exp(value - top) for value in all_logits)) - positive


def nt_xent(first, second, temperature):
    views = first + second
    count = len(first)
    total = 0.0
    for i, view in enumerate(views):
        partner = (i + count) % (2 * count)
        others = [cosine(view, views[j]) / temperature for j in range(2 * count) if j != i]
        total += cross_entropy(cosine(view, views[partner]) / temperature, others)
    return total / (2 * count)


def info_nce(query, key, negatives, temperature, similarity, in_batch):
    total = 0.0
    for i, anchor in enumerate(query):
        positive = similarity(anchor, key[i]) / temperature
        logits = [positive]
        if in_batch:
            logits += [similarity(anchor, key[j]) / temperature for j in range(len(key)) if j != i]
        logits += [similarity(anchor, other) / temperature for other in negatives]
        total += cross_entropy(positive, logits)
    return total / len(query)


def positives_mean(weights, similarities):
    """Weighted mean of similarities; None where no weight is left."""
    total = sum(weights)
    return None if total == 0 else sum(w * s for w, s in zip(weights, similarities, strict=True)) / total


def soft_nt_xent(first, second, weights, temperature):
    """NT-Xent whose positives in the other view are weighted; ``weights[i][j]`` is of first i with second j."""
    views, count, total = first + second, len(first), 0.0
    for i, view in enumerate(views):
        similar = [cosine(view, other) / temperature for other in views]
        row = weights[i] if i < count else [weights[j][i - count] for j in range(count)]
        other_view = similar[count:] if i < count else similar[:count]
        candidates = [value for j, value in enumerate(similar) if j != i]
        total += cross_entropy(positives_mean(row, other_view), candidates)
    return total / (2 * count)


def supcon(views, owner, weights, temperature):
    """``owner[i]`` is the sample of view i, ``weights[a][b]`` how much samples belong together."""
    losses = []
    for i, view in enumerate(views):
        others = [j for j in range(len(views)) if j != i]
        similar = [cosine(view, views[j]) / temperature for j in others]
        mean = positives_mean([weights[owner[i]][owner[j]] for j in others], similar)
        if mean is not None:
            losses.append(cross_entropy(mean, similar))
    return sum(losses) / len(losses)


def dcl(first, second, temperature, concentration=None):
    views, count, total = first + second, len(first), 0.0
    cosines = [cosine(a, b) for a, b in zip(first, second, strict=True)]
    for i, view in enumerate(views):
        negatives = [cosine(view, other) / temperature for j, other in enumerate(views) if (i - j) % count]
        weight = 1.0
        if concentration is not None:
            spread = [math.exp(c / concentration) for c in cosines]
            weight = 2 - spread[i % count] / (sum(spread) / count)
        total += cross_entropy(weight * cosines[i % count] / temperature, negatives)
    return total / (2 * count)


def soft_dcl(first, second, weights, temperature, concentration=None):
    """DCL whose positives are weighted as in ``soft_nt_xent``; samples of any weight are no negatives."""
    count, losses = len(first), []
    for own, other, rows in ((first, second, weights), (second, first, columns(weights))):
        means = [
            positives_mean(row, [cosine(view, key) for key in other]) for view, row in zip(own, rows, strict=True)
        ]
        for i, row in enumerate(rows):
            strangers = [j for j in range(count) if j != i and row[j] == 0]
            negatives = [cosine(own[i], view[j]) / temperature for view in (own, other) for j in strangers]
            weight = 1.0
            if concentration is not None:
                spread = [math.exp(c / concentration) for c in means]
                weight = 2 - spread[i] / (sum(spread) / count)
            losses.append(cross_entropy(weight * means[i] / temperature, negatives))
    return mean(losses)


def hard_negative_nt_xent(first, second, temperature, concentration, prior):
    """As in the released code: reweighted, debiased, floored."""
    views, count, total = first + second, len(first), 0.0
    for i, view in enumerate(views):
        negatives = [math.exp(cosine(view, o) / temperature) for j, o in enumerate(views) if (i - j) % count]
        importance = [n**concentration for n in negatives]
        positive = math.exp(cosine(first[i % count], second[i % count]) / temperature)
        reweighted = sum(a * n for a, n in zip(importance, negatives, strict=True)) / (
            sum(importance) / len(negatives)
        )
        left = (reweighted - prior * len(negatives) * positive) / (1 - prior)
        left = max(left, len(negatives) * math.exp(-1 / temperature))
        total -= math.log(positive / (positive + left))
    return total / (2 * count)


def uniformity(features, concentration):
    units = [[x / math.sqrt(dot(f, f)) for x in f] for f in features]
    pairs = [(a, b) for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
    potentials = [math.exp(-concentration * sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) for a, b in pairs]
    return math.log(sum(potentials) / len(potentials))


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def mean(values):
    return sum(values) / len(values)


def sinkhorn(scores, epsilon, iterations):
    codes = [[math.exp(score / epsilon) for score in row] for row in scores]
    for _ in range(iterations):
        weights = [sum(column) for column in columns(codes)]
        codes = [[code / weight for code, weight in zip(row, weights, strict=True)] for row in codes]
        codes = [[code / sum(row) for code in row] for row in codes]
    return codes


def swapped_prediction(scores, num_global, temperature, epsilon, iterations, queue_scores):
    losses = []
    for full in range(num_global):
        codes = sinkhorn(scores[full] + queue_scores[full], epsilon, iterations)
        for view in range(len(scores)):
            if view == full:
                continue
            for row, code in zip(scores[view], codes, strict=False):
                logits = [score / temperature for score in row]
                losses.append(sum(q * cross_entropy(logit, logits) for q, logit in zip(code, logits, strict=True)))
    return mean(losses)


def barlow_twins(first, second, weight, epsilon=1e-5):
    def standardised(column):
        middle = mean(column)
        deviation = math.sqrt(mean([(x - middle) ** 2 for x in column]) + epsilon)
        return [(x - middle) / deviation for x in column]

    first, second = [[standardised(c) for c in columns(view)] for view in (first, second)]
    total = 0.0
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            correlation = dot(a, b) / len(a)
            total += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return total


def vicreg(first, second, invariance, variance, covariance, epsilon=1e-4):
    dim, count = len(first[0]), len(first)
    squares = [(x - y) ** 2 for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)]
    total = invariance * mean(squares)
    for view in (first, second):
        centred = [[x - mean(column) for x in column] for column in columns(view)]
        for i, a in enumerate(centred):
            for j, b in enumerate(centred):
                shared = dot(a, b) / (count - 1)
                if i == j:
                    total += variance * max(0.0, 1 - math.sqrt(shared + epsilon)) / dim / 2
                else:
                    total += covariance * shared**2 / dim
    return total


def sigmoid_loss(first, second, temperature, bias, similarity=cosine):
    total = 0.0
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            logit = similarity(a, b) / temperature + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(first)


def triplet_margin(anchor, positive, margin, labels, mining, normalize, squared):
    def unit(a):
        return [x / math.sqrt(dot(a, a)) for x in a] if normalize else a

    def distance(a, b):
        square = sum((x - y) ** 2 for x, y in zip(unit(a), unit(b), strict=True))
        return square if squared else math.sqrt(square)

    losses = []
    for i, a in enumerate(anchor):
        to_negatives = [distance(a, b) for b, label in zip(positive, labels, strict=True) if label != labels[i]]
        if not to_negatives:
            continue
        own = distance(a, positive[i])
        if mining == "hard":
            own = max(distance(a, b) for b, label in zip(positive, labels, strict=True) if label == labels[i])
            negative = min(to_negatives)
        elif mining == "semi-hard":
            negative = min((d for d in to_negatives if d > own), default=max(to_negatives))
        else:
            order = [(i + step) % len(labels) for step in range(1, len(labels))]
            negative = distance(a, positive[next(j for j in order if labels[j] != labels[i])])
        losses.append(math.log1p(math.exp(own - negative)) if margin is None else max(0.0, own - negative + margin))
    return mean(losses)
