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

    result = json.loads((ROOT / "benchmarks" / "results" / "losses.json").read_text())
    cells = {(cell["group"].split(",")[0].split(" (")[0], cell["samples"]): cell for cell in result["cells"]}
    groups = {"InfoNCE, both ways": "InfoNCE both ways", "InfoNCE, one way": "InfoNCE one way"}
    libraries = {"open_clip": "open_clip_torch"}
    rows = re.findall(r"^\| ((?:NT-Xent|InfoNCE)[^|]*) \| ([\d,]+) \| ([^|]*) \|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == 8
    compared = 0
    for loss, samples, own, others in rows:
        group = "InfoNCE" if "queue" in loss else groups.get(loss, loss)
        cell = cells[group, int(samples.replace(",", ""))]
        seconds, mebibytes = cell["median"]["contrastive_mm"], cell["peak_mib"]["contrastive_mm"]
        shown, unit = re.match(r"([\d.]+) (ms|s)", own).groups()
        assert seconds == pytest.approx(float(shown) * (0.001 if unit == "ms" else 1), rel=0.03)
        if "MiB" in own:
            assert mebibytes == pytest.approx(float(re.search(r"([\d.]+) MiB", own).group(1)), rel=0.06)
        plain, compiled, rivals = others.split("|")
        told = {"plain": plain, "plain, compiled": compiled}
        for rival in filter(None, (part.strip() for part in rivals.split(";"))):
            name, version, kind, ratios = re.fullmatch(r"(\S+) ([\d.]+)(, cached)?: (.*)", rival).groups()
            assert version == result["versions"][libraries.get(name, name)]
            told[name + (kind or "")] = ratios
        for name, ratios in told.items():
            found = [float(ratio) for ratio in re.findall(r"([\d.]+)x", ratios)]
            for ratio, figures, mine in zip(found, ("median", "peak_mib"), (seconds, mebibytes), strict=False):
                assert cell[figures][name] / mine == pytest.approx(ratio, rel=0.06)
                compared += 1
    assert compared == 32
