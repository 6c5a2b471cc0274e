"""What an encoder begins with before it is trained on annotated images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from contrastive_mm.checkpoint import load_weights
from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders.backbones import ImageEncoder
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.export.export import SavedEncoder, read_run
from contrastive_mm.vision.views.presets import Normalisation

LABELS = {"run": "from the run", "random": "from random weights", "pretrained": "from published weights"}
"""The starts that have a name; any other is a path."""
ENCODER_FILE, ENCODER_PART = "encoder.safetensors", "encoder."


def label(start: str) -> str:
    """What a start is called in tables and pictures."""
    return LABELS.get(start, f"from {start}")


def folder_name(start: str) -> str:
    """Of the start's training; that of a path can't be mistaken for one of the named starts'."""
    return start if start in LABELS else "from-" + re.sub(r"[^\w.-]+", "-", start).strip("-.")


def start_encoder(saved: SavedEncoder, start: str) -> tuple[ImageEncoder, Normalisation]:
    """The encoder as a start leaves it, and what it was trained to see.

    Args:
        saved: the run; what begins elsewhere has its architecture.
        start: ``run``, ``random``, ``pretrained``, or the path of another run or of a file of weights.

    Raises:
        UserError: there are no such weights, or they are of another architecture.
    """
    normalisation: Normalisation = saved.options.get("normalisation") or "half"
    if start == "pretrained":
        # With the stem that its weights were trained with, on images normalised as most published weights were.
        return build_image_encoder(saved.name, saved.image_size, pretrained=True), "imagenet"
    encoder = build_image_encoder(saved.name, saved.image_size, small_stem=saved.small_stem)
    if start == "run":
        encoder.load_state_dict(saved.encoder.state_dict())
    elif start != "random":
        path = Path(start)
        if path.is_dir():
            normalisation = _fitting_run(saved, path).options.get("normalisation") or "half"
            path /= ENCODER_FILE
        load_weights(encoder, _encoder_weights(saved, path), f"--initialise {start}")
    return encoder, normalisation


def _fitting_run(saved: SavedEncoder, path: Path) -> SavedEncoder:
    other = read_run(path)
    if (other.name, other.small_stem) != (saved.name, saved.small_stem):
        raise UserError(
            f"--initialise {path} does not fit: its encoder is {_described(other)}, the run's is {_described(saved)}. "
            f"Only encoders of one architecture are compared; give {path} as RUN to a command of its own."
        )
    return other


def _described(saved: SavedEncoder) -> str:
    return f"{saved.name} {'with' if saved.small_stem else 'without'} the small-image stem"


def _encoder_weights(saved: SavedEncoder, path: Path) -> Mapping[str, Tensor]:
    """Weights of a file; of a classifier those of its encoder."""
    if not path.is_file():
        raise UserError(
            f"--initialise {path} is none of {', '.join(LABELS)}, and there is no such file. To begin with other "
            f"weights of {saved.name}, give a run's folder, its {ENCODER_FILE}, or a classifier.safetensors that "
            "fine-tune wrote."
        )
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--initialise {path} can't be read as safetensors ({error}).") from error
    inner = {name[len(ENCODER_PART) :]: value for name, value in weights.items() if name.startswith(ENCODER_PART)}
    return inner or weights


def describe_start(saved: SavedEncoder, start: str) -> str:
    """What the encoder of a start has seen before."""
    if start == "random":
        return "random weights"
    if start == "pretrained":
        return f"published weights of {saved.name}"
    if start == "run":
        return _history(saved.options)
    return _history(read_run(Path(start)).options) if Path(start).is_dir() else f"the weights in {start}"


def _history(options: Mapping[str, Any]) -> str:
    method, steps = options.get("method"), options.get("steps")
    length = f"{steps} steps" if steps else f"{options.get('epochs')} epochs"
    before = "published weights" if options.get("pretrained") else "random weights"
    return f"{method} for {length} on {options.get('data')}, which began from {before}"
