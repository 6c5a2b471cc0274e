import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from PIL import Image

from contrastive_mm.cli import main

DIGITS = ["--data=digits", "--image-size=8", "--batch-size=64", "--steps=6", "--log-every=1"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_pretrain_evaluate_embed(tmp_path, capsys):
    output = tmp_path / "run"
    assert run("vision", *DIGITS, f"--output={output}") == 0
    assert "contrastive-mm evaluate" in capsys.readouterr().out
    assert run("evaluate", output) == 0
    table = capsys.readouterr().out
    for word in ("untrained encoder", "raw input", "trained encoder", "knn_accuracy", "linear_probe_accuracy"):
        assert word in table
    scores = json.loads((output / "evaluation.json").read_text())["scores"]
    assert scores["trained encoder"] != scores["untrained encoder"]
    page = (output / "report.html").read_text()
    assert page.count("data:image/png") > 10
    out = tmp_path / "features.parquet"
    assert run("embed", output, "digits", "--out", out) == 0
    features = pq.read_table(out)
    assert features.column_names == ["id", "label", "embedding"]
    assert len(features) == 1797
    assert len(features.column("embedding")[0].as_py()) == 256


def test_an_output_that_holds_a_run_is_not_touched(tmp_path, capsys):
    output = tmp_path / "run"
    assert run("vision", *DIGITS, f"--output={output}") == 0
    before = (output / "metrics.jsonl").read_text()
    assert run("vision", *DIGITS, f"--output={output}") == 2
    said = capsys.readouterr().err
    assert "already holds a run" in said
    assert "--resume" in said
    assert (output / "metrics.jsonl").read_text() == before
    assert run("vision", *DIGITS, f"--output={output}", "--overwrite") == 0


def test_overwrite_spares_the_run_until_the_new_one_can_start(tmp_path, capsys):
    output = tmp_path / "run"
    assert run("vision", *DIGITS, f"--output={output}") == 0
    (output / "notes.txt").write_text("mine")
    before = (output / "encoder.safetensors").read_bytes()
    assert run("vision", "--data=digitz", f"--output={output}", "--overwrite") == 2
    assert (output / "encoder.safetensors").read_bytes() == before
    assert run("vision", *DIGITS, "--seed=5", f"--output={output}", "--overwrite") == 0
    assert (output / "encoder.safetensors").read_bytes() != before
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 6
    assert (output / "notes.txt").read_text() == "mine"


def test_other_data_get_a_report_of_their_own(tmp_path, capsys):
    output = tmp_path / "run"
    assert run("vision", *DIGITS, f"--output={output}") == 0
    assert run("evaluate", output) == 0
    own = (output / "evaluation.json").read_text()
    assert json.loads(own)["step"] == 6
    for number in range(30):
        Image.fromarray(np.full((8, 8, 3), 8 * number, np.uint8)).save(tmp_path / f"{number}.png")
    assert run("evaluate", output, "--data", tmp_path) == 0
    assert (output / "evaluation.json").read_text() == own
    assert len(list(output.glob("evaluation-*.json"))) == len(list(output.glob("report-*.html"))) == 1


def test_a_run_with_another_encoder_is_refused(tmp_path, capsys):
    output = tmp_path / "run"
    assert run("vision", *DIGITS, f"--output={output}") == 0
    assert run("vision", f"--output={output}", "--resume", "--encoder=resnet18") == 2
    assert "belongs to another architecture" in capsys.readouterr().err
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text.replace("small-conv", "resnet18"))
    assert run("evaluate", output) == 2
    assert "belongs to another architecture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vison"], "Did you mean 'vision'"),
        (["vision", "--method=simcrl", "--data=digits"], "Did you mean 'simclr'"),
        (["vision", "--data=digitz"], "Did you mean 'digits'"),
        (["vision"], "--data is missing"),
        (["vision", "--data=./nowhere/at/all"], "does not exist"),
        (["vision", "--data=digits", "--encoder=resnet81"], "Did you mean 'resnet18'"),
        (["vision", "--data=digits", "--batch-size=5000"], "batch_size = 5000"),
        (["vision", "--data=digits", "--precision=fp16", "--device=cpu"], "fp16 needs a GPU"),
        (["vision", "--resume"], "--resume needs --output"),
        (["vision", "--resume", "--output=nowhere"], "no run to resume"),
        (["evaluate", "nowhere"], "holds no run"),
        (["rl", "--data=CartPole-v9"], "CartPole"),
        (["rl", "--data=KartPole-v1"], "Did you mean 'CartPole-v1'"),
        (["nlp", "--data=nowhere.txt"], "nowhere.txt is not a file"),
        (["nlp", "--data=pydoc-topics", "--encoder=./no-such-model"], "No Hugging Face encoder"),
        (["vision", "--data=digits", "--temperature=-1"], "--temperature = -1"),
        (["demo", "--seeds=0"], "--seeds = 0"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir()), "a failed start leaves nothing"


