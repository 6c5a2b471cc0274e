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
