"""Runs of vision, opened for a command: the run's images, other images, or a test split."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from contrastive_mm.configuration import CONFIG_FILE, RunConfig, load_run_config
from contrastive_mm.errors import UserError
from contrastive_mm.runs import evaluation_files
from contrastive_mm.vision.domain import ImageDomain


def open_image_run(
    run: Path, data: str | None = None, test_data: str | None = None
) -> tuple[RunConfig[Any, Any], ImageDomain]:
    """A run's configuration and its images.

    Args:
        run: folder of the run.
        data: other images than it was trained on.
        test_data: images to score on; all of the others are learnt from then.

    Raises:
        UserError: there is no run or no such data, or the run is of another domain.
    """
    config = load_run_config(run / CONFIG_FILE)
    if config.domain != "vision":
        raise UserError(f"{run} is a run of {config.domain}, not of vision.")
    if data is not None:
        config = dataclasses.replace(config, domain_options=dataclasses.replace(config.domain_options, data=data))
    return config, ImageDomain(config.domain_options, config.trainer.seed, run, test_data)


def name_of_data(data: str | None, test_data: str | None) -> str | None:
    """What files about other data than the run's own are called after; None for its own."""
    parts = [re.sub(r"[^\w.-]+", "-", Path(part).name).strip("-") for part in (data, test_data) if part]
    return "-on-".join(parts) or None


def image_evaluation_files(folder: Path, data: str | None, test_data: str | None) -> tuple[Path, Path]:
    """Where scores and pictures go: names of their own for other data and for a test split."""
    return evaluation_files(folder, name_of_data(data, test_data))
