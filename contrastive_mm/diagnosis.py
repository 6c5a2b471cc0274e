"""The collapse doctor: watches the features while training and names a failure and its remedy.

It reads the features that a method compares, at log steps only, draws no random numbers and changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_mm.geometry import alignment, effective_rank, feature_std, mean_similarity, uniformity
from contrastive_mm.methods.base import Objective
from contrastive_mm.verdicts import FEWEST_ROWS, RULES, Verdict, Window

MAX_ROWS = 256
"""Rows of a batch that the statistics look at: on more they hardly change, and the singular values cost time."""

MAX_KEYS_IN_QUEUE = 32
"""Keys that are looked for in the queue; all of a queue's 65,536 rows are compared with each."""

UNLOGGED = ("rows", "dimensions", "prototypes", "temperature", "queued")
"""What verdicts need to know and never changes over a run."""

EARLY_LINES = 3
"""Log lines at the start that are averaged: in a small batch the untrained model's figures are noisy."""


@torch.no_grad()
def feature_statistics(objective: Objective) -> dict[str, float]:
    """The geometry of the features that a method compares, in float32, on the first 256 rows.

    Args:
        objective: of this step, before the method's ``after_step``: its ``negatives`` may be a view of a queue.

    Returns:
        What the objective's fields allow, by the names that ``docs/metrics.md`` explains, with ``dimensions`` and
        ``rows`` of the features; nothing for features that are not finite.
    """
    statistics: dict[str, float] = {}
    if objective.candidates is not None:
        statistics["candidates"] = objective.candidates
    if objective.temperature is not None:
        statistics["temperature"] = objective.temperature
    if objective.prototype_use is not None:
        use = objective.prototype_use.float()
        statistics["prototypes"] = len(use)
        statistics["prototype_entropy"] = float(torch.special.entr(use).sum()) / math.log(max(2, len(use)))
    if objective.features is None or len(objective.features[0]) < 2:
        return statistics
    first, second = (F.normalize(features[:MAX_ROWS].float(), dim=1) for features in objective.features)
    if not bool(torch.isfinite(first).all() & torch.isfinite(second).all()):
        return statistics
    statistics |= {
        "rows": len(first),
        "dimensions": first.shape[1],
        "feature_std": feature_std(first),
        "effective_rank": effective_rank(first),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
        "positive_similarity": float((first * second).sum(1).mean()),
    }
    if objective.negatives is None:
        statistics["negative_similarity"] = mean_similarity(first, second, paired=True)
    else:
        queue = objective.negatives.float()
        statistics["queued"] = len(queue)
        statistics["negative_similarity"] = mean_similarity(first, queue)
        statistics["queued_positives"] = _share_found(second[:MAX_KEYS_IN_QUEUE], queue)
    return statistics


def _share_found(keys: Tensor, queue: Tensor) -> float:
    """Share of the keys that are rows of the queue, whichever type the queue stores."""
    nearest = (keys @ F.normalize(queue, dim=1).T).amax(dim=1)
    return float((nearest > 1 - 1e-5).float().mean())


