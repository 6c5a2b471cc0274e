"""How each rival's losses are called. A rival is imported where it is called, so that none is needed elsewhere."""

import torch
from parity import DIM, QUEUE

MODULES = {
    "lightly": "lightly.loss",
    "open_clip_torch": "open_clip.loss",
    "pytorch-metric-learning": "pytorch_metric_learning.losses",
    "sentence-transformers": "sentence_transformers.sentence_transformer.losses",
}
"""What is imported of each rival, by its name on the package index."""


def lightly(name, **options):
    import lightly.loss
    from lightly.loss.hypersphere_loss import HypersphereLoss

    return (HypersphereLoss if name == "HypersphereLoss" else getattr(lightly.loss, name))(**options)


def lightly_moco(query, key, rows, temperature, batch):
    """Its NT-Xent with a memory bank, into which ``rows`` have gone batch after batch."""
    loss = lightly("NTXentLoss", temperature=temperature, memory_bank_size=(QUEUE, DIM)).to(rows.dtype)
    for part in rows.split(batch):
        loss.memory_bank(part, update=True)
    return loss(query, key)


def open_clip(name, first, second, temperature, *bias):
    """Its scale is 1 / T, learned as a logarithm outside of the loss."""
    import open_clip.loss

    return getattr(open_clip.loss, name)()(first, second, 1 / temperature, *bias)


def sentence_ranking(temperature, *embeddings, **options):
    """Its loss of anchors and the documents of each anchor: the right one first. Its scale is 1 / T."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=1 / temperature, **options)
    return loss.compute_loss_from_embeddings(list(embeddings), None)


def sentence_triplet(name, features, labels, **options):
    import sentence_transformers.sentence_transformer.losses as losses

    return getattr(losses, name)(None, **options).compute_loss_from_embeddings([features], labels)


def metric_learning(name, **options):
    import pytorch_metric_learning.losses

    return getattr(pytorch_metric_learning.losses, name)(**options)


def metric_learning_dot(features, labels, temperature):
    from pytorch_metric_learning.distances import DotProductSimilarity

    distance = DotProductSimilarity(normalize_embeddings=False)
    return metric_learning("NTXentLoss", temperature=temperature, distance=distance)(features, labels)


def metric_learning_queue(query, key, queue, temperature):
    """Keys and queue as its reference batch, in which every row of the queue has a number of its own."""
    numbers = torch.arange(len(key) + len(queue))
    loss = metric_learning("NTXentLoss", temperature=temperature)
    return loss(query, numbers[: len(query)], ref_emb=torch.cat([key, queue]), ref_labels=numbers)


def metric_learning_related(features, related, temperature):
    """SupCon of a matrix of who belongs with whom, as all positive and all negative pairs."""
    others = ~torch.eye(len(related), dtype=torch.bool)
    pairs = (*torch.where(related & others), *torch.where(~related & others))
    return metric_learning("SupConLoss", temperature=temperature)(features, indices_tuple=pairs)


def metric_learning_triplet(anchor, positive, labels, negatives, margin, reducer="MeanReducer"):
    """Triplets of normalised features by squared distance, a hard positive and a negative as named for each anchor."""
    import pytorch_metric_learning.reducers as reducers
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.miners import BatchEasyHardMiner

    distance = LpDistance(power=2)
    miner = BatchEasyHardMiner(pos_strategy="hard", neg_strategy=negatives, distance=distance)
    loss = metric_learning("TripletMarginLoss", margin=margin, distance=distance, reducer=getattr(reducers, reducer)())
    # With one tensor of labels for both it would leave out row i as the positive of anchor i.
    reference = {} if positive is anchor else {"ref_emb": positive, "ref_labels": labels.clone()}
    chosen, positives, _, chosen_negatives = miner(anchor, labels, **reference)
    return loss(anchor, labels, (chosen, positives, chosen_negatives), **reference)
