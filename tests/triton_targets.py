"""Compile the fused form's kernels for GPUs that aren't here; prints a JSON list of what each needs.

Run as ``python triton_targets.py``, without ``TRITON_INTERPRET``; ``python triton_targets.py all`` takes every type on
every target.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from contrastive_mm.losses import availability, fused, kernels

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NUMBERS = ["row_count", "column_count", "count", "dim", "period", "shift", "part", "pairs", "group"]
IDS = ("ids", "row_ids", "column_ids")


def compile_for(kernel, capability, features, constants):
    """Shared memory in bytes, and bytes that registers spill."""
    sizes = fused._sizes(features)
    element = POINTERS[features.dtype]
    constants = {
        "LIMIT": fused.LARGEST_EXPONENT,
        "WIDE": False,
        "HAS_PERIOD": True,
        "HAS_FACTORS": True,
        "PRECISION": fused.PRECISIONS[torch.get_float32_matmul_precision()],
        "BLOCK_D": fused._block_dim(features.shape[1]),
        "BLOCK": sizes.columns,
        "BLOCK_X": sizes.rows,
        "BLOCK_Y": sizes.columns,
        **constants,
    }
    if not constants["HAS_IDS"]:
        constants |= dict.fromkeys(IDS)
    types = dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(IDS, "*i64") | {"x": element, "y": element}
    types["result"] = element
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in signature[name]}
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names}, aligned)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "features": [str(features.dtype), features.shape[1]],
        "shared": compiled.metadata.shared,
        "spilled": sum(int(number) for number in re.findall(r"(\d+) bytes spill stores", said)),
    }


def main():
    views = {"OVER_COLUMNS": True, "OVER_ROWS": True, "VIEWS": True, "NORMALIZED": True, "HAS_IDS": False}
    crossed = views | {"VIEWS": False, "NORMALIZED": False, "HAS_IDS": True}
    online = {"SKIP_BELOW_LIMIT": False, "EXPECTATION": True, "HAS_IDS": True}
    cases = [
        (kernels.half_forward, {"HAS_IDS": False}),
        (kernels.half_forward, {"HAS_IDS": True}),
        (kernels.online_forward, online),
        (kernels.online_forward, online | {"SKIP_BELOW_LIMIT": True, "EXPECTATION": False}),
        (kernels.rows_backward, views),
        (kernels.rows_backward, crossed),
    ]
    targets = [(torch.float32, 90), (torch.bfloat16, 80)]
    if sys.argv[1:] == ["all"]:
        targets = [(dtype, capability) for dtype in availability.LARGEST_DIM for capability in (80, 90)]
    result = []
    for dtype, capability in targets:
        features = torch.empty(1, availability.LARGEST_DIM[dtype], dtype=dtype)
        result += [compile_for(kernel, capability, features, constants) for kernel, constants in cases]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
