"""The one training loop of every domain, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
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
from contrastive_mm.views import ViewMaker

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainerConfig:
    """How a method is trained, in any domain."""

    epochs: int = 100
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps; takes the place of epochs where it is given."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation layers."""
    warmup_share: float = 0.05
    """Part of the run in which the learning rate rises linearly; a cosine to 0 follows."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    precision: Precision = "no"
    """Mixed precision: bf16 on newer CPUs and GPUs, fp16 (with gradient scaling) on GPUs. Losses stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    seed: int = 0
    """Decides initial weights, data order, views and dropout."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    diagnose: bool = True
    """Watch for collapse and other failures: log the geometry of the features and say in one line what is wrong."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} = {value}; it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate = {self.learning_rate}; it must be a number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay = {self.weight_decay}; it must be 0 or above.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise UserError(f"--gradient-clip = {self.gradient_clip}; it must be above 0. Leave it out not to clip.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed = {self.seed}; it must lie between 0 and 2^63 - 1.")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"--warmup-share = {self.warmup_share}; it must lie in [0, 1).")


def make_accelerator(precision: Precision = "no", device: Literal["auto", "cpu"] = "auto") -> Accelerator:
    """An Accelerator for one process.

    Accelerate keeps one precision and one device for all Accelerators of a process. Where another one is asked for
    here, those that were made before go over to it too: finish with one before the next, as the demo does.

    Raises:
        UserError: fp16 without a GPU, or a launch with several processes, which this version does not train in.
    """
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--precision fp16 needs a GPU; on this device use bf16 or no.")
    known = AcceleratorState._shared_state
    if known and (known.get("_mixed_precision") != precision or known.get("_cpu") != (device == "cpu")):
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
    if accelerator.num_processes > 1:
        raise UserError(
            f"Launched with {accelerator.num_processes} processes, but this version trains in one: negatives are "
            "not yet shared among processes. Start it without `accelerate launch`."
        )
    return accelerator


def build_optimizer(method: nn.Module, config: TrainerConfig) -> Optimizer:
    """AdamW or SGD over the trainable parameters, without weight decay on biases and normalisation layers."""
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def scheduled_rate(config: TrainerConfig, step: int, total: int) -> float:
    """Learning rate of step 0..total-1: a linear warm-up, then half a cosine down towards 0."""
    warmup = int(config.warmup_share * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


class Updater:
    """One optimizer step of a method on one raw batch, for loops of your own (an agent's update, say).

    Args:
        method: trained in place; moved to the accelerator's device.
        optimizer: over the method's parameters.
        make_views: turns a raw batch into views.
        accelerator: device and precision; by default float32 on the GPU where there is one.
        gradient_clip: largest norm of the gradient.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        make_views: ViewMaker,
        accelerator: Accelerator | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator()
        self.method = method
        self.make_views = make_views
        self.gradient_clip = gradient_clip
        self.on_objective: Callable[[Objective], None] | None = None
        """Called with each step's objective before anything is updated; it may read and must not write."""
        self._forward: nn.Module = self.accelerator.prepare(method)
        self.optimizer: Any = self.accelerator.prepare(optimizer)

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views, objective, backward, optimizer, then the method's ``after_step``.

        Args:
            batch: the raw batch; moved to the device here.

        Returns:
            The loss and the method's metrics as detached scalars, still on the device.
        """
        views = self.make_views(send_to_device(batch, self.accelerator.device))
        objective = self._forward(views)
        if self.on_objective is not None:
            self.on_objective(objective)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(objective.loss)
        metrics = {"loss": objective.loss.detach(), **objective.metrics}
        if self.gradient_clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.method.parameters(), self.gradient_clip)
            metrics["gradient_norm"] = torch.as_tensor(norm)
        self.optimizer.step()
        self.method.after_step()
        return metrics


class Trainer:
    """Trains a method over batches, with a schedule, a log, checkpoints and exact resume.

    Args:
        method: trained in place.
        make_views: turns a raw batch into views.
        batches: iterable once an epoch, with a length; with ``state_dict`` and ``load_state_dict`` (as
            ``ShuffledBatches`` has) a resumed run also continues its order.
        config: the options.
        output: folder of the run; ``metrics.jsonl``, ``checkpoints/`` and ``encoder.safetensors`` go there.

    Raises:
        UserError: as ``make_accelerator``.
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
        self.updater = Updater(
            method,
            build_optimizer(method, config),
            make_views,
            make_accelerator(config.precision, config.device),
            config.gradient_clip,
        )
        self.method = method
        self.total_steps = config.steps or config.epochs * len(self.batches)
        method.set_total_steps(self.total_steps)
        self.step = 0
        self.seconds = 0.0
        self.doctor: Doctor | None = None
        if config.diagnose:
            warmup = int(config.warmup_share * self.total_steps)
            self.doctor = Doctor(config.log_every, self.total_steps, warmup, config.gradient_clip)
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
            TrainingError: the loss or a weight is not finite; the last checkpoint stays as it was.
        """
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
        last: dict[str, float] = self.log.last() if self.finished else {}
        samples = 0
        began, before = time.perf_counter(), self.seconds
        bar = progress(total=self.total_steps, initial=self.step, desc=self.output.name, unit="step")
        with bar:
            while self.step < self.total_steps:
                for batch in self.batches:
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
                    if self.step == self.total_steps:
                        break
        return {
            "steps": self.step,
            "loss": last.get("loss", float("nan")),
            "seconds": self.seconds,
            "samples_per_second": last.get("samples_per_second", float("nan")),
        }

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
            UserError: the checkpoint can't be read, or belongs to another architecture, length or data order.
        """
        state = self.checkpoints.load_newest()
        if state is None:
            self.log.cut_after(0)
            return
        newest = str(self.checkpoints.paths()[-1])
        if state["total_steps"] != self.total_steps:
            raise UserError(
                f"{newest} is of a run of {state['total_steps']} steps, this one has {self.total_steps}: the "
                "learning rate's schedule would break. Resume with the same --epochs and --steps."
            )
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

    def _parts(self) -> dict[str, Any]:
        """What holds state besides the method and the optimizer."""
        candidates = {"views": self.updater.make_views, "batches": self.batches}
        return {name: part for name, part in candidates.items() if hasattr(part, "state_dict")}
