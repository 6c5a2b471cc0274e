"""Rules that tell a failure of training by the figures of the latest log lines; `docs/metrics.md` explains each.

The thresholds lie between what healthy runs and provoked failures were seen to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

LOW_TEMPERATURE = 0.05
HIGH_TEMPERATURE = 0.5
"""Between these two, both included, no failure is put down to the temperature: from SimCSE's to SimCLR's."""

FEWEST_ROWS = 4
"""The geometry of two or three rows is too noisy to say that nothing moves, or that positives don't stand out."""


@dataclass(frozen=True)
class Verdict:
    """A failure by name, the figures that show it, and what to do."""

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. {self.remedy}"


class Window:
    """The latest log lines, and what they are compared with.

    A figure that a line lacks is not a number, for which every comparison is false: a rule is silent about a
    method that does not tell what the rule needs.

    Args:
        lines: the latest lines, oldest first.
        start: the line of the first step, of the untrained model.
        lowest_excess: the lowest ``excess`` so far, of the first line or the mean of a window.
        early: the first lines, of the hardly trained model.
    """

    def __init__(
        self,
        lines: list[dict[str, float]],
        start: dict[str, float],
        lowest_excess: float,
        early: list[dict[str, float]],
    ) -> None:
        self.lines = lines
        self.start = start
        self.lowest_excess = lowest_excess
        self.early = early

    def values(self, name: str) -> list[float]:
        """A figure of every line."""
        return [line.get(name, math.nan) for line in self.lines]

    def mean(self, name: str) -> float:
        """Mean of a figure over the lines."""
        return sum(self.values(name)) / len(self.lines)

    def all_below(self, name: str, limit: float) -> bool:
        """Whether a figure lies below the limit in every line."""
        return all(value < limit for value in self.values(name))

    def early_mean(self, name: str) -> float:
        """Mean of a figure over the first lines."""
        return sum(line.get(name, math.nan) for line in self.early) / len(self.early)

    def noise(self, name: str) -> float:
        """Standard deviation of a figure from line to line; a steady change, or one odd line, doesn't count.

        By the median difference of successive lines, which of normal noise is 0.67 sqrt(2) standard deviations.
        """
        steps = [abs(after - before) for before, after in pairwise(self.values(name))]
        return median(steps) / (0.67 * math.sqrt(2))

    @property
    def temperature(self) -> float:
        """The method's temperature: as it was told, for a mean would round 0.05 to less than 0.05."""
        return self.lines[-1].get("temperature", math.nan)

    @property
    def log_candidates(self) -> float:
        """The loss of a model that tells nothing apart."""
        return self.mean("loss") - self.mean("excess")

    @property
    def gap(self) -> float:
        """How much more alike positives are than negatives."""
        return self.mean("positive_similarity") - self.mean("negative_similarity")


def _steps_not_finite(window: Window) -> Verdict | None:
    share = window.mean("nonfinite_share")
    if not share >= 0.2:
        return None
    return Verdict(
        "learning rate too high",
        f"in {share:.0%} of the steps the loss or the gradient was not finite",
        "Lower --learning-rate, set --gradient-clip 1.0, or use --precision bf16 instead of fp16.",
    )


def _queue_longer_than_data(window: Window) -> Verdict | None:
    queued, samples = window.mean("queued"), window.mean("samples")
    if not queued > samples:
        return None
    return Verdict(
        "queue contains its own positives",
        f"the queue holds {queued:.0f} keys of {samples:.0f} training samples, so older keys of every sample are "
        "among its negatives",
        "Set --queue-size below the number of training samples.",
    )


def _queued_positives(window: Window) -> Verdict | None:
    share = window.mean("queued_positives")
    # Among features on a line or circle, or all alike, a long queue holds a near double of every key by chance.
    if not (share >= 0.5 and window.mean("effective_rank") > 3 and window.all_below("negative_similarity", 0.99)):
        return None
    return Verdict(
        "queue contains its own positives",
        f"{share:.0%} of the keys are rows of the queue that they are compared with",
        "Push a batch's keys after the loss has read the queue (in after_step), and keep the queue shorter than the "
        "data set.",
    )


def _prototype_collapse(window: Window) -> Verdict | None:
    prototypes = window.mean("prototypes")
    used = prototypes ** window.mean("prototype_entropy")
    if not (prototypes >= 8 and used < 2):
        return None
    return Verdict(
        "prototype collapse",
        f"the samples share {used:.1f} of {prototypes:.0f} prototypes",
        "Make the assignments differ (a lower --epsilon, more --sinkhorn-iterations) and freeze the prototypes for "
        "longer at the start.",
    )


