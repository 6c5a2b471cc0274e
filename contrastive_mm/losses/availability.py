"""Where the fused form runs: what its kernels take, and whether they have been seen to be right."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings

import torch
from torch import Tensor

from contrastive_mm.losses import fused
from contrastive_mm.losses.exclusion import Exclusion

LARGEST_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
"""Longer rows don't fit into registers beside a tile; they are left to the tiled form, and so are other types."""

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first GPUs with bfloat16 and TensorFloat32."""


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; torch brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


def fits(features: Tensor) -> bool:
    """Whether the kernels take such features: their type, dimensions and device."""
    if features.shape[1] > LARGEST_DIM.get(features.dtype, 0) or not has_triton():
        return False
    if features.device.type != "cuda":
        return features.device.type == "cpu" and fused.is_interpreted()
    # AMD's builds of torch call their GPUs "cuda" too.
    return torch.version.hip is None and torch.cuda.get_device_capability(features.device) >= OLDEST_CAPABILITY


@functools.cache
def is_trusted(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernels compile here and agree with the plain form on a small example; a warning where not.

    It runs once for each device, type and number of dimensions, and compiles what is then used.
    """
    try:
        wrong = _largest_error(device, dtype, dim)
    except Exception as error:  # whatever a compiler or driver raises, the tiled form still works
        warnings.warn(
            f"The Triton kernels don't run on {device} with {dtype}, D = {dim} ({type(error).__name__}: {error}); the "
            "tiled form is used instead. It is slower, with the same values.",
            stacklevel=2,
        )
        return False
    # TensorFloat32 and shares in bfloat16 stay far below it, any wrong tile is far above.
    if wrong < 0.05:
        return True
    warnings.warn(
        f"The Triton kernels give wrong values on {device} with {dtype}, D = {dim} (an error of {wrong:.2g}); the "
        "tiled form is used instead. Please report it with your versions of torch, Triton and the driver.",
        stacklevel=2,
    )
    return False


def _largest_error(device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Of every kernel on a small example, at a temperature for each forward kernel; relative to what is right."""
    features = torch.randn(96, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    by_logsumexp = torch.linspace(0.5, 1.5, 96, device=device)
    by_positive = torch.linspace(-1.5, -0.5, 48, device=device)
    errors = []
    for inverse_temperature in (10.0, 100.0):
        scale = torch.tensor([inverse_temperature], device=device)
        found = fused.views_forward(features, scale, True, 96)
        saved, gradients = (found.logsumexp, found.factors), (by_logsumexp, by_positive)
        by_features, _ = fused.views_backward(features, scale, True, 96, saved, gradients)
        expected_key = fused.cross_forward(features, features[:80], Exclusion(), False, True)[2]
        with torch.enable_grad():
            wide = features.double().requires_grad_()
            rows = torch.nn.functional.normalize(wide, dim=1) * scale.double().sqrt()
            logsumexp = (rows @ rows.T).fill_diagonal_(-math.inf).logsumexp(1)
            positive = (rows[:48] * rows[48:]).sum(1)
            total = (logsumexp * by_logsumexp).sum() + (positive * by_positive).sum()
            (right,) = torch.autograd.grad(total, wide)
        shares = (features.double() @ features[:80].double().T).softmax(1)
        for mine, true in (
            (found.logsumexp, logsumexp),
            (found.positive, positive),
            (by_features, right),
            (expected_key, shares @ features[:80].double()),
        ):
            errors.append(float(((mine - true).abs().max() / true.abs().max()).detach()))
    # A value that is not a number is as wrong as can be.
    return max(math.inf if math.isnan(error) else error for error in errors)
