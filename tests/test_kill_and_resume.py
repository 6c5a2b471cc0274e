"""A run killed without warning and resumed is the run that was never killed, through the command line."""

import subprocess
import sys
import time

import pytest

from contrastive_mm.checkpoint import CheckpointFolder
from contrastive_mm.metrics import read_metrics

STEPS = 60


def start(output, method, *more):
    options = ["--image-size=8", "--batch-size=64", f"--steps={STEPS}", "--log-every=1", "--checkpoint-every=7"]
    command = [sys.executable, "-m", "contrastive_mm.vision", f"--output={output}", *more]
    if not more:
        command += [f"--method={method}", "--data=digits", *options]
        command += ["--queue-size=200"] if method == "moco" else []
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def logged(output):
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: line[key] for key in ("step", "loss", "learning_rate", "positive_similarity")} for line in lines]


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_kill_nine_and_resume_gives_the_same_losses(tmp_path, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, problem = (process := start(whole, method)).communicate(timeout=300)
    assert process.returncode == 0, problem
    process = start(killed, method)
    deadline = time.monotonic() + 120
    while not CheckpointFolder(killed / "checkpoints").paths() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    stopped_at = len(logged(killed))
    assert 7 <= stopped_at < STEPS, "killed too early or too late to show anything"
    _, problem = (process := start(killed, method, "--resume")).communicate(timeout=300)
    assert process.returncode == 0, problem
    assert logged(killed) == logged(whole)
    assert (killed / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