def _stuck_at_prototypes(window: Window) -> Verdict | None:
    trivial = math.log(window.mean("prototypes"))
    # Narrower than for candidates, and a wider gap: uniform assignments hold the loss exactly there, and draw all
    # features together whichever their views are.
    told = window.mean("rows") >= FEWEST_ROWS and window.gap < 0.1
    if not (told and all(0.99 * trivial <= loss < 1.02 * trivial for loss in window.values("loss"))):
        return None
    return Verdict(
        "loss stuck at log(N)",
        f"loss {window.mean('loss'):.4g} against log(prototypes) = {trivial:.4g}, and positives are hardly more alike "
        f"({window.mean('positive_similarity'):.2f}) than negatives ({window.mean('negative_similarity'):.2f})",
        "Lower --epsilon (0.05 or 0.03): a high one assigns every sample to all prototypes alike. If it is low, check "
        "that row i of both views is one sample and that the augmentation leaves them something in common.",
    )


def _full_collapse(window: Window) -> Verdict | None:
    spread = window.mean("dimensions") ** -0.5
    limit = 0.03 * spread
    if math.isnan(window.mean("excess")):
        # Without negatives nothing asks for a spread: a loss is solved long before the features are one point.
        limit = max(limit, min(0.2 * spread, 0.25 * window.start.get("feature_std", math.nan)))
    if not window.all_below("feature_std", limit):
        return None
    return Verdict(
        "full collapse",
        f"all samples have nearly the same feature (standard deviation {window.mean('feature_std'):.2g} a dimension; "
        f"spread features have {spread:.2g}), effective rank {window.mean('effective_rank'):.1f}",
        "Lower --learning-rate or warm up for longer; a method with a momentum encoder needs a higher --momentum, one "
        "without negatives its stop-gradient and predictor, or its --variance.",
    )


def _loss_rises(window: Window) -> Verdict | None:
    clipped = window.mean("clipped_share")
    margin = 0.5 if clipped >= 0.9 else 1.0
    # A nat is a cosine of one temperature, which says little at a tiny one. And a loss without a floor, or of a small
    # batch, sways by more than a nat from line to line though nothing is wrong; but not far above log(candidates).
    temperature = window.temperature
    if temperature < LOW_TEMPERATURE:
        margin *= LOW_TEMPERATURE / temperature
    if not median(window.values("loss")) > 2 * window.log_candidates:
        margin = max(margin, 3 * window.noise("loss"))
    loss, start = window.mean("loss"), window.start["loss"]
    if window.mean("excess") > window.lowest_excess + margin:
        before = window.lowest_excess + window.log_candidates
    elif math.isnan(window.mean("excess")) and loss > 10 * max(1.0, start):
        before = start
    else:
        return None
    clips = f"; {clipped:.0%} of the gradients were clipped" if clipped >= 0.9 else ""
    return Verdict(
        "learning rate too high",
        f"the loss has risen from {before:.3g} to {loss:.3g}{clips}",
        "Lower --learning-rate (try a tenth), or warm up for longer with --warmup-share.",
    )


def _contracted_to_temperature(window: Window) -> bool:
    """Whether all features lie about a temperature from each other, and far nearer than in the untrained model.

    Far nearer than a temperature, it is not the temperature that draws them together.
    """
    temperature = window.temperature
    start = 1 - window.start.get("negative_similarity", math.nan)
    distances = [1 - value for value in window.values("negative_similarity")]
    farthest = min(20 * temperature, 0.1, 0.5 * start)
    return all(0.1 * temperature < distance < farthest for distance in distances)


def _temperature_too_low(window: Window) -> Verdict | None:
    if not window.temperature < LOW_TEMPERATURE:
        return None
    loss, negative = window.mean("loss"), window.mean("negative_similarity")
    trivial = window.log_candidates
    # Solved by a hair: hardly a gradient is left, and the negatives are as near as in the untrained model.
    solved = loss < 0.25 * trivial and negative > max(0.5, 0.8 * window.start.get("negative_similarity", math.nan))
    above = [value > 1.2 * trivial for value in window.values("loss")]
    drowned = all(above) and window.lines[-1]["loss"] > 0.7 * window.lines[0]["loss"]
    contracted = _contracted_to_temperature(window)
    if not (solved or drowned or contracted):
        return None
    if solved:
        why = "the loss is solved without moving negatives apart"
    elif drowned:
        why = "the nearest negatives drown the rest"
    else:
        why = "all features have drawn together until they differ by no more than the temperature asks"
    return Verdict(
        "temperature too low",
        f"loss {loss:.3g} against log(candidates) = {trivial:.3g} at a similarity of {negative:.2f} of negatives and "
        f"{window.mean('positive_similarity'):.2f} of positives: {why}",
        "Raise --temperature (0.05 to 0.5 is usual)" + (", or make the views differ more." if solved else "."),
    )


