"""`contrastive-mm vision evaluate RUN`: what a run's encoder is worth, under fixed protocols."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tyro.conf import Positional

from contrastive_mm.configuration import RunConfig
from contrastive_mm.domain import Domain
from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.evaluation import KeptResults
from contrastive_mm.metrics import read_metrics
from contrastive_mm.progress import progress
from contrastive_mm.report import Page, text_table
from contrastive_mm.runs import (
    ENCODER_FILE,
    METRICS_FILE,
    REPRESENTATIONS,
    add_run_pictures,
    evaluation_files,
    trained_encoder,
    untrained_encoder,
)
from contrastive_mm.training.accelerator import make_accelerator
from contrastive_mm.vision.evaluation.corruptions import KINDS
from contrastive_mm.vision.evaluation.protocols import PROTOCOLS, FrozenFeatures, Result, score_corruption, settings_of
from contrastive_mm.vision.evaluation.report import (
    CORRUPTION,
    Row,
    add_corrupted_sample,
    add_evaluation,
    table_rows,
)
from contrastive_mm.vision.image_runs import open_image_run

ROBUSTNESS = "robustness"
PROTOCOL_NAMES = ("knn", "linear", "few-labels", "retrieval", "clustering", ROBUSTNESS, "geometry")
"""What ``--only`` chooses from, in the order in which they are computed."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: of the table.
        left_out: protocol -> why it was not computed.
        results_file: where the results are.
        report: where the pictures are.
    """

    rows: list[Row]
    left_out: dict[str, str]
    results_file: Path
    report: Path


def evaluate(
    run: Positional[Path],
    data: str | None = None,
    test_data: str | None = None,
    only: str = "",
    corruption_kinds: str = "",
    seed: int = 0,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score a run's frozen encoder beside the untrained encoder and raw pixels.

    Protocols: knn, linear, few-labels, retrieval, clustering, robustness, geometry. Each learns from the training
    part of the data and is scored on the part held back, or on a test split; no label that scores chooses anything.
    Results are written as they come: a second call goes on where the first stopped.

    Args:
        run: folder of the run.
        data: evaluate on other data than it was trained on (transfer), with a split of its own.
        test_data: score on these images (cifar10:test, a folder, FOLDER:test) and learn from all of --data, held-back
            part and all.
        only: some of the protocols, with commas between them; all by default.
        corruption_kinds: some of gaussian_noise, gaussian_blur, brightness, contrast, pixelate, jpeg, with commas
            between them; all by default.
        seed: of the draws of labels, the starts of k-means and the noise.
        output: folder for evaluation.json and report.html; the run's by default.
        overwrite: compute again what has been computed.
    """
    found = evaluate_images(
        run, data, _choices(only), _choices(corruption_kinds), seed, output, overwrite, test_data=test_data
    )
    if found.rows:
        print(text_table(["protocol", *REPRESENTATIONS], [row.cells(REPRESENTATIONS) for row in found.rows]))
    reasons: dict[str, list[str]] = {}
    for protocol, reason in found.left_out.items():
        reasons.setdefault(reason, []).append(protocol)
    for reason, protocols in reasons.items():
        print(f"Left out: {', '.join(protocols)}: {reason}.")
    print(f"\nResults: {found.results_file}\nPictures: {found.report}")


