"""``contrastive-mm vision simclr-v2``: pretrain, fine-tune on few labels, distil with unlabelled images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrastive_mm.checkpoint import write_atomically
from contrastive_mm.configuration import RunConfig, parse_run
from contrastive_mm.errors import UserError
from contrastive_mm.metrics import read_metrics
from contrastive_mm.report import Page, loss_plot, text_table
from contrastive_mm.runs import METRICS_FILE, pretrain
from contrastive_mm.vision.domain import ImageDomain
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.few_labels.classifiers import Classifier, held_back
from contrastive_mm.vision.few_labels.distillation import DistillationConfig
from contrastive_mm.vision.few_labels.fine_tune import pretrained_classifier
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig
from contrastive_mm.vision.few_labels.labelled import draw_labelled
from contrastive_mm.vision.few_labels.stage_table import HEADLINE, note, stage_plot, stage_rows
from contrastive_mm.vision.few_labels.stages import run_stage
from contrastive_mm.vision.few_labels.training import FewLabels

RESULT_FILE = "results.json"
PICTURE_FILE = "stages.png"
REPORT_FILE = "report.html"
PRETRAINING = "pretraining"
SELF_TEMPERATURE, STUDENT_TEMPERATURE = 0.1, 1.0
"""Of self-distillation, and of distillation into a smaller model (arXiv 2006.10029, section 3.1)."""

Scores = dict[str, dict[str, float]]


def simclr_v2(
    data: str | None = None,
    test_data: str | None = None,
    config: str | None = None,
    encoder: str | None = None,
    student: str | None = None,
    labels: tuple[float, ...] = (0.01, 0.1),
    epochs: int | None = None,
    seeds: int = 1,
    output: Path = Path("runs/simclr-v2"),
    overwrite: bool = False,
    fine_tuning: FineTuningConfig = FineTuningConfig(),  # noqa: B008 - frozen
    distillation: DistillationConfig = DistillationConfig(),  # noqa: B008 - frozen
) -> None:
    """SimCLR v2's three stages (arXiv 2006.10029): pretrain without labels, fine-tune on few, distil with all images.

    For each share of labels: training from scratch on them, a linear probe after pretraining, fine-tuning from a
    middle layer of the head, and distillation of that classifier into its own architecture and into the student, all
    scored after their last epoch on images held back from every stage. Repeat the command to go on where it was
    killed: each stage is a folder, and finished ones are skipped.

    Args:
        data: images with labels, as for pretraining; by default the recipe's.
        test_data: score on these images (cifar10:test, a folder, FOLDER:test) and hold nothing of --data back.
        config: recipe of the pretraining (a file, or a name that comes with the domain); its augmentations, device,
            precision and log are those of all stages.
        encoder: what is pretrained and fine-tuned; by default the recipe's.
        student: a smaller encoder to distil into; by default there is self-distillation only.
        labels: shares of each class's labels that are used.
        epochs: of the pretraining, in place of what the recipe says.
        seeds: how many seeds; each decides weights, labels drawn, order and views.
        output: folder of the stages, results.json, stages.png and report.html.
        overwrite: delete what an earlier command left there and begin anew.
        fine_tuning: of training on labels.
        distillation: of training on the teacher's predictions.
    """
    if seeds < 1 or not labels:
        raise UserError(f"--seeds {seeds}, --labels {labels}: at least one of each is needed.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder.")
    settings = _pretraining(data, config, encoder, epochs)
    if test_data is not None:  # all of --data is for training, in every stage
        options = dataclasses.replace(settings.domain_options, validation_share=0.0)
        settings = dataclasses.replace(settings, domain_options=options)
    domain = _checked_domain(settings, student, labels, test_data)
    settings = dataclasses.replace(settings, domain_options=domain.config)
    if overwrite:
        _clear(output)
    command = Command(settings, domain, student, labels, fine_tuning, distillation)
    results = [command.one_seed(seed, output / f"seed-{seed}") for seed in range(seeds)]
    _write_results(output, settings, student, results)


def _pretraining(data: str | None, config: str | None, encoder: str | None, epochs: int | None) -> RunConfig[Any, Any]:
    given = {"--config": config, "--data": data, "--encoder": encoder, "--epochs": epochs}
    flags = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    settings, _ = parse_run("vision", [*flags, "--method=simclr-v2"])
    if epochs is not None:  # a recipe's steps would take the place of the epochs
        settings = dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, steps=None))
    return settings


def _checked_domain(
    settings: RunConfig[Any, Any], student: str | None, labels: tuple[float, ...], test_data: str | None
) -> ImageDomain:
    """The images; what only the last stage would stumble over is refused here, before the first."""
    domain = ImageDomain(settings.domain_options, settings.trainer.seed, test_data=test_data)
    held_back(domain)
    size, images = settings.domain_options.batch_size, len(domain.train_rows)
    if size > images:
        raise UserError(
            f"The pretraining's batch_size is {size}, but there are {images} training images: give a recipe with a "
            f"batch_size from 2 to {images} (--config)."
        )
    for share in labels:
        draw_labelled(domain.labels, domain.train_rows, share, 0)
    for name in (settings.domain_options.encoder, student):
        if name is not None:
            build_image_encoder(name, domain.image_size)
    return domain


def _clear(output: Path) -> None:
    for folder in output.glob("seed-*"):
        shutil.rmtree(folder)
    for name in (RESULT_FILE, PICTURE_FILE, REPORT_FILE):
        (output / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Command:
    """What every seed does, one stage after another.

    Attributes:
        settings: of the pretraining, but for the seed.
        domain: the images.
        student: encoder to distil into, if there is one.
        labels: shares of labels.
        fine_tuning: options of training on labels.
        distillation: options of training on the teacher's predictions.
    """

    settings: RunConfig[Any, Any]
    domain: ImageDomain
    student: str | None
    labels: tuple[float, ...]
    fine_tuning: FineTuningConfig
    distillation: DistillationConfig

    def one_seed(self, seed: int, folder: Path) -> dict[str, Any]:
        """All stages of a seed; the result by share of labels."""
        settings = dataclasses.replace(self.settings, trainer=dataclasses.replace(self.settings.trainer, seed=seed))
        run, domain = folder / PRETRAINING, self.domain
        trained = run_stage(run, settings.flat(), lambda: pretrain(settings, run, resume=True))
        result: dict[str, Any] = {"pretraining_seconds": round(trained["seconds"], 1), "labels": {}}
        classes = None if domain.class_names is None else len(domain.class_names)
        for share in self.labels:
            labelled = draw_labelled(domain.labels, domain.train_rows, share, seed, classes)
            few = FewLabels(domain, labelled, settings.trainer, self.fine_tuning)
            teacher = pretrained_classifier(run, settings, domain, labelled.num_classes, None, seed)
            scores = self._one_share(few, teacher, folder / f"labels-{share:g}")
            result["labels"][f"{share:g}"] = {"labelled_images": len(labelled.rows), "scores": scores}
            _say(seed, share, scores)
        return result

    def _one_share(self, few: FewLabels, teacher: Classifier, folder: Path) -> Scores:
        encoder = self.settings.domain_options.encoder
        scores = {
            "from scratch": few.from_scratch(encoder, folder / "from-scratch"),
            "linear probe": few.probe(teacher, folder / "linear-probe"),
            "fine-tuned": few.fine_tune(teacher, folder / "fine-tuned"),
        }
        own, options = few.new_classifier(encoder), self.distillation
        self_distilled = few.distil(own, teacher, options, SELF_TEMPERATURE, folder / "self-distilled")
        scores["distilled into itself"] = self_distilled
        if self.student is not None:
            scores["student from scratch"] = few.from_scratch(self.student, folder / "student-from-scratch")
            smaller = few.new_classifier(self.student)
            taught = few.distil(smaller, teacher, options, STUDENT_TEMPERATURE, folder / "student-distilled")
            scores["distilled into the student"] = taught
        return scores


def _say(seed: int, share: float, scores: Scores) -> None:
    shown = ", ".join(f"{name} {score['accuracy']:.3f}" for name, score in scores.items())
    print(f"seed {seed}, {share:.0%} of the labels: {shown}", flush=True)


def _write_results(
    output: Path, settings: RunConfig[Any, Any], student: str | None, results: list[dict[str, Any]]
) -> None:
    """Print the table; write it with everything it is made of."""
    options = settings.domain_options
    text = json.dumps({"config": settings.flat(), "student": student, "seeds": results}, indent=2) + "\n"
    write_atomically(output / RESULT_FILE, lambda temporary: _write(temporary, text))
    headers, rows = stage_rows(results)
    said, picture = note(results, options.encoder, student), stage_plot(results)
    write_atomically(output / PICTURE_FILE, lambda temporary: _write_bytes(temporary, picture))
    page = Page(f"SimCLR v2 on {options.data}")
    page.add_table(HEADLINE, headers, rows)
    page.add_text(said)
    page.add_picture(HEADLINE, picture)
    runs = {f"seed {seed}": output / f"seed-{seed}" / PRETRAINING / METRICS_FILE for seed in range(len(results))}
    page.add_picture("Loss of the pretraining", loss_plot({name: read_metrics(path) for name, path in runs.items()}))
    page.save(output / REPORT_FILE)
    print(f"\n{text_table(headers, rows)}\n\n{said}\n\nPictures: {output / REPORT_FILE}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
