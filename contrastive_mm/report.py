"""Pictures and tables of runs: one HTML file that opens from the disk, and aligned text for the terminal."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from contrastive_mm.checkpoint import write_atomically
from contrastive_mm.domain import Embeddings

MAP_POINTS = 500
MAP_COLOURS = 10
NEIGHBOUR_QUERIES = 6
NEIGHBOURS = 5
THUMBNAIL_SIDE = 56

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
figure { margin: 0; background: #fff; border-radius: 6px; padding: .4rem; }
figure img { max-width: 100%; display: block; margin: auto; }
.thumbnails img { image-rendering: pixelated; border-radius: 4px; display: block; }
.thumbnails td { border: 0; padding: .2rem .4rem; font-size: .8rem; }
.query { border-right: 3px solid var(--line) !important; font-weight: 600; }
.sentences td { font-size: .9rem; min-width: 12rem; } small { opacity: .7; }
"""


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: columns as wide as their longest cell."""
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = "  ".join(cell.ljust(width) for cell, width in zip(headers, widths, strict=True)).rstrip()
    return "\n".join([head, "  ".join("-" * width for width in widths), *lines])


def score_table(scores: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a metric a row, a representation a column."""
    representations = list(scores)
    metrics = list(scores[representations[0]])
    rows = [[metric, *(f"{scores[name][metric]:.3f}" for name in representations)] for metric in metrics]
    return ["metric", *representations], rows


class Page:
    """A report in the making.

    Args:
        title: heading of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def add_heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def add_table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of text."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
        cells = [[html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;") for cell in row] for row in rows]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        self.add_html(title, f"<table><tr>{head}</tr>{body}</table>")

    def add_picture(self, title: str, png: bytes) -> None:
        """Add a PNG, kept inside the page."""
        name = html.escape(title)
        picture = f'<figure><img alt="{name}" src="data:image/png;base64,{_base64(png)}"></figure>'
        self._parts.append(f"<h3>{name}</h3>{picture}")

    def add_html(self, title: str, content: str) -> None:
        """Add markup that is already safe."""
        self._parts.append(f'<h3>{html.escape(title)}</h3><div class="wide">{content}</div>')

    def save(self, path: Path) -> None:
        """Write the page."""
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style><h1>{title}</h1>{''.join(self._parts)}</html>\n"
        )
        write_atomically(path, lambda temporary: _write(temporary, page))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def plain(label: str) -> str:
    """A label as matplotlib shows it and nothing more: no mathematics between dollars, and no hidden underscore."""
    escaped = label.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Loss over steps, a line a run, as PNG."""
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, lines in curves.items():
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=plain(name))
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return png(figure)


def map_plot(before: Embeddings, after: Embeddings) -> bytes:
    """Two-dimensional maps of the same samples before and after training, coloured by label, as PNG.

    At most 500 samples, spread evenly over the data; t-SNE on cosine distances.
    """
    count = len(after.ids)
    rows = np.unique(np.linspace(0, count - 1, min(count, MAP_POINTS)).astype(int))
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title, embeddings in zip(panels, ("before", "after"), (before, after), strict=True):
        points = _two_dimensions(embeddings.features[rows].numpy())
        axes.set(title=title, xticks=[], yticks=[])
        _scatter(figure, axes, points, _at(after.labels, rows), last=axes is panels[-1])
    return png(figure)


def _at(labels: list[str] | list[float] | None, rows: NDArray[Any]) -> list[Any] | None:
    return None if labels is None else [labels[row] for row in rows]


def _two_dimensions(features: NDArray[Any]) -> NDArray[Any]:
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    # t-SNE crashes the process, without an exception, where all points are one.
    if len(unit) < 10 or unit.shape[1] < 2 or not np.isfinite(unit).all() or unit.std(axis=0).max() < 1e-6:
        return np.nan_to_num(np.pad(unit, ((0, 0), (0, 2)))[:, :2], posinf=0.0, neginf=0.0)
    dimensions = min(30, *unit.shape)
    reduced = PCA(dimensions, random_state=0).fit_transform(unit)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    points: NDArray[Any] = TSNE(
        2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=0, max_iter=500
    ).fit_transform(reduced)
    return points


def _scatter(figure: Figure, axes: Any, points: NDArray[Any], labels: list[Any] | None, last: bool) -> None:
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=12)
    elif isinstance(labels[0], float):
        shown = axes.scatter(points[:, 0], points[:, 1], s=12, c=labels, cmap="viridis")
        if last:
            figure.colorbar(shown, ax=axes)
    else:
        frequent = [name for name, _ in Counter(labels).most_common(MAP_COLOURS)]
        colours = colormaps["tab10"]
        rest = np.array([label not in frequent for label in labels])
        axes.scatter(points[rest, 0], points[rest, 1], s=8, color="0.8")
        for number, name in enumerate(sorted(frequent)):
            members = np.array([label == name for label in labels])
            axes.scatter(
                points[members, 0],
                points[members, 1],
                s=12,
                color=colours(number),
                label=plain(name) if last else None,
            )
        if last:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)


def neighbour_table(embeddings: Embeddings) -> str:
    """HTML: a few samples spread over the data, each with its nearest others by cosine."""
    features = F.normalize(embeddings.features, dim=1)
    count = len(features)
    queries = sorted(set(np.linspace(0, count - 1, min(count, NEIGHBOUR_QUERIES)).astype(int).tolist()))
    similarity = features[queries] @ features.T
    similarity[torch.arange(len(queries)), torch.tensor(queries)] = -torch.inf
    found = similarity.topk(min(NEIGHBOURS, count - 1), dim=1)
    rows = []
    for query, cosines, nearest in zip(queries, found.values.tolist(), found.indices.tolist(), strict=True):
        cells = [f'<td class="query">{_preview(embeddings, query)}</td>']
        cells += [
            f"<td>{_preview(embeddings, index)}<small>cosine {cosine:.3f}</small></td>"
            for index, cosine in zip(nearest, cosines, strict=True)
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    kind = "sentences" if isinstance(embeddings.previews[0], str) else "thumbnails"
    return f'<table class="{kind}">{"".join(rows)}</table>'


def _preview(embeddings: Embeddings, index: int) -> str:
    preview = embeddings.previews[index]
    label = "" if embeddings.labels is None else _label(embeddings.labels[index])
    if isinstance(preview, str):
        return f"{html.escape(preview)}<br><small>{label}</small> "
    picture = Image.fromarray(preview)
    scale = max(1, THUMBNAIL_SIDE // max(picture.size))
    buffer = io.BytesIO()
    if max(picture.size) > 2 * THUMBNAIL_SIDE:
        picture.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
    picture.save(buffer, "png")
    width = picture.size[0] * scale
    return f'<img alt="{label}" width="{width}" src="data:image/png;base64,{_base64(buffer.getvalue())}">{label} '


def _label(label: str | float) -> str:
    return f"{label:.3f}" if isinstance(label, float) else html.escape(label)