def _choices(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def evaluate_images(
    run: Path,
    data: str | None = None,
    only: Sequence[str] = (),
    corruption_kinds: Sequence[str] = (),
    seed: int = 0,
    output: Path | None = None,
    overwrite: bool = False,
    test_data: str | None = None,
) -> Evaluation:
    """As ``evaluate``, for programs.

    Writes ``evaluation.json`` and ``report.html`` (for other data ``evaluation-<data>.json`` and
    ``report-<data>.html``, where a test split gives its name too) into ``output``. Results that stand there already
    are kept where the encoder, the data and the protocol's settings are the same.

    Raises:
        UserError: no such run, data, protocol or kind of corruption; or ``output`` is a file.
    """
    tasks = _tasks(only, corruption_kinds)
    folder = run if output is None else output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder.")
    config, domain = open_image_run(run, data, test_data)
    device = make_accelerator().device
    encoders = _encoders(run, config, domain, device)
    features = FrozenFeatures(domain, encoders, device, seed)
    results_file, report = evaluation_files(folder, data, test_data)
    kept = KeptResults(results_file, _subject(run, config, features), overwrite)
    left_out = _reasons(features, tasks)
    _compute(features, {name: task for name, task in tasks.items() if name not in left_out}, kept)
    lines = read_metrics(run / METRICS_FILE)
    rows = table_rows(kept.results, list(tasks))
    every = table_rows(kept.results, list(kept.results))
    scores = {name: {row.metric: row.values[name] for row in every} for name in REPRESENTATIONS}
    step = lines[-1]["step"] if lines else None
    kept.write(data=config.domain_options.data, test_data=test_data, step=step, scores=scores, left_out=left_out)
    _write_report(run, config, features, kept.results, every, left_out, report)
    return Evaluation(rows, left_out, results_file, report)


Task = Callable[[FrozenFeatures], Result]


def _tasks(only: Sequence[str], corruption_kinds: Sequence[str]) -> dict[str, Task]:
    """What is to be computed, by the name of its result, in order."""
    for name in only:
        if name not in PROTOCOL_NAMES:
            raise unknown_name("protocol", name, PROTOCOL_NAMES, "--only")
    for kind in corruption_kinds:
        if kind not in KINDS:
            raise unknown_name("corruption", kind, KINDS, "--corruption-kinds")
    tasks: dict[str, Task] = {}
    for name in PROTOCOL_NAMES:
        if only and name not in only:
            continue
        if name == ROBUSTNESS:
            kinds = [kind for kind in KINDS if not corruption_kinds or kind in corruption_kinds]
            tasks |= {CORRUPTION + kind: partial(score_corruption, kind=kind) for kind in kinds}
        else:
            tasks[name] = PROTOCOLS[name]
    return tasks


def _encoders(
    run: Path, config: RunConfig[Any, Any], domain: Domain, device: torch.device
) -> dict[str, nn.Module | None]:
    untrained = untrained_encoder(domain, config.trainer.seed).to(device)
    trained = trained_encoder(run, config, domain).to(device)
    return dict(zip(REPRESENTATIONS, (untrained, None, trained), strict=True))


def _subject(run: Path, config: RunConfig[Any, Any], features: FrozenFeatures) -> dict[str, Any]:
    """What results are of: equal where the weights and the images are."""
    domain = features.domain
    return {
        "encoder": hashlib.sha256((run / ENCODER_FILE).read_bytes()).hexdigest(),
        "untrained_seed": config.trainer.seed,
        "data": config.domain_options.data,
        "images": domain.digest,
        "train": len(features.train_rows),
        "held_back": len(features.held_back_rows),
        "image_size": domain.image_size,
    }


def _reasons(features: FrozenFeatures, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Why some of the tasks can't be done on this data."""
    domain, reason = features.domain, ""
    if domain.labels is None:
        reason = "the data has no labels"
    elif len(features.train_labels.unique()) < 2:
        reason = "the training part has labels of fewer than two classes"
    elif len(features.held_back_rows) == 0:
        share = domain.config.validation_share
        reason = f"no labelled image is held back to score on (the run's --validation-share is {share})"
    left_out = {name: reason for name in tasks if name != "geometry"} if reason else {}
    if "geometry" in tasks and len(domain.images) < 2:
        left_out["geometry"] = "one image has no spread"
    return left_out


def _compute(features: FrozenFeatures, tasks: Mapping[str, Task], kept: KeptResults) -> None:
    """Do what has not been done yet; each result is on the disk before the next task begins."""
    bar = progress(tasks.items(), desc="evaluate", unit="protocol")
    for name, task in bar:
        bar.set_postfix_str(name, refresh=sys.stderr.isatty())  # a log would get a line for each
        settings = settings_of(name, features.seed)
        if kept.find(name, settings) is None:
            with torch.no_grad():
                kept.put(name, settings, task(features))


def _write_report(
    run: Path,
    config: RunConfig[Any, Any],
    features: FrozenFeatures,
    results: Mapping[str, Any],
    rows: Sequence[Row],
    left_out: Mapping[str, str],
    path: Path,
) -> None:
    domain = features.domain
    page = Page(f"{config.method} on {config.domain_options.data}")
    page.add_text(
        f"{len(features.train_rows)} images to learn from, {len(features.held_back_rows)} held back to score on."
    )
    page.add_table("Scores", ["protocol", *REPRESENTATIONS], [row.cells(REPRESENTATIONS) for row in rows])
    if left_out:
        page.add_table("Left out", ["protocol", "why"], [[name, why] for name, why in left_out.items()])
    add_evaluation(page, results, domain.class_names)
    if len(features.held_back_rows):
        first = features.held_back_rows[:1]
        add_corrupted_sample(page, results, domain.images.read(first)[0], int(first), features.seed)
    before, _, after = features.encoders.values()
    add_run_pictures(page, {str(run): run}, domain.embed(before), domain.embed(after))
    page.save(path)
