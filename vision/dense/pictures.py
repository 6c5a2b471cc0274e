"""Pictures of what detectors and segmenters find, beside the truth; all as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from contrastive_mm.report import plain, png
from contrastive_mm.vision.dense.data import VOID, DenseData, Scene, mask_tools, object_masks, read_pixels
from contrastive_mm.vision.dense.detection import Found

SHOWN_SCORE = 0.5
"""Objects of a lower score are not drawn."""
MOST_IN_LEGEND = 30
CELL = 2.6
"""Inches."""
LONGEST_TITLE = 36
LINE = 0.25


def class_colour(number: int) -> tuple[float, float, float]:
    """Colour of class 1, 2, ...; strong ones first, and the same again from class 21 on."""
    place = (number - 1) % 20
    colour = colormaps["tab20"](2 * place if place < 10 else 2 * (place - 10) + 1)
    return colour[:3]


def detection_picture(data: DenseData, found: Mapping[str, Sequence[Found]]) -> bytes:
    """Boxes, and masks where there are some: a row an image, the truth first, then each detector's.

    Args:
        data: the scenes to draw.
        found: by the detector's name, what it found in each of them.
    """
    scored = any(objects.masks for column in found.values() for objects in column)
    figure, panels = _grid(data, ["truth", *found])
    shown: set[int] = set()
    for row, scene in enumerate(data.scenes):
        truth = Found(scene.boxes, scene.classes.float() * 0 + 1, scene.classes)
        masks = list(object_masks(scene)) if scored else []
        shown |= _draw_objects(panels[row, 0], scene, truth, masks, scores=False)
        for axes, column in zip(panels[row, 1:], found.values(), strict=True):
            unpacked = [mask_tools().decode(region) for region in column[row].masks]
            shown |= _draw_objects(axes, scene, column[row], unpacked, scores=True)
    _add_legend(figure, data, shown)
    return png(figure)


def segmentation_picture(
    data: DenseData,
    truth: Sequence[UInt8[np.ndarray, "height width"]],
    found: Mapping[str, Sequence[UInt8[np.ndarray, "height width"]]],
) -> bytes:
    """Classes of pixels: a row an image, with the image itself, the truth, then each segmenter's.

    Args:
        data: the scenes to draw.
        truth: each pixel's class in each of them.
        found: by the segmenter's name, the same as it sees them.
    """
    figure, panels = _grid(data, ["image", "truth", *found])
    shown: set[int] = set()
    for row, scene in enumerate(data.scenes):
        panels[row, 0].imshow(read_pixels(scene))
        for axes, column in zip(panels[row, 1:], [truth, *found.values()], strict=True):
            axes.imshow(_coloured(column[row]), interpolation="nearest")
            shown |= set(np.unique(column[row]).tolist()) - {0, VOID}
    _add_legend(figure, data, shown)
    return png(figure)


def _grid(data: DenseData, titles: Sequence[str]) -> tuple[Figure, Any]:
    """Cells as tall as the images in them, below their titles."""
    heights = [CELL * min(2.0, scene.height / scene.width) for scene in data.scenes]
    size = (CELL * len(titles) + 0.2, sum(heights) + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(heights), len(titles), squeeze=False, height_ratios=heights)
    for axes in panels.flatten():
        axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[0], titles, strict=True):
        # Of a path, the end tells most.
        short = title if len(title) <= LONGEST_TITLE else f"...{title[3 - LONGEST_TITLE :]}"
        axes.set_title(plain(short), fontsize=10)
    return figure, panels


def _draw_objects(axes: Any, scene: Scene, objects: Found, masks: Sequence[Any], scores: bool) -> set[int]:
    pixels = read_pixels(scene).astype(np.float32) / 255
    kept = (objects.scores >= SHOWN_SCORE).nonzero().flatten().tolist()
    kinds = [int(objects.classes[row]) for row in kept]
    for row, kind in zip(kept, kinds, strict=True):
        if masks:
            inside = masks[row].astype(bool)
            pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(class_colour(kind), np.float32)
    axes.imshow(pixels, interpolation="nearest")
    for row, kind in zip(kept, kinds, strict=True):
        left, top, right, bottom = objects.boxes[row].tolist()
        colour = class_colour(kind)
        # Pixel centres lie at whole numbers in the picture, and at halves in a box.
        corner = (left - 0.5, top - 0.5)
        frame = Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.6)
        frame.set_path_effects([withStroke(linewidth=3, foreground="black")])  # seen on every ground
        axes.add_patch(frame)
        if scores:
            label = f"{100 * float(objects.scores[row]):.0f}"
            place = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(left, top, label, fontsize=6, color="white", va="bottom", bbox=place, clip_on=True)
    return set(kinds)


def _coloured(classes: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    palette = np.zeros((256, 3), np.uint8)
    for number in range(1, VOID):
        palette[number] = (255 * np.array(class_colour(number))).round()
    palette[VOID] = 255
    return palette[classes]


def _add_legend(figure: Figure, data: DenseData, shown: set[int]) -> None:
    """Name the colours that are there, below the picture."""
    kinds = sorted(shown)[:MOST_IN_LEGEND]
    if not kinds:
        return
    handles = [Patch(color=class_colour(kind), label=plain(data.class_names[kind - 1])) for kind in kinds]
    width, height = figure.get_size_inches()
    longest = max(len(data.class_names[kind - 1]) for kind in kinds)
    columns = max(1, min(len(kinds), int(width / (0.6 + 0.075 * longest))))
    figure.set_size_inches(width, height + LINE * -(-len(kinds) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
