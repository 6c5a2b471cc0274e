"""What rival libraries say of the small tensors of ``tests/rivals``: recorded, so that tests need none of them.

    pip install -e ".[rivals]"
    python benchmarks/rival_values.py

Values and gradients of the rivals go to ``tests/data/rival_values.json``, against which ``tests/rivals`` compares ours
everywhere. The printed table has for each case the largest difference from the rival, relative to its value or its
largest gradient, in float64 and in float32. Where the rival's loss is another one, that is the difference which is
left when what explains it is done with our parts, and how far our own loss is from it stands at the end.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "rivals"))

from parity import evaluate  # noqa: E402
from rival_cases import CASES  # noqa: E402
from rival_differences import DIFFERENCES  # noqa: E402

DIGITS = 10


def shortened(numbers: Any) -> Any:
    """Nested lists of numbers with as many digits as are compared."""
    return [shortened(each) for each in numbers] if isinstance(numbers, list) else float(f"{numbers:.{DIGITS}g}")


def table_row(case: Any) -> str:
    rebuilt = getattr(case, "reproduced", None)
    row = f"{case.name:75s}"
    for dtype in (torch.float64, torch.float32):
        row += f" {evaluate(rebuilt or case.ours, dtype).difference(evaluate(case.theirs, dtype)):8.1e}"
    return f"{row} {evaluate(case.ours).difference(evaluate(case.theirs)):8.2f}" if rebuilt else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=ROOT / "tests" / "data" / "rival_values.json")
    options = parser.parse_args()
    versions = {"torch": importlib.metadata.version("torch")}
    lines = []
    for case in (*CASES, *DIFFERENCES):
        versions[case.rival] = importlib.metadata.version(case.rival)
        theirs = evaluate(case.theirs)
        gradients = {name: shortened(gradient.tolist()) for name, gradient in theirs.gradients.items()}
        entry = {"rival": case.rival, "value": shortened(theirs.value), "gradients": gradients}
        lines.append(f"  {json.dumps(case.name)}: {json.dumps(entry)}")
        print(table_row(case))
    head = json.dumps(versions)
    options.result.write_text(
        f'{{\n "versions": {head},\n "cases": {{\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
