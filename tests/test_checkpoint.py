import random
import resource

import numpy as np
import pytest
import torch
from torch import nn

from contrastive_mm.checkpoint import (
    CheckpointFolder,
    load_encoder,
    load_weights,
    random_state,
    restore_random_state,
    save_encoder,
    write_atomically,
)
from contrastive_mm.errors import UserError
from contrastive_mm.metrics import MetricsLog, read_metrics


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_and_the_old_file_stays(tmp_path, monkeypatch):
    path = CheckpointFolder(tmp_path).save(1, {"step": 1})
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    try:
        for write in (
            lambda: CheckpointFolder(tmp_path).save(1, {"weights": torch.zeros(1 << 16)}),
            lambda: save_encoder(nn.Linear(1 << 8, 1 << 8), tmp_path / "encoder.safetensors"),
            lambda: MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "text": "x" * (1 << 14)}),
        ):
            with pytest.raises(UserError, match=r"can't be written \(.*File too large.*Make room on the disk"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} <= {path.name, "metrics.jsonl"}


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02N.", b"\0" * 999])
def test_bytes_that_are_no_checkpoint_are_named(tmp_path, content):
    (tmp_path / "step-000000001.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"step-000000001.pt (can't be read \(.+\)|is no checkpoint)"):
        CheckpointFolder(tmp_path).load_newest()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    layer = nn.Linear(2, 2)
    layer.bias.data[1] = float("nan")
    save_encoder(layer, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"encoder.safetensors: bias holds NaN or infinity"):
        load_encoder(nn.Linear(2, 2), tmp_path / "encoder.safetensors")


def test_lines_of_a_log_that_are_none_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[1]\nnull\n"x"\n\xff\xfe\n{"step": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_only_the_newest_checkpoints_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (9, 10, 100):
        folder.save(step, {"step": step})
    assert [path.name for path in folder.paths()] == ["step-000000010.pt", "step-000000100.pt"]
    assert folder.load_newest() == {"step": 100}


def test_a_broken_checkpoint_is_named(tmp_path):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(3, {"weights": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"step-000000003\.pt can't be read"):
        folder.load_newest()


class Malicious:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_a_checkpoint_can_not_run_code(tmp_path, capsys):
    torch.save({"step": Malicious()}, tmp_path / "step-000000001.pt")
    with pytest.raises(UserError, match="can't be read"):
        CheckpointFolder(tmp_path).load_newest()
    assert "this code ran" not in capsys.readouterr().out


def test_random_state_comes_back_in_every_generator(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn()

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_an_encoder_comes_back_from_safetensors(tmp_path):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    load_encoder(other, tmp_path / "encoder.safetensors")
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in other.state_dict().items())


def test_another_architecture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"another architecture: 0\.weight has shape \(2, 3\), this model \(2, 4\)"):
        load_weights(nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 2)).state_dict(), "file")
    with pytest.raises(UserError, match=r"1\.weight is missing"):
        load_weights(
            nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(4, 2)).state_dict(), "file"
        )
    with pytest.raises(UserError, match="has this run saved an encoder"):
        load_encoder(nn.Linear(1, 1), tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        load_encoder(nn.Linear(1, 1), tmp_path / "broken.safetensors")


def test_the_log_drops_later_steps_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.cut_after(2)
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2]
    log.append({"step": 3, "loss": 1.0})
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3]
