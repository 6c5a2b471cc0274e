"""What goes with an encoder's weights into a hub's folder: its configuration and its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive_mm.vision.encoders.backbones import ImageEncoder
from contrastive_mm.vision.export.constructions import Construction
from contrastive_mm.vision.views.presets import NORMALISATIONS

OWN_PART = "contrastive_mm"
"""The part of config.json that this package reads."""


def hub_config(
    encoder: ImageEncoder,
    name: str,
    image_size: int,
    small_stem: bool,
    options: Mapping[str, Any],
    timm: Construction | None,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        encoder: the encoder.
        name: as in ``--encoder``.
        image_size: side of the images.
        small_stem: whether a ResNet has the small-image stem.
        options: the run's configuration, flat.
        timm: how timm makes the model, where it can. Where it needs no changes, the configuration is timm's too.
    """
    mean, deviation = input_scaling(options)
    own = {
        "encoder": name,
        "image_size": image_size,
        "small_stem": small_stem,
        "feature_dim": encoder.feature_dim,
        "mean": mean,
        "std": deviation,
        "method": options.get("method"),
    }
    if timm is None or timm.small_stem or timm.renames:
        return {OWN_PART: own}
    arguments = dict(timm.arguments)
    return {
        "architecture": arguments.pop("model_name"),
        "num_classes": arguments.pop("num_classes"),
        "num_features": encoder.feature_dim,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, image_size, image_size], "mean": mean, "std": deviation},
        OWN_PART: own,
    }


def input_scaling(options: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel by which images in 0..1 are scaled before they reach the encoder."""
    mean, deviation = (list(values) for values in NORMALISATIONS[options.get("normalisation") or "half"])
    return (mean, deviation) if len(mean) == 3 else (mean * 3, deviation * 3)


def model_card(config: Mapping[str, Any], options: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    """The model card, README.md of a hub's repository.

    Args:
        config: what ``hub_config`` gave.
        options: the run's configuration, flat.
        scores: what ``evaluate`` wrote, or None.
    """
    own = config[OWN_PART]
    by_timm = "architecture" in config
    labels = "with" if own["method"] == "supcon" else "without"
    parts = [
        _front_matter(by_timm),
        f"# {own['encoder']} by {own['method']}\n",
        f"An image encoder trained {labels} labels by contrastive_mm: images of {own['image_size']} x "
        f"{own['image_size']} px to {own['feature_dim']} features.\n",
        _training(options),
        _scores(scores, bool(options.get("pretrained"))),
        _usage(own, by_timm),
        "## Licence\n\nNone is chosen yet: name one here and as `license` at the top of this file before you publish. "
        "The data's licence may limit the choice.\n",
    ]
    return "\n".join(parts)


def _front_matter(by_timm: bool) -> str:
    library = "timm" if by_timm else "contrastive_mm"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n"
        "tags:\n- contrastive-learning\n- self-supervised-learning\n# license: choose one before you publish\n---\n"
    )


def _training(options: Mapping[str, Any]) -> str:
    data = str(options.get("data", ""))
    # The name only: where a folder lies on somebody's disk is nobody's business.
    data = data if data.startswith("hf:") else Path(data).name
    start = "its library's pretrained weights" if options.get("pretrained") else "random weights"
    length = f"{options['steps']} steps" if options.get("steps") else f"{options.get('epochs')} epochs"
    rows = {
        "method": options.get("method"),
        "data": data,
        "began with": start,
        "length": f"{length}, batches of {options.get('batch_size')}",
        "optimizer": f"{options.get('optimizer')}, learning rate {options.get('learning_rate')}, "
        f"weight decay {options.get('weight_decay')}",
        "temperature": options.get("temperature"),
        "seed": options.get("seed"),
    }
    lines = [f"- {name}: {value}" for name, value in rows.items() if value is not None]
    return "\n".join(["## Training\n", *lines, ""])


def _scores(evaluation: Mapping[str, Any] | None, pretrained: bool) -> str:
    if evaluation is None:
        return "## Scores\n\nNot evaluated: `contrastive-mm evaluate RUN`, then export again.\n"
    scores: Mapping[str, Mapping[str, float]] = evaluation["scores"]
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    lines = [
        f"| {name} | " + " | ".join(f"{values[metric]:.4f}" if metric in values else "" for metric in metrics) + " |"
        for name, values in scores.items()
    ]
    head = [f"| | {' | '.join(metrics)} |", "|---|" + "---:|" * len(metrics)]
    note = "The untrained encoder is the one that training began with" + (
        ", with its library's pretrained weights." if pretrained else ", with random weights."
    )
    where = f"Frozen features, on the part of the data that was held back, after step {evaluation.get('step')}. {note}"
    return "\n".join(["## Scores\n", where, "", *head, *lines, ""])


def _usage(own: Mapping[str, Any], by_timm: bool) -> str:
    scaled = f"scaled by mean {_short(own['mean'])} and deviation {_short(own['std'])}"
    lines = [
        "## Use\n",
        f"Images are float32 in 0..1, {scaled}: `(images - mean) / deviation`.\n",
        "```python",
        "from huggingface_hub import snapshot_download",
        "from contrastive_mm.vision.export.export import load_exported",
        "",
        'encoder = load_exported(snapshot_download("USER/NAME"))',
        f"features = encoder(images)  # ({own['feature_dim']} columns)",
        "```",
    ]
    if by_timm:
        lines += ["", "or", "", "```python", "import timm", ""]
        lines += ['encoder = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()', "```"]
    return "\n".join([*lines, ""])


def _short(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
