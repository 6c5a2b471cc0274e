import base64
import io
import json
import re

import numpy as np
import torch
from PIL import Image

from contrastive_mm import demo
from contrastive_mm.configuration import parse_run
from contrastive_mm.domain import Embeddings
from contrastive_mm.report import Page, loss_plot, map_plot, neighbour_table, score_table, text_table


def picture(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def embeddings(count=40, labels=None, previews=None):
    return Embeddings(torch.randn(count, 5), [str(n) for n in range(count)], labels, previews or ["<b>"] * count)


def test_text_table_lines_up():
    assert text_table(["a", "long head"], [["wide cell", "1"]]) == (
        "a          long head\n---------  ---------\nwide cell  1"
    )


def test_score_table_has_a_metric_a_row():
    headers, rows = score_table({"untrained": {"m": 0.5}, "trained": {"m": 0.75}})
    assert headers == ["metric", "untrained", "trained"]
    assert rows == [["m", "0.500", "0.750"]]


def test_a_loss_curve_is_drawn():
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 20)]
    assert (picture(loss_plot({"run": lines})) != picture(loss_plot({"run": lines[:2]}))).any()


def test_maps_are_drawn_for_every_kind_of_label():
    for labels in (None, [float(n) for n in range(40)], [f"class {n % 13}" for n in range(40)]):
        drawn = picture(map_plot(embeddings(labels=labels), embeddings(labels=labels)))
        colours = len(np.unique(drawn.reshape(-1, 3), axis=0))
        assert colours > 20
    assert picture(map_plot(embeddings(3), embeddings(3))).shape[1] > 500, "a handful of samples too"


def test_features_that_tell_nothing_apart_are_drawn_too():
    for features in (torch.zeros(60, 8), torch.ones(60, 8), torch.randn(60, 1), torch.full((60, 4), torch.nan)):
        same = Embeddings(features, [str(n) for n in range(60)], None, ["x"] * 60)
        assert picture(map_plot(same, same)).shape[1] > 500


def test_names_are_shown_as_they_are():
    odd = [("$\\frac{", "_hidden", "plain")[n % 3] for n in range(40)]
    assert picture(map_plot(embeddings(labels=odd), embeddings(labels=odd))).shape[1] > 500
    assert picture(loss_plot({"$x$": [{"step": 1, "loss": 2.0}]})).shape[1] > 500


def test_neighbours_are_the_nearest_and_text_is_escaped():
    features = torch.eye(4).repeat_interleave(2, 0) + 0.01 * torch.arange(8.0)[:, None]
    table = neighbour_table(Embeddings(features, list("abcdefgh"), None, [f"<{n}>" for n in "abcdefgh"]))
    assert "<a>" not in table
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    for row in rows:
        query, nearest = re.findall(r"&lt;(\w)&gt;", row)[:2]
        assert "abcdefgh".index(query) // 2 == "abcdefgh".index(nearest) // 2


def test_thumbnails_stand_in_the_page():
    image = np.full((8, 8, 3), 7, np.uint8)
    table = neighbour_table(embeddings(6, labels=["x"] * 6, previews=[image] * 6))
    content = re.search(r"base64,([^\"]+)", table).group(1)
    assert (picture(base64.b64decode(content)) == 7).all()


def test_a_page_stands_alone(tmp_path):
    page = Page("A & B")
    page.add_table("T", ["h"], [["<x>"]])
    page.save(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "A &amp; B" in text
    assert "<td>&lt;x&gt;</td>" in text
    assert "http" not in text, "nothing is fetched"


def test_verdict_wants_every_seed():
    values = {demo.UNTRAINED: [1.0, 1.0], demo.RAW: [2.0, 3.0], demo.TRAINED: [2.5, 2.5]}
    assert demo._verdict(values) == "untrained encoder only"
    values[demo.TRAINED] = [4.0, 4.0]
    assert demo._verdict(values) == "both"
    values[demo.TRAINED] = [0.0, 4.0]
    assert demo._verdict(values) == "neither"


def test_the_demo_prints_its_table_and_draws_its_report(tmp_path, monkeypatch, capsys):
    short = {"vision": ["--image-size=8"], "nlp": [], "rl": ["--frames=400"]}

    def shortened(domain, arguments):
        return parse_run(domain, [*arguments, "--steps=4", "--batch-size=64", *short[domain]])

    monkeypatch.setattr(demo, "parse_run", shortened)
    report = demo.run_demo(tmp_path / "demo", seeds=2)
    said = capsys.readouterr().out
    for word in ("few_label_accuracy_10", "mean_average_precision", "r2_angle", "raw-input baseline", "±"):
        assert word in said
    page = report.read_text()
    assert page.count("<h2>") == 3
    assert page.count("<figure>") == 6
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert len(results["nlp"]["scores"]["trained encoder"]) == 2
    demo.run_demo(tmp_path / "demo", seeds=1)
