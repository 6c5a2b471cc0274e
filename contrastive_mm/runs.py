"""A run is a folder: pretrain into it, evaluate it, embed with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from contrastive_mm.checkpoint import load_encoder, write_atomically
from contrastive_mm.configuration import CONFIG_FILE, RunConfig, load_run_config
from contrastive_mm.domain import Domain, Embeddings, load_domain
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import read_results
from contrastive_mm.methods import get_method
from contrastive_mm.metrics import read_metrics
from contrastive_mm.report import Page, loss_plot, map_plot, neighbour_table, score_table
from contrastive_mm.training import Trainer

METRICS_FILE = "metrics.jsonl"
ENCODER_FILE = "encoder.safetensors"
EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"
RUN_PARTS = (
    CONFIG_FILE,
    METRICS_FILE,
    ENCODER_FILE,
    EVALUATION_FILE,
    REPORT_FILE,
    "checkpoints",
    "tokenizer",
)

REPRESENTATIONS = ("untrained encoder", "raw input", "trained encoder")


def _check_folder(output: Path, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may write here, before any work is done and without leaving a trace."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder.")
    held = _held_parts(output)
    if held and not resume and not overwrite:
        raise UserError(
            f"{output} already holds a run ({', '.join(held)}). Continue it with --resume, replace it with "
            "--overwrite, or choose another --output."
        )
    _refuse_unwritable("--output", output)


def _refuse_unwritable(option: str, path: Path) -> None:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    there = there.parent if there.is_file() and there == path else there  # a file that will be replaced
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} {path} can't be written to: {there} is no folder that you may write in.")


def _held_parts(output: Path) -> list[str]:
    return [name for name in RUN_PARTS if (output / name).exists()]


def _clear_folder(output: Path) -> None:
    """Remove an earlier run; other files that lie in its folder stay."""
    for name in _held_parts(output):
        part = output / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def untrained_encoder(domain: Domain, seed: int) -> nn.Module:
    """The encoder as a run with this seed begins with it."""
    torch.manual_seed(seed)
    return domain.build_encoder()


def pretrain(
    config: RunConfig[Any, Any], output: Path, resume: bool = False, overwrite: bool = False
) -> dict[str, float]:
    """Train an encoder as a configuration says.

    Args:
        config: what to train on what, and how.
        output: folder of the run.
        resume: continue from the newest checkpoint there.
        overwrite: replace the run there.

    Returns:
        As ``Trainer.train``.

    Raises:
        UserError: the folder holds a run already, or the data, encoder or options don't fit.
    """
    _check_folder(output, resume, overwrite)
    seed = config.trainer.seed
    saved = output if resume and (output / CONFIG_FILE).exists() else None
    domain = load_domain(config.domain)(config.domain_options, seed, saved)
    encoder = untrained_encoder(domain, seed)
    method = get_method(config.method)(encoder, config.method_options)
    trainer = Trainer(method, domain.make_views, domain.train_batches(), config.trainer, output)
    # Whatever may be refused has been by now: a failed start leaves the folder, and the run in it, as they were.
    if resume:
        trainer.restore()
    elif overwrite:
        _clear_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    if not trainer.finished:
        for stale in (EVALUATION_FILE, REPORT_FILE):
            (output / stale).unlink(missing_ok=True)
    domain.save(output)  # before the configuration too: where that is, the domain finds what it saved
    dataclasses.replace(config, domain_options=domain.config).save(output / CONFIG_FILE)
    return trainer.train()


def open_run(run: Path, data: str | None = None) -> tuple[RunConfig[Any, Any], Domain]:
    """A run's configuration and its domain, on the data that it was trained on or on other data.

    Raises:
        UserError: there is no run, or no such data.
    """
    config = load_run_config(run / CONFIG_FILE)
    if data is not None:
        config = dataclasses.replace(config, domain_options=dataclasses.replace(config.domain_options, data=data))
    return config, load_domain(config.domain)(config.domain_options, config.trainer.seed, run)


def trained_encoder(run: Path, config: RunConfig[Any, Any], domain: Domain) -> nn.Module:
    """The encoder that a run has saved.

    Raises:
        UserError: it has saved none yet, or it is of another architecture.
    """
    encoder = untrained_encoder(domain, config.trainer.seed)
    load_encoder(encoder, run / ENCODER_FILE)
    return encoder


def evaluate_run(run: Path, data: str | None = None) -> dict[str, dict[str, float]]:
    """Score a run's encoder beside the untrained encoder and the raw input, and write pictures.

    Writes ``evaluation.json`` and ``report.html`` into the run, or, for other data, ``evaluation-<data>.json``
    and ``report-<data>.html``.

    Args:
        run: folder of the run.
        data: evaluate on other data than it was trained on.

    Returns:
        Scores by representation (``untrained encoder``, ``raw input``, ``trained encoder``), then by metric.

    Raises:
        UserError: as ``open_run`` and ``trained_encoder``.
    """
    config, domain = open_run(run, data)
    trained = trained_encoder(run, config, domain)
    untrained = untrained_encoder(domain, config.trainer.seed)
    encoders = dict(zip(REPRESENTATIONS, (untrained, None, trained), strict=True))
    scores = {name: domain.evaluate(encoder) for name, encoder in encoders.items()}
    lines = read_metrics(run / METRICS_FILE)
    result = {"data": config.domain_options.data, "step": lines[-1]["step"] if lines else None, "scores": scores}
    evaluation, report = evaluation_files(run, data)
    # A domain's own evaluation keeps what took it long in the same file.
    text = json.dumps(read_results(evaluation) | result, indent=2)
    write_atomically(evaluation, lambda temporary: _write(temporary, text + "\n"))
    page = Page(f"{config.method} on {config.domain_options.data}")
    page.add_table("Scores", *score_table(scores))
    add_run_pictures(page, {str(run): run}, domain.embed(untrained), domain.embed(trained))
    page.save(report)
    return scores


def evaluation_files(run: Path, data: str | None = None, test_data: str | None = None) -> tuple[Path, Path]:
    """Where ``evaluate_run`` writes scores and pictures.

    Other data than the run's own, and a test split, give the files their last name; where that is taken by other data
    of the same name, some letters besides.
    """
    name = name_of_data(data, test_data)
    if name is None:
        return run / EVALUATION_FILE, run / REPORT_FILE
    held = read_results(run / f"evaluation-{name}.json")
    if held and (held.get("test_data") != test_data or (data is not None and held.get("data") != data)):
        name += "-" + hashlib.sha256(f"{data}\0{test_data}".encode()).hexdigest()[:6]
    return run / f"evaluation-{name}.json", run / f"report-{name}.html"


def name_of_data(data: str | None, test_data: str | None = None) -> str | None:
    """What files about other data than the run's own are called after; None for its own."""
    parts = [re.sub(r"[^\w.-]+", "-", Path(part).name).strip("-") or "data" for part in (data, test_data) if part]
    return "-on-".join(parts) or None


