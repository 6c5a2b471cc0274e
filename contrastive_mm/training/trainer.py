"""The one training loop of every domain: schedule, log, checkpoints, exact resume."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from contrastive_mm.batches import Batches
from contrastive_mm.checkpoint import (
    CheckpointFolder,
    load_weights,
    random_state,
    restore_random_state,
    save_encoder,
)
from contrastive_mm.diagnosis import Doctor
from contrastive_mm.errors import NotFiniteError, TrainingError, UserError
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.metrics import MetricsLog
from contrastive_mm.progress import progress
from contrastive_mm.training.accelerator import make_accelerator
from contrastive_mm.training.config import TrainerConfig
from contrastive_mm.training.optimization import build_optimizer, scheduled_rate
from contrastive_mm.training.updater import Updater
from contrastive_mm.views import ViewMaker


class Trainer:
    """Trains a method over batches, with a schedule, a log, checkpoints and exact resume.

    Args:
        method: trained in place.
        make_views: turns a raw batch into views.
        batches: iterable once an epoch, with a length. With ``state_dict`` and ``load_state_dict`` (as
            ``ShuffledBatches`` has) a resumed run also continues its order; ``num_samples`` tells methods and the
            doctor how many samples there are.
        config: the options.
        output: folder of the run; ``metrics.jsonl``, ``checkpoints/`` and ``encoder.safetensors`` go there.

    Raises:
        UserError: ``batches`` is empty; or as ``make_accelerator``.
    """

    def __init__(
        self,
        method: Method,
        make_views: ViewMaker,
        batches: Batches,
        config: TrainerConfig,
        output: Path | str,
    ) -> None:
        self.config = config
        self.output = Path(output)
        self.batches = batches
        samples: int | None = getattr(batches, "num_samples", None)
        if samples is not None:
            method.set_num_samples(samples)
        self.updater = Updater(
            method,
            build_optimizer(method, config),
            make_views,
            make_accelerator(config.precision, config.device),
            config.gradient_clip,
            config.chunk_size,
        )
        self.method = method
        self.total_steps = config.steps or config.epochs * len(self.batches)
        if self.total_steps == 0:
            raise UserError("`batches` is empty: there is nothing to train on.")
        method.set_total_steps(self.total_steps)
        self.step = 0
        self.seconds = 0.0
        self.doctor: Doctor | None = None
        if config.diagnose:
            warmup = int(config.warmup_share * self.total_steps)
            self.doctor = Doctor(config.log_every, self.total_steps, warmup, config.gradient_clip, samples)
            self.updater.on_objective = self._examine
        self.log = MetricsLog(self.output / "metrics.jsonl")
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", config.keep_checkpoints)

    def train(self, resume: bool = False) -> dict[str, float]:
        """Run to the last step.

        Args:
            resume: continue from the newest checkpoint in ``output``, or start where there is none.

        Returns:
            ``steps``, the last ``loss``, training ``seconds`` over all sessions, and the last ``samples_per_second``.

        Raises:
            UserError: ``output`` holds a run that was not taken up.
            TrainingError: the loss or a weight is not finite, or ``batches`` yields nothing; the last checkpoint
                stays as it was.
        """
        self._begin(resume)
        last: dict[str, float] = self.log.last() if self.finished else {}
        samples = 0
        began, before = time.perf_counter(), self.seconds
        bar = progress(total=self.total_steps, initial=self.step, desc=self.output.name, unit="step")
        with bar:
            for batch in self._batches():
                metrics = self._one_step(batch)
                samples += len(next(iter(batch.values())))
                self.seconds = before + time.perf_counter() - began
                if self._is_logged(self.step):
                    rate = samples / (self.seconds - before)
                    last = self._write_metrics(metrics, rate)
                    bar.set_postfix_str(f"loss {last['loss']:.3f}, {rate:.0f} samples/s", refresh=False)
                bar.update()
                if self._is_due(self.config.checkpoint_every):
                    self._save(metrics)
        return {
            "steps": self.step,
            "loss": last.get("loss", float("nan")),
            "seconds": self.seconds,
            "samples_per_second": last.get("samples_per_second", float("nan")),
        }

    def _begin(self, resume: bool) -> None:
        if resume:
            self.restore()
        elif self.step == 0 and (self.checkpoints.paths() or self.log.last()):
            raise UserError(
                f"{self.output} already holds a run. Continue it with train(resume=True), or give another folder."
            )
        self.method.train()
        if self.finished:
            # The last checkpoint may have been written just before a kill, and the encoder not.
            save_encoder(self.method.encoder, self.output / "encoder.safetensors")

    def _batches(self) -> Iterator[Mapping[str, Tensor]]:
        """A batch for each step that is left to do, epoch after epoch."""
        empty = 0
        while not self.finished:
            empty += 1
            for batch in self.batches:
                empty = 0
                yield batch
                if self.finished:
                    return
            # One empty epoch may be the end of the one in which a resumed order was saved.
            if empty == 2:
                raise TrainingError(
                    f"After step {self.step} of {self.total_steps} `batches` yields nothing. {self._kept()} Give what "
                    "can be iterated anew each epoch (a list or a data loader, not a generator), with data in it."
                )

    @property
    def finished(self) -> bool:
        """Whether no step is left to do."""
        return self.step >= self.total_steps

    def _one_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for group in self.updater.optimizer.param_groups:
            group["lr"] = scheduled_rate(self.config, self.step, self.total_steps)
        try:
            metrics = self.updater.step(batch)
        except NotFiniteError as error:
            raise TrainingError(f"Step {self.step + 1}: {error} {self._kept()}") from error
        self.step += 1
        if self.doctor is not None:
            self.doctor.count_step(metrics, self.updater.accelerator.optimizer_step_was_skipped)
        return metrics

    def _examine(self, objective: Objective) -> None:
        if self.doctor is not None and self._is_logged(self.step + 1):
            self.doctor.examine(objective)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step in (1, self.total_steps)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _check_finite(self, metrics: Mapping[str, Tensor]) -> None:
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {self.step}. {self._kept()} Lower --learning-rate, set "
                "--gradient-clip 1.0, or use --precision bf16 instead of fp16."
            )

    def _check_weights(self) -> None:
        broken = [name for name, value in self.method.named_parameters() if not bool(torch.isfinite(value).all())]
        if broken:
            raise TrainingError(
                f"After step {self.step} the weight {broken[0]} holds NaN or infinity, and {len(broken) - 1} more do. "
                f"{self._kept()} Lower --learning-rate, or set --gradient-clip 1.0."
            )

    def _kept(self) -> str:
        saved = self.checkpoints.paths()
        return f"The last checkpoint, {saved[-1]}, is intact." if saved else "No checkpoint was written yet."

    def _write_metrics(self, metrics: Mapping[str, Tensor], rate: float) -> dict[str, float]:
        self._check_finite(metrics)
        values: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        if self.doctor is not None:
            statistics, verdict = self.doctor.report(self.step, values["loss"])
            values = {**statistics, **values}
            if verdict is not None:
                values["diagnosis"] = str(verdict)
                tqdm.write(f"{self.output.name}, step {self.step}: {verdict}", file=sys.stderr)
        line = {
            "step": self.step,
            **values,
            "learning_rate": self.updater.optimizer.param_groups[0]["lr"],
            "samples_per_second": round(rate, 1),
            "seconds": round(self.seconds, 3),
        }
        self.log.append(line)
        return line

    def _save(self, metrics: Mapping[str, Tensor]) -> None:
        self._check_finite(metrics)
        self._check_weights()
        scaler = self.updater.accelerator.scaler
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "method": self.method.state_dict(),
            "optimizer": self.updater.optimizer.state_dict(),
            "optimizer_name": self.config.optimizer,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random_state(),
            "doctor": self.doctor.state_dict() if self.doctor is not None else None,
        }
        for name, part in self._parts().items():
            state[name] = part.state_dict()
        # The encoder first: a kill in between leaves a checkpoint from which it is written again.
        save_encoder(self.method.encoder, self.output / "encoder.safetensors")
        self.checkpoints.save(self.step, state)

    def restore(self) -> None:
        """Take up the newest checkpoint in ``output``; without one, begin at the first step.

        Raises:
            UserError: the checkpoint can't be read, is of other origin, or belongs to another architecture,
                optimizer, length or data order.
        """
        state = self.checkpoints.load_newest()
        if state is None:
            self.log.cut_after(0)
            return
        newest = str(self.checkpoints.paths()[-1])
        self._check_checkpoint(state, newest)
        try:
            self._take_up(state, newest)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"The checkpoint {newest} is damaged ({type(error).__name__}: {error}). Delete it to resume from the "
                "one before it."
            ) from error

    def _take_up(self, state: Mapping[str, Any], newest: str) -> None:
        load_weights(self.method, state["method"], newest)
        self.updater.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.updater.accelerator.scaler is not None:
            self.updater.accelerator.scaler.load_state_dict(state["scaler"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        # A run that goes on with the doctor may have been begun without.
        if self.doctor is not None and state.get("doctor") is not None:
            self.doctor.load_state_dict(state["doctor"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.log.cut_after(self.step)
        restore_random_state(state["random"])

    def _check_checkpoint(self, state: Mapping[str, Any], name: str) -> None:
        needed = ("step", "total_steps", "seconds", "method", "optimizer", "optimizer_name", "scaler", "random")
        missing = [part for part in (*needed, *self._parts()) if part not in state]
        if missing:
            raise UserError(
                f"{name} is no checkpoint of this run: it holds no {missing[0]!r}. Resume with the same data and "
                "views, or move it away to resume from the one before it."
            )
        if state["total_steps"] != self.total_steps:
            raise UserError(
                f"{name} is of a run of {state['total_steps']} steps, this one has {self.total_steps}: the "
                "learning rate's schedule would break. Resume with the same --epochs and --steps."
            )
        if state["optimizer_name"] != self.config.optimizer:
            raise UserError(
                f"{name} holds the state of the optimizer {state['optimizer_name']}, which {self.config.optimizer} "
                f"can't go on from. Resume with --optimizer {state['optimizer_name']}."
            )

    def _parts(self) -> dict[str, Any]:
        """What holds state besides the method and the optimizer."""
        candidates = {"views": self.updater.make_views, "batches": self.batches}
        return {name: part for name, part in candidates.items() if hasattr(part, "state_dict")}
