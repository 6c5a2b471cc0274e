"""In several processes the averaged gradients are those of one process with the whole batch; no factor anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_mm.distributed import gather_rows, gather_with_gradient, process_count

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module", params=[2, 3])
def ratios(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(request.param), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(request.param)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return json.loads((folder / "ratios.json").read_text())


def test_gradients_are_those_of_one_process(ratios):
    assert len(ratios) == 23 + 9 * 7
    for case, (projection, difference, temperature) in ratios.items():
        assert projection == pytest.approx(1.0, abs=1e-9), case
        assert difference < 1e-9, case
        assert temperature == pytest.approx(1.0, abs=1e-9), f"{case}: the temperature's gradient"


def test_one_process_gathers_nothing():
    features = torch.randn(3, 2)
    gathered = gather_with_gradient(features)
    assert process_count() == 1
    assert gathered.rows is features
    assert (gathered.offset, gathered.mean_rows) == (0, 3.0)
    assert torch.equal(gather_rows(torch.arange(3)), torch.arange(3))