def _temperature_too_high(window: Window) -> Verdict | None:
    # For similarities s with exp(s / T) nearly linear, log(candidates) - loss = gap / T.
    below = -window.mean("excess")
    told = window.temperature > HIGH_TEMPERATURE
    if not (told and window.gap > 0.2 and 0 < below < window.gap / 2):
        return None
    return Verdict(
        "temperature too high",
        f"loss {window.mean('loss'):.3g} is near log(candidates) = {window.log_candidates:.3g} although positives "
        f"(similarity {window.mean('positive_similarity'):.2f}) stand out from negatives "
        f"({window.mean('negative_similarity'):.2f}), as at a temperature of {window.gap / below:.2g}",
        "Lower --temperature (0.05 to 0.5 is usual).",
    )


def _dimensional_collapse(window: Window) -> Verdict | None:
    possible = min(window.mean("dimensions"), window.mean("rows") - 1)
    start = window.start.get("effective_rank", math.nan)
    # At most 8: simple data fill few of many dimensions. Against the start too: a narrow encoder has not collapsed.
    limit = min(max(1.5, 0.1 * possible), 8.0, 0.25 * start)
    if not (possible >= 8 and window.all_below("effective_rank", limit)):
        return None
    return Verdict(
        "dimensional collapse",
        f"the features use {window.mean('effective_rank'):.1f} dimensions of {possible:.0f} (untrained: {start:.1f})",
        "Weaken the augmentation that leaves the views so little in common, lower --learning-rate or --weight-decay, "
        "or use a projection head.",
    )


def _stuck(window: Window) -> Verdict | None:
    trivial = window.log_candidates
    lowest, loss = 0.99 * trivial, window.mean("loss")
    told = window.mean("rows") >= FEWEST_ROWS and window.gap < 0.05
    if not (told and lowest <= loss < 1.2 * trivial and window.lines[-1]["loss"] >= lowest):
        return None
    return Verdict(
        "loss stuck at log(N)",
        f"loss {loss:.4g} against log(candidates) = {trivial:.4g}, and positives are no more alike "
        f"({window.mean('positive_similarity'):.2f}) than negatives ({window.mean('negative_similarity'):.2f})",
        "Check that row i of both views is one sample and that the augmentation leaves them something in common, then "
        "try another --learning-rate and a longer --warmup-share.",
    )


def _nothing_moves(window: Window) -> Verdict | None:
    scales = {"positive_similarity": 1.0, "negative_similarity": 1.0}
    scales |= {"feature_std": window.mean("dimensions") ** -0.5, "effective_rank": window.mean("dimensions")}
    moved = [abs(window.mean(name) - window.early_mean(name)) / scale for name, scale in scales.items()]
    # Against log(candidates) where they are told: a queue that fills makes the loss rise. Regression losses lie near
    # 0 or below it, where a share of the loss says nothing.
    loss = "loss" if math.isnan(window.mean("excess")) else "excess"
    fallen = window.early_mean(loss) - window.mean(loss)
    noticed = max(0.1 * abs(window.early_mean("loss")), 2 * window.noise("loss"))
    if not (window.mean("rows") >= FEWEST_ROWS and all(value < 0.02 for value in moved) and fallen < noticed):
        return None
    return Verdict(
        "learning rate too low",
        f"the features are spread as in the untrained model (effective rank {window.mean('effective_rank'):.1f}, "
        f"similarity of negatives {window.mean('negative_similarity'):.2f})",
        "Raise --learning-rate (try ten times), and check that the encoder's parameters receive a gradient.",
    )


# The first that holds is the one that is said: causes stand before what follows from them.
RULES: tuple[Callable[[Window], Verdict | None], ...] = (
    _steps_not_finite,
    _queued_positives,
    _prototype_collapse,
    _stuck_at_prototypes,
    _temperature_too_low,
    _full_collapse,
    _loss_rises,
    _temperature_too_high,
    _dimensional_collapse,
    _stuck,
    _nothing_moves,
    # Last, for it holds over a whole run and would hide what stands after it.
    _queue_longer_than_data,
)
