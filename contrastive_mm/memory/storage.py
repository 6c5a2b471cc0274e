"""Where a bank's rows lie, and how they come to the device that trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_mm.errors import UserError


class StoredRows(nn.Module):
    """Columns of rows that outlive a batch; what ``FeatureQueue`` and ``InstanceBank`` have in common.

    The columns are in ``state_dict`` without being buffers. DistributedDataParallel sends every
    buffer from the first process to the others at each forward: megabytes for nothing where a bank is the same on
    all of them already, and NCCL can't send rows that lie on the CPU. A cast of the module around the bank leaves
    the bank's own dtype alone.

    Args:
        columns: the content at the start, one tensor a column, all of the same length.
        device: None moves the rows with the module. ``"cpu"`` leaves them on the CPU when the module moves to
            an accelerator, and copies what is read over to it.

    Raises:
        UserError: another device; in ``load_state_dict``, columns of another shape.
    """

    def __init__(self, columns: Mapping[str, Tensor], device: str | None) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise UserError(
                f"A bank's device is {device!r}; it must be 'cpu' (its rows stay there) or None (they move with the "
                "module: bank.to(device))."
            )
        self._columns = dict(columns)
        self._stays_on_cpu = device == "cpu"
        # The device of the module around the bank: rows are handed out there.
        self._home = torch.device("cpu")
        self._copies: dict[str, tuple[Tensor, torch.cuda.Event | None]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the features are kept and read."""
        return self._columns["features"].dtype

    def prefetch(self) -> None:
        """Start to copy the filled rows to the module's device; reading them then waits for what is left of it.

        For rows kept on the CPU: call it after the last write of a step, and the copy runs beside the next
        batch's forward (on a GPU of its own stream, from pinned memory). The next write drops the copy, so that
        what is read is never out of date. Rows that are on the device already need none.
        """
        if self._stays_on_cpu and self._home.type != "cpu":
            for name, column in self._columns.items():
                self._copies[name] = _start_copy(column[: len(self)], self._home)

    def _read(self, name: str) -> Tensor:
        """A column's filled rows on the module's device: a view of the storage where it lies there."""
        column = self._column(name)
        if column.device == self._home:
            return column[: len(self)]
        # Kept until the next write: micro-batches of one step share one copy.
        if name not in self._copies:
            self._copies[name] = _start_copy(column[: len(self)], self._home)
        return _finish_copy(*self._copies[name])

    def _column_to_write(self, name: str) -> Tensor:
        """A column's storage, safe to write: no copy of it is under way, and none is kept."""
        _, copied = self._copies.pop(name, (None, None))
        if copied is not None:
            copied.synchronize()
        return self._column(name)

    def _column(self, name: str) -> Tensor:
        column = self._columns[name]
        if column.is_inference() and not torch.is_inference_mode_enabled():
            # Made or copied under inference_mode, where nothing outside it may write or save it for backward.
            column = self._columns[name] = column.clone()
        return column

    def _start_anew(self) -> None:
        """Set the content to that of a new bank; the columns hold whatever was in their memory."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredRows:
        super()._apply(fn, recurse)
        # Whatever `fn` does (a move, a cast, both), an empty tensor shows where it moves to.
        self._home = fn(torch.empty(0, device=self._home)).device
        emptied = any(column.is_meta for column in self._columns.values()) and self._home.type != "meta"
        for name in self._columns:
            column = self._column_to_write(name)
            if emptied:  # to_empty: rows without content become rows whose content is left open
                self._columns[name] = torch.empty_like(column, device=self._home)
            elif not self._stays_on_cpu:
                self._columns[name] = column.to(self._home)
            elif self._home.type == "cuda" and not column.is_pinned():
                self._columns[name] = column.pin_memory()
        if emptied:
            self._start_anew()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: column for name, column in self._columns.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, column in self._columns.items():
            # Taken out, or torch would call it unexpected below; the caller's dict is not this one.
            saved = state_dict.pop(prefix + name, None)
            if saved is None:
                missing_keys.append(prefix + name)
            elif saved.shape != column.shape:
                raise UserError(
                    f"The saved {prefix}{name} has shape {tuple(saved.shape)}, this {type(self).__name__}'s "
                    f"{tuple(column.shape)}: make it with the size and dim that it was saved with."
                )
            else:
                self._column_to_write(name).copy_(saved)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __len__(self) -> int:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # Copies under way belong to this process and this object; a pickled or deep-copied bank makes its own.
        return {**self.__dict__, "_copies": {}}


def check_size(kind: str, size: int, dim: int, dtype: torch.dtype) -> None:
    """Raise UserError for a bank that can't hold features."""
    if size < 1 or dim < 1:
        raise UserError(f"{kind} needs size and dim of at least 1; got size={size}, dim={dim}.")
    if not dtype.is_floating_point:
        raise UserError(f"{kind} can't keep features as {dtype}; use a floating-point dtype such as torch.float16.")


def check_rows(kind: str, dim: int, features: Tensor, ids: Tensor | None) -> None:
    """Raise UserError for rows that a bank of ``dim`` dimensions can't take up."""
    if features.ndim != 2:
        raise UserError(f"`features` has shape {tuple(features.shape)}; {kind} takes a matrix of (rows, dimensions).")
    if features.shape[1] != dim:
        raise UserError(f"`features` has {features.shape[1]} dimensions, but {kind} holds {dim}.")
    if not features.is_floating_point():
        raise UserError(f"`features` holds {features.dtype}; {kind} keeps floating point: call .float().")
    # On a GPU the values are not looked at, which would wait for the device at every step.
    if features.device.type == "cpu" and not bool(torch.isfinite(features.detach().sum())):
        rows = (~torch.isfinite(features.detach())).any(dim=1).nonzero().flatten().tolist()
        if rows:
            raise UserError(f"`features` holds NaN or infinity in row {rows[0]}, which would stay in {kind}.")
    if ids is not None:
        if ids.ndim != 1:
            raise UserError(f"`ids` has shape {tuple(ids.shape)}; give one number a row.")
        if len(ids) != len(features):
            raise UserError(f"`ids` has {len(ids)} entries, but `features` has {len(features)} rows.")
        check_whole(ids)


def check_whole(ids: Tensor) -> None:
    """Raise UserError for ids of a type that can't number anything."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"`ids` holds {ids.dtype}; it names samples or classes and must be whole numbers.")


def _start_copy(rows: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    if device.type != "cuda":
        return rows.to(device), None
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        copied = rows.to(device, non_blocking=True)
    return copied, stream.record_event()


def _finish_copy(copied: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        reader = torch.cuda.current_stream(copied.device)
        reader.wait_event(event)
        # Made on another stream: without this its memory could be given out again while it is being read.
        copied.record_stream(reader)
    return copied


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: the allocator keeps freed memory by stream."""
    return torch.cuda.Stream(device)
