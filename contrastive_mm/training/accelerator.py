"""Device and precision, by Hugging Face Accelerate."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from contrastive_mm.errors import UserError
from contrastive_mm.training.allocation import keep_freed_memory
from contrastive_mm.training.config import Precision


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
            f"Launched with {accelerator.num_processes} processes, but this version trains in one: batches are "
            "not yet divided among processes. Start it without `accelerate launch`."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def current_device() -> torch.device:
    """The device that this process trains on: the last Accelerator's, or the CPU where there is none yet."""
    device: torch.device = PartialState._shared_state.get("device", torch.device("cpu"))
    return device
