"""What the README and the architecture page say is true."""

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_architecture_page_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^    ((?:contrastive_mm|vision|nlp|rl|benchmarks|tests)/[\w./]+)", page, re.MULTILINE)
    assert len(files) > 15
    for file in files:
        assert (ROOT / file).exists(), file


def test_figures_in_the_readme_are_in_the_raw_results():
    import json

    for name, pattern in (("cifar10_simclr", r"\| CIFAR-10.*?\|\s*$"),):
        scores = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["scores"]
        row = re.search(pattern, README, re.MULTILINE).group(0)
        for representation in ("untrained encoder", "raw input", "trained encoder"):
            assert f"{100 * scores[representation]['knn_accuracy']:.1f}" in row


def test_loss_ratios_in_the_readme_are_those_of_the_raw_results():
    import json

    cells = json.loads((ROOT / "benchmarks" / "results" / "losses.json").read_text())["cells"]
    shown = {
        int(row[0].replace(",", "")): row[1] for row in re.findall(r"^\| ([\d,]+) \| (\d.*)$", README, re.MULTILINE)
    }
    for cell in cells:
        if not cell["group"].startswith("NT-Xent") or cell["samples"] not in shown:
            continue
        own = cell["median"]["contrastive_mm"], cell["peak_mib"]["contrastive_mm"]
        columns = [column.strip() for column in shown[cell["samples"]].split("|")][1:4]
        for name, column in zip(("plain", "plain, compiled", "lightly"), columns, strict=True):
            if column:
                time, memory = (float(part) for part in re.findall(r"([\d.]+)x", column))
                assert cell["median"][name] / own[0] == pytest.approx(time, rel=0.02)
                assert cell["peak_mib"][name] / own[1] == pytest.approx(memory, rel=0.05)
    assert set(shown) == {2048, 8192, 32768}