def test_the_text_verbs(tmp_path, capsys):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("".join(f"The number {n} is followed by {n + 1}.\n" for n in range(80)))
    output = tmp_path / "run"
    options = ["--batch-size=16", "--steps=4", "--vocabulary=200"]
    assert run("nlp", f"--data={sentences}", f"--output={output}", *options) == 0
    assert run("evaluate", output) == 0
    assert "uniformity" in capsys.readouterr().out
    assert run("nlp", "embed", output, sentences, "--out", tmp_path / "f.parquet") == 0
    features = pq.read_table(tmp_path / "f.parquet")
    assert features.column("id")[:2].to_pylist() == ["line 1", "line 2"]
    assert len(features) == 80


def test_the_observation_verbs(tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--data=CartPole-v1", "--frames=120", "--frame-size=36", "--crop-size=32", "--batch-size=16"]
    assert run("rl", *options, "--steps=4", f"--output={output}") == 0
    assert run("evaluate", output) == 0
    assert "r2_angle" in capsys.readouterr().out
    assert run("rl", "embed", output, "CartPole-v1", "--out", tmp_path / "f.parquet") == 0
    assert len(pq.read_table(tmp_path / "f.parquet")) == 120


def test_help_needs_no_torch_and_import_no_domain():
    code = (
        "import sys, contrastive_mm, contrastive_mm.cli\n"
        "contrastive_mm.cli.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'gymnasium', 'matplotlib', 'contrastive_mm.vision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).returncode == 0


def test_each_domain_loads_without_the_others():
    for domain, foreign in {"vision": ["transformers", "gymnasium"], "rl": ["transformers", "torchvision"]}.items():
        code = (
            f"import sys; from contrastive_mm.domain import load_domain; load_domain({domain!r})\n"
            f"assert not set({foreign!r}) & set(sys.modules), set({foreign!r}) & set(sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_names_at_the_top_are_found():
    import contrastive_mm

    for name in contrastive_mm.__all__:
        assert getattr(contrastive_mm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = contrastive_mm.Nothing
    assert torch.is_tensor(contrastive_mm.nt_xent(torch.randn(2, 3), torch.randn(2, 3)))


def test_a_domain_has_commands_of_its_own_and_names_them(monkeypatch, capsys):
    from contrastive_mm.vision.domain import ImageDomain

    monkeypatch.setattr(ImageDomain, "commands", {"count": "test_cli:count_letters"}, raising=False)
    assert run("vision", "count", "abcd", "--times", 2) == 0
    assert capsys.readouterr().out == "8\n"
    assert run("nlp", "count", "abcd") == 2
    assert "Unknown command of nlp 'count'. Known: embed, evaluate." in capsys.readouterr().err


def count_letters(word: tyro.conf.Positional[str], times: int = 1) -> None:
    """Count letters."""
    print(len(word) * times)