class Doctor:
    """Collects statistics over a run and says what fails.

    A verdict needs a window of log lines that agree, over at least ``patience`` steps after the warm-up: 100 steps,
    2% of the run or five log lines, whichever is longest. Short plateaus and the first steps are so passed over.
    Each failure is said once, and again only when it was away for ten times the patience.

    Args:
        log_every: steps between two log lines.
        total_steps: of the run.
        warmup_steps: at its start; no verdict looks at them.
        gradient_clip: the largest norm of the gradient, if it is clipped.
        num_samples: of the training data, if it is known; a queue should hold fewer keys.
    """

    def __init__(
        self,
        log_every: int,
        total_steps: int,
        warmup_steps: int = 0,
        gradient_clip: float | None = None,
        num_samples: int | None = None,
    ) -> None:
        self.warmup_steps = warmup_steps
        self.gradient_clip = gradient_clip
        self.num_samples = num_samples
        self.patience = max(100, total_steps // 50, 5 * log_every)
        # Of closely spaced log lines some are enough, which keeps the window and a checkpoint small.
        self._spacing = max(log_every, self.patience // 20)
        self._lines: deque[dict[str, float]] = deque(maxlen=self.patience // self._spacing)
        self._start: dict[str, float] = {}
        self._early: list[dict[str, float]] = []
        self._lowest_excess = math.inf
        self._last_held: dict[str, int] = {}
        self._said: list[str] = []
        self._examined: dict[str, float] = {}
        self._steps = 0
        self._not_finite: Tensor | float = 0.0
        self._clipped: Tensor | float = 0.0

    def count_step(self, metrics: Mapping[str, Tensor], skipped: bool) -> None:
        """Count a step that was clipped, not finite, or skipped by gradient scaling; on the device, without waiting.

        Args:
            metrics: of the step, with ``loss`` and, if gradients are clipped, ``gradient_norm``.
            skipped: whether the gradient scaler skipped it.
        """
        self._steps += 1
        finite = torch.isfinite(metrics["loss"])
        if self.gradient_clip is not None:
            norm = metrics["gradient_norm"]
            finite = finite & torch.isfinite(norm)
            self._clipped = self._clipped + (norm > self.gradient_clip)
        self._not_finite = self._not_finite + (1.0 if skipped else ~finite)

    def examine(self, objective: Objective) -> None:
        """Look at a step's features; call it at log steps, before the method's ``after_step``."""
        self._examined = feature_statistics(objective)

    def report(self, step: int, loss: float) -> tuple[dict[str, float], Verdict | None]:
        """Sum up the steps since the last report.

        Args:
            step: number of the step that was examined, from 1.
            loss: its loss.

        Returns:
            The figures to log, and a failure that was not said yet.
        """
        figures, self._examined = self._examined, {}
        if self._steps:
            figures["nonfinite_share"] = float(self._not_finite) / self._steps
            if self.gradient_clip is not None:
                figures["clipped_share"] = float(self._clipped) / self._steps
        self._steps, self._not_finite, self._clipped = 0, 0.0, 0.0
        line = {"step": step, "loss": loss, **figures}
        if self.num_samples is not None:
            line["samples"] = self.num_samples
        if "candidates" in line:
            line["excess"] = loss - math.log(line["candidates"])
        verdict = self._judge(line)
        return {name: value for name, value in figures.items() if name not in UNLOGGED}, verdict

    def _judge(self, line: dict[str, float]) -> Verdict | None:
        step = int(line["step"])
        if not self._start:
            self._start = line
            # The first loss of a few rows, perhaps against no more than these, is no measure of later ones.
            if line.get("rows", 0) >= FEWEST_ROWS:
                self._lowest_excess = line.get("excess", math.inf)
        if len(self._early) < EARLY_LINES:
            self._early.append(line)
        if step <= self.warmup_steps or (self._lines and step - self._lines[-1]["step"] < self._spacing):
            return None
        self._lines.append(line)
        if len(self._lines) < (self._lines.maxlen or 0):
            return None
        window = Window(list(self._lines), self._start, self._lowest_excess, self._early)
        verdict = self._first_new([held for rule in RULES if (held := rule(window)) is not None], step)
        self._lowest_excess = min(self._lowest_excess, window.mean("excess"))
        return verdict

    def _first_new(self, held: list[Verdict], step: int) -> Verdict | None:
        """The foremost failure, if it was not said yet or has come back after long."""
        returned = [v for v in held if step - self._last_held.get(v.name, step) > 10 * self.patience]
        self._last_held |= {verdict.name: step for verdict in held}
        if not held or (held[0].name in self._said and held[0] not in returned):
            return None
        self._said.append(held[0].name)
        return held[0]

    def state_dict(self) -> dict[str, Any]:
        """The window, what was said, and the counts since the last log line."""
        return {
            "lines": list(self._lines),
            "start": self._start,
            "early": self._early,
            "lowest_excess": self._lowest_excess,
            "last_held": self._last_held,
            "said": self._said,
            "steps": self._steps,
            "not_finite": float(self._not_finite),
            "clipped": float(self._clipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._lines = deque(state["lines"], maxlen=self._lines.maxlen)
        self._start = dict(state["start"])
        self._early = list(state["early"])
        self._lowest_excess = state["lowest_excess"]
        self._last_held = dict(state["last_held"])
        self._said = list(state["said"])
        self._steps = state["steps"]
        self._not_finite = state["not_finite"]
        self._clipped = state["clipped"]
