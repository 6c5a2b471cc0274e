"""Runs of vision, opened for a command: the run's images, other images, or a test split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from contrastive_mm.configuration import CONFIG_FILE, RunConfig, load_run_config
from contrastive_mm.errors import UserError
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