def add_run_pictures(page: Page, runs: dict[str, Path], before: Embeddings, after: Embeddings) -> None:
    """Add loss curves, the map of embeddings before and after training, and nearest neighbours to a page."""
    curves = {name: read_metrics(run / METRICS_FILE) for name, run in runs.items()}
    page.add_picture("Loss", loss_plot(curves))
    page.add_picture("Embeddings before and after training (t-SNE)", map_plot(before, after))
    page.add_html("Nearest neighbours after training", neighbour_table(after))


def embed_run(run: Path, data: str, out: Path) -> Embeddings:
    """Embed a data set with a run's encoder into a Parquet file.

    Args:
        run: folder of the run.
        data: what to embed, as ``--data`` of the domain.
        out: Parquet file to write, with the columns ``id``, ``embedding`` (a list of float32) and, where the
            data has it, ``label``.

    Raises:
        UserError: ``out`` can't be written; or as ``open_run`` and ``trained_encoder``.
    """
    if out.is_dir() or not (out.parent.is_dir() or not out.parent.exists()):
        raise UserError(f"--out {out} can't be written: give the name of a file.")
    _refuse_unwritable("--out", out)  # before the features are computed, not after
    config, domain = open_run(run, data)
    embedded = domain.embed(trained_encoder(run, config, domain), everything=True)
    dimensions = embedded.features.shape[1]
    values = pa.array(embedded.features.flatten().numpy())
    columns = {"id": pa.array(embedded.ids)}
    if embedded.labels is not None:
        columns["label"] = pa.array(embedded.labels)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, dimensions)
    write_atomically(out, lambda temporary: pq.write_table(pa.table(columns), temporary))
    return embedded


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
