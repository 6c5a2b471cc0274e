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
