"""The demonstration: three domains, three seeds, no download, one table and one page."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrastive_mm.checkpoint import write_atomically
from contrastive_mm.configuration import RunConfig, parse_run
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.report import Page, text_table
from contrastive_mm.runs import (
    REPRESENTATIONS,
    add_run_pictures,
    open_run,
    pretrain,
    trained_encoder,
    untrained_encoder,
)

UNTRAINED, RAW, TRAINED = REPRESENTATIONS

RECIPES = {
    "vision": ("digits-simclr", ("few_label_accuracy_1", "few_label_accuracy_5", "few_label_accuracy_10")),
    "nlp": ("pydoc-simcse", ("precision_at_1", "mean_average_precision")),
    "rl": ("cartpole-curl", ("r2_position", "r2_angle")),
}

HEADERS = (
    "domain",
    "data",
    "method",
    "metric",
    UNTRAINED,
    "raw-input baseline",
    TRAINED,
    "seconds",
    "beats",
)

NOTE = (
    "Mean and standard deviation over {seeds} seeds; seconds are for training one encoder. Scores are on data held "
    "back from training. 'Beats': the trained encoder scores higher in every seed. Digits: logistic regression from "
    "1, 5 or 10 labels a class, against raw pixels. Text: finding sentences of the same topic by cosine, against "
    "TF-IDF. CartPole: R squared of a ridge regression from 200 labelled frames, against raw pixels."
)


@dataclass
class _Cell:
    """One domain's runs: scores by representation, a list over seeds of scores by metric."""

    config: RunConfig[Any, Any]
    runs: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {name: [] for name in REPRESENTATIONS})
    seconds: list[float] = field(default_factory=list)
    pictures: tuple[Embeddings, Embeddings] | None = None


def run_demo(output: Path = Path("runs/demo"), seeds: int = 3) -> Path:
    """Pretrain an encoder in each domain with each seed, print the table and write the report.

    Args:
        output: folder for the runs, ``results.json`` and ``report.html``; an earlier demo there is replaced.
        seeds: how many seeds.

    Returns:
        The report's path.

    Raises:
        UserError: fewer than 1 seed.
    """
    if seeds < 1:
        raise UserError(f"--seeds = {seeds}; at least 1 is needed.")
    began = time.perf_counter()
    cells = {domain: _run_cell(domain, output, seeds) for domain in RECIPES}
    rows = [row for domain, cell in cells.items() for row in _rows(domain, cell)]
    note = NOTE.format(seeds=seeds)
    print(f"\n{text_table(HEADERS, rows)}\n\n{note}")
    page = Page("contrastive_mm demo")
    page.add_table("Frozen features before and after contrastive pretraining without labels", HEADERS, rows)
    page.add_text(note)
    for domain, cell in cells.items():
        page.add_heading(f"{domain}: {cell.config.method} on {cell.config.domain_options.data}")
        assert cell.pictures is not None
        add_run_pictures(page, cell.runs, *cell.pictures)
    page.save(output / "report.html")
    text = json.dumps({domain: _as_json(cell) for domain, cell in cells.items()}, indent=2) + "\n"
    write_atomically(output / "results.json", lambda temporary: _write(temporary, text))
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Pictures: {output / 'report.html'}")
    return output / "report.html"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _run_cell(domain_name: str, output: Path, seeds: int) -> _Cell:
    recipe, metrics = RECIPES[domain_name]
    config, _ = parse_run(domain_name, [f"--config={recipe}"])
    cell = _Cell(config)
    for seed in range(seeds):
        print(f"{domain_name}: {config.method} on {config.domain_options.data}, seed {seed} ...", flush=True)
        seeded = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=seed))
        run = output / f"{domain_name}-seed{seed}"
        cell.seconds.append(pretrain(seeded, run, overwrite=True)["seconds"])
        cell.runs[f"seed {seed}"] = run
        _score(cell, run)
        gains = (f"{m} {cell.scores[UNTRAINED][-1][m]:.3f} -> {cell.scores[TRAINED][-1][m]:.3f}" for m in metrics)
        print(f"  {cell.seconds[-1]:.0f} s; untrained -> trained: {', '.join(gains)}", flush=True)
    return cell


def _score(cell: _Cell, run: Path) -> None:
    config, domain = open_run(run)
    trained = trained_encoder(run, config, domain)
    untrained = untrained_encoder(domain, config.trainer.seed)
    for name, encoder in zip(REPRESENTATIONS, (untrained, None, trained), strict=True):
        cell.scores[name].append(domain.evaluate(encoder))
    if cell.pictures is None:
        cell.pictures = domain.embed(untrained), domain.embed(trained)


def _rows(domain: str, cell: _Cell) -> list[list[str]]:
    rows = []
    for metric in RECIPES[domain][1]:
        values = {name: [scores[metric] for scores in cell.scores[name]] for name in REPRESENTATIONS}
        seconds = f"{statistics.mean(cell.seconds):.0f}"
        shown = [_mean_and_deviation(values[name]) for name in REPRESENTATIONS]
        config = cell.config
        rows.append([domain, config.domain_options.data, config.method, metric, *shown, seconds, _verdict(values)])
    return rows


def _mean_and_deviation(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def _verdict(values: dict[str, list[float]]) -> str:
    beaten = [
        name
        for name in (UNTRAINED, RAW)
        if all(mine > other for mine, other in zip(values[TRAINED], values[name], strict=True))
    ]
    if not beaten:
        return "neither"
    return "both" if len(beaten) == 2 else f"{beaten[0]} only"


def _as_json(cell: _Cell) -> dict[str, Any]:
    return {"config": cell.config.flat(), "scores": cell.scores, "seconds": cell.seconds}
