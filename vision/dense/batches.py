"""Scenes as batches: squares of one side with boxes, masks and classes of pixels, mirrored at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.views import RandomStream, Views
from contrastive_mm.vision.dense.data import VOID, DenseData, Scene, Task, object_masks, read_class_map, read_pixels

GREY = 127
"""What fills a square beside an image that is none."""


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to ``size``."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_image(pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[Tensor, "3 size size"]:
    """An image resized as ``fitted_size`` says, at the upper left of a grey square."""
    height, width = fitted_size(pixels.shape[0], pixels.shape[1], size)
    square = np.full((size, size, 3), GREY, np.uint8)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    square[:height, :width] = np.asarray(resized)
    return torch.from_numpy(square).permute(2, 0, 1)


def fit_map(classes: UInt8[np.ndarray, "height width"], size: int, fill: int) -> UInt8[Tensor, "size size"]:
    """A map of numbers resized in the same way, without mixing neighbours."""
    height, width = fitted_size(classes.shape[0], classes.shape[1], size)
    square = np.full((size, size), fill, np.uint8)
    square[:height, :width] = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
    return torch.from_numpy(square)


def box_scale(scene: Scene, size: int) -> Float32[Tensor, "4"]:
    """What a scene's boxes are multiplied by to lie in its square."""
    height, width = fitted_size(scene.height, scene.width, size)
    across, down = width / scene.width, height / scene.height
    return torch.tensor([across, down, across, down], dtype=torch.float32)


class SceneLoader:
    """Makes batches of scenes.

    Args:
        data: the scenes.
        size: side of the squares, in pixels.
        task: what comes with the images.
    """

    def __init__(self, data: DenseData, size: int, task: Task) -> None:
        self.data = data
        self.size = size
        self.task = task

    def images(self, scenes: Sequence[Scene]) -> UInt8[Tensor, "batch 3 size size"]:
        """The squares of some scenes."""
        return torch.stack([fit_image(read_pixels(scene), self.size) for scene in scenes])

    def __call__(self, indices: Tensor) -> dict[str, Tensor]:
        """``image`` (B, 3, S, S) uint8, and what is learned.

        For objects ``boxes`` (B, M, 4) in pixels of the square, ``classes`` (B, M), 0 where an image has fewer than M
        objects, and for masks ``masks`` (B, M, S, S) uint8. For classes of pixels ``class_map`` (B, S, S) uint8.
        """
        scenes = [self.data.scenes[i] for i in indices.tolist()]
        batch = {"image": self.images(scenes)}
        if self.task == "classes":
            maps = [fit_map(read_class_map(scene, len(self.data.class_names)), self.size, VOID) for scene in scenes]
            return {**batch, "class_map": torch.stack(maps)}
        return {**batch, **self._objects(scenes)}

    def _objects(self, scenes: list[Scene]) -> dict[str, Tensor]:
        kept = [(~scene.crowd).nonzero().flatten() for scene in scenes]
        most = max(len(rows) for rows in kept)
        boxes = torch.zeros(len(scenes), most, 4)
        classes = torch.zeros(len(scenes), most, dtype=torch.int64)
        for number, (scene, rows) in enumerate(zip(scenes, kept, strict=True)):
            boxes[number, : len(rows)] = scene.boxes[rows] * box_scale(scene, self.size)
            classes[number, : len(rows)] = scene.classes[rows]
        if self.task == "boxes":
            return {"boxes": boxes, "classes": classes}
        masks = torch.zeros(len(scenes), most, self.size, self.size, dtype=torch.uint8)
        for number, (scene, rows) in enumerate(zip(scenes, kept, strict=True)):
            for place, mask in enumerate(object_masks(scene)[rows.numpy()]):
                masks[number, place] = fit_map(mask, self.size, 0)
        return {"boxes": boxes, "classes": classes, "masks": masks}


def scene_batches(loader: SceneLoader, batch_size: int, seed: int) -> ShuffledBatches:
    """Shuffled batches of scenes, made ahead in a thread.

    Raises:
        UserError: there are fewer scenes than a batch has.
    """
    return ShuffledBatches(len(loader.data), batch_size, loader, seed, prefetch=2)


class SceneViews:
    """One view of each scene: its values in 0..1, mirrored at random together with what is in it.

    Args:
        flip: probability of mirroring.
        seed: of the views' own random stream.
    """

    def __init__(self, flip: float = 0.5, seed: int = 0) -> None:
        self.flip = flip
        self.stream = RandomStream(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """The view, a mapping with the batch's own names.

        What fills the square beside a narrow image then lies at its left.
        """
        image = batch["image"]
        draws = torch.rand(len(image), generator=self.stream.on(image.device), device=image.device)
        turned = draws < self.flip
        view = {name: _mirrored(name, value, turned, image.shape[-1]) for name, value in batch.items()}
        view["image"] = view["image"].float() / 255
        return Views((view,), num_global=1)

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.stream.load_state_dict(state)


def _mirrored(name: str, value: Tensor, turned: Tensor, size: int) -> Tensor:
    if name == "classes":
        return value
    if name == "boxes":
        left, top, right, bottom = value.unbind(dim=2)
        flipped = torch.stack([size - right, top, size - left, bottom], dim=2)
    else:
        flipped = value.flip(-1)
    return torch.where(turned.reshape(-1, *[1] * (value.ndim - 1)), flipped, value)
