"""``contrastive-mm vision fine-tune RUN``: a pretrained encoder with few labels, beside training from scratch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from tyro.conf import Positional, arg

from contrastive_mm.checkpoint import CheckpointFolder, load_encoder, load_weights, write_atomically
from contrastive_mm.configuration import RunConfig
from contrastive_mm.errors import UserError
from contrastive_mm.methods import get_method
from contrastive_mm.report import text_table
from contrastive_mm.runs import ENCODER_FILE, name_of_data
from contrastive_mm.vision.domain import ImageDomain
from contrastive_mm.vision.few_labels.classifiers import Classifier, held_back
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig
from contrastive_mm.vision.few_labels.labelled import draw_labelled
from contrastive_mm.vision.few_labels.training import FewLabels
from contrastive_mm.vision.image_runs import open_image_run

RESULT_FILE = "fine_tuning.json"
STAGES = {"from scratch": "from-scratch", "linear probe": "linear-probe", "fine-tuned": "fine-tuned"}
HEADERS = ("classifier", "parameters", "held-back accuracy")


def fine_tune(
    run: Positional[Path],
    labels: float = 0.1,
    kept_layers: int | None = None,
    data: str | None = None,
    test_data: str | None = None,
    seed: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    options: Annotated[FineTuningConfig, arg(name="")] = FineTuningConfig(),  # noqa: B008 - frozen
) -> None:
    """Fine-tune a run's encoder on a share of the labels, beside a linear probe and training from scratch.

    All three read the same labels and are scored, after their last epoch, on the images that are held back. A
    command that was killed goes on where it was when it is repeated.

    Args:
        run: folder of the pretrained run.
        labels: share of each class's labels that is used (0.01, 0.1, 1.0).
        kept_layers: layers of SimCLR v2's projection head to start from; by default what the run says, and for
            other methods 0, which starts from the encoder's output.
        data: fine-tune on other data than the encoder was pretrained on.
        test_data: score on these images (cifar10:test, a folder, FOLDER:test) and take --labels of all of --data.
        seed: decides which labels are drawn, the order and the views; by default the run's.
        output: folder of the three trainings; by default fine-tuning/labels-SHARE-seed-SEED in the run, with the
            name of other data before it.
        overwrite: delete what that folder holds and begin anew.
        options: of the training.
    """
    config, domain = open_image_run(run, data, test_data)
    held_back(domain)  # without a score at the end, no training is begun
    base = config.trainer if seed is None else dataclasses.replace(config.trainer, seed=seed)
    parts = (name_of_data(data, test_data), f"labels-{labels:g}-seed-{base.seed}")
    folder = output or run / "fine-tuning" / "-".join(part for part in parts if part)
    classes = None if domain.class_names is None else len(domain.class_names)
    labelled = draw_labelled(domain.labels, domain.train_rows, labels, base.seed, classes)
    few = FewLabels(domain, labelled, base, options)
    start = pretrained_classifier(run, config, domain, labelled.num_classes, kept_layers, base.seed)
    clear_stages(folder, STAGES.values(), RESULT_FILE, overwrite)
    scores = {
        "from scratch": few.from_scratch(config.domain_options.encoder, folder / "from-scratch"),
        "linear probe": few.probe(start, folder / "linear-probe"),
        "fine-tuned": few.fine_tune(start, folder / "fine-tuned"),
    }
    result = {"run": str(run), "labels": labels, "labelled_images": len(labelled.rows), "scores": scores}
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(folder / RESULT_FILE, lambda temporary: _write(temporary, text))
    rows = [[name, f"{score['parameters']:,}", f"{score['accuracy']:.3f}"] for name, score in scores.items()]
    print(text_table(HEADERS, rows))
    print(f"\n{len(labelled.rows)} labelled of {len(domain.train_rows)} training images. The classifier: {folder}")


def pretrained_classifier(
    run: Path, config: RunConfig[Any, Any], domain: ImageDomain, num_classes: int, kept_layers: int | None, seed: int
) -> Classifier:
    """A run's encoder, the kept layers of its head, and a new linear layer.

    The head lies in the run's checkpoints only, so where layers of it are kept, the encoder is read from there too.

    Args:
        run: folder of the run.
        config: its configuration.
        domain: of the images.
        num_classes: outputs of the linear layer.
        kept_layers: layers of the head to keep; None for the method's own.
        seed: of the linear layer's weights.

    Raises:
        UserError: the run has no encoder or no checkpoint, or its head has no such layer.
    """
    method_class = get_method(config.method)
    own = getattr(config.method_options, "kept_layers", 0)
    kept = own if kept_layers is None else kept_layers
    if kept == 0:
        encoder = domain.build_encoder()
        load_encoder(encoder, run / ENCODER_FILE)
        torch.manual_seed(seed)
        return Classifier(encoder, num_classes)
    if not hasattr(method_class, "fine_tuning_encoder"):
        raise UserError(
            f"--kept-layers {kept}, but {run} was pretrained with {config.method}: only simclr-v2 is fine-tuned from "
            "a layer of its head. Leave --kept-layers out, or set it to 0."
        )
    if kept != own:  # the options refuse what the head doesn't have
        config = dataclasses.replace(
            config, method_options=dataclasses.replace(config.method_options, kept_layers=kept)
        )
    method: Any = method_class(domain.build_encoder(), config.method_options)
    checkpoints = CheckpointFolder(run / "checkpoints")
    state = checkpoints.load_newest()
    if state is None:
        raise UserError(
            f"{run} has no checkpoint, where the layers of its head would be: pretrain with --resume to write one, or "
            "fine-tune from the encoder's output with --kept-layers 0."
        )
    load_weights(method, state.get("method", {}), str(checkpoints.paths()[-1]))
    parts: nn.Sequential = method.fine_tuning_encoder()
    torch.manual_seed(seed)
    return Classifier(parts[0], num_classes, nn.Sequential(*parts[1:]), int(parts.feature_dim))  # type: ignore[arg-type]


def clear_stages(folder: Path, names: Any, result: str, overwrite: bool) -> None:
    """With ``overwrite``, delete the stages of an earlier command; else leave them to be continued.

    Raises:
        UserError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder.")
    if overwrite:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / result).unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
