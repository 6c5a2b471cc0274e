"""Image views on the device: the whole batch in one go, random for each image.

Cropping, resizing and flipping are linear and separable, so one matrix for the rows and one for the columns does
all three exactly as PIL's antialiased resize does; so does a Gaussian blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.views import RandomStream, Views
from contrastive_mm.vision.decoding import Crop, view_names

Images = Float[Tensor, "batch channels height width"]
Squares = Float[Tensor, "batch channels size size"]

RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class ImageViewConfig:
    """Two views of each image, as in SimCLR (Chen et al. 2020, appendix A)."""

    crop_scale: float = 0.08
    """Smallest share of the image's area that a crop takes; the largest is 1."""
    flip: float = 0.5
    """Probability of mirroring. Set it to 0 where left and right differ, as in digits."""
    jitter_strength: float = 0.5
    """Colour jitter: 0.8 s for brightness, contrast and saturation, 0.2 s for hue (1 on ImageNet, 0.5 on CIFAR-10)."""
    jitter: float = 0.8
    """Probability of the colour jitter."""
    greyscale: float = 0.2
    """Probability of taking the colour away."""
    blur: float = 0.0
    """Probability of Gaussian blur: 0.5 on ImageNet, none on small images (appendix B.9)."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "greyscale", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} = {getattr(self, name)}; a probability lies between 0 and 1.")
        if not 0 < self.crop_scale <= 1:
            raise UserError(f"--crop-scale = {self.crop_scale}; it must lie in (0, 1].")
        if not 0 <= self.jitter_strength <= 1.25:
            raise UserError(f"--jitter-strength = {self.jitter_strength}; it must lie in [0, 1.25].")


class ImageViews:
    """Makes two augmented views of a batch of images.

    The batch maps ``"image"`` to (B, C, H, W), uint8 in 0..255 or float in 0..1; ``"index"`` (B,), where given,
    becomes the sample ids and ``"label"`` (B,) the labels. A loader that has cut the crops already (``crops``) gives
    them as ``"view_0"``, ``"view_1"``, ... (B, C, S, S) in place of ``"image"``.

    Args:
        size: side of the square views, in pixels.
        config: which augmentations, how strong.
        seed: of the views' own random stream.
    """

    def __init__(self, size: int, config: ImageViewConfig | None = None, seed: int = 0) -> None:
        self.size = size
        self.config = config or ImageViewConfig()
        self.stream = RandomStream(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Two views of each image, normalised to about [-1, 1]."""
        whole = [batch[name] for name in view_names(self.crops)] if "image" not in batch else [batch["image"]] * 2
        return Views(
            tuple(self.augment(to_float(images), cropped="image" not in batch) for images in whole),
            sample_ids=batch.get("index"),
            labels=batch.get("label"),
        )

    @property
    def crops(self) -> list[Crop]:
        """The random crops that the views start from, for a loader that cuts them where it decodes."""
        return [Crop(self.size, self.config.crop_scale)] * 2

    def augment(self, images: Images, cropped: bool = False) -> Squares:
        """One random view of each image: (B, C, H, W) in 0..1 to (B, C, size, size), normalised.

        Args:
            images: whole ones, or crops of the views' size.
            cropped: which of both they are.
        """
        config, generator = self.config, self.stream.on(images.device)
        if cropped:
            views = _on_some(images, config.flip, generator, lambda x: x.flip(3))
        else:
            views = random_resized_crop(images, self.size, config.crop_scale, config.flip, generator)
        if images.shape[1] == 3:
            strength = config.jitter_strength
            views = _on_some(views, config.jitter, generator, lambda x: colour_jitter(x, strength, generator))
            views = _on_some(views, config.greyscale, generator, lambda x: to_grey(x).expand_as(x))
        views = _on_some(views, config.blur, generator, lambda x: random_blur(x, generator))
        return normalise(views)

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.stream.load_state_dict(state)


def to_float(images: UInt8[Tensor, "batch channels height width"] | Images) -> Images:
    """Bring uint8 images in 0..255 to floats in 0..1; floats stay."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalise(images: Images) -> Images:
    """Map 0..1 to -1..1."""
    return images * 2 - 1


def plain_view(images: UInt8[Tensor, "batch channels height width"], size: int) -> Squares:
    """The view that evaluation uses: resized without cropping, normalised."""
    whole = torch.tensor([[0.0, 0.0, images.shape[2], images.shape[3]]], device=images.device)
    return normalise(crop_and_resize(to_float(images), whole.expand(len(images), 4), size))


def _on_some(
    images: Images, probability: float, generator: torch.Generator, change: Callable[[Images], Images]
) -> Images:
    """Apply a change to each image with a probability; the work is done for the chosen ones only."""
    if probability == 0:
        return images
    chosen = torch.rand(len(images), generator=generator, device=images.device) < probability
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return images
    return images.index_copy(0, rows, change(images[rows]))


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def random_boxes(
    count: int, height: int, width: int, min_scale: float, generator: torch.Generator
) -> Float[Tensor, "count 4"]:
    """Crop boxes (top, left, height, width) in whole pixels, drawn as torchvision's RandomResizedCrop draws them.

    Area uniform in [min_scale, 1] of the image, the logarithm of the aspect ratio uniform in [3/4, 4/3]; the
    first of ten draws that fits inside the image counts, else the largest central box of an allowed ratio.
    """
    drawn = count * CROP_ATTEMPTS
    area = height * width * _uniform(drawn, min_scale, 1.0, generator)
    ratio = _uniform(drawn, math.log(RATIO[0]), math.log(RATIO[1]), generator).exp()
    box_w = (area * ratio).sqrt().round().view(count, CROP_ATTEMPTS)
    box_h = (area / ratio).sqrt().round().view(count, CROP_ATTEMPTS)
    fits = (box_w >= 1) & (box_h >= 1) & (box_w <= width) & (box_h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    box_w, box_h = box_w.gather(1, first).flatten(), box_h.gather(1, first).flatten()
    found = fits.any(dim=1)
    box_w = torch.where(found, box_w, torch.full_like(box_w, min(width, round(height * RATIO[1]))))
    box_h = torch.where(found, box_h, torch.full_like(box_h, min(height, round(width / RATIO[0]))))
    place_y, place_x = _uniform(count, 0, 1, generator), _uniform(count, 0, 1, generator)
    place_y, place_x = place_y.where(found, 0.5), place_x.where(found, 0.5)
    top = (place_y * (height - box_h + 1)).floor().clamp(max=height - box_h)
    left = (place_x * (width - box_w + 1)).floor().clamp(max=width - box_w)
    return torch.stack([top, left, box_h, box_w], dim=1)


def resize_matrix(
    start: Float[Tensor, " batch"], length: Float[Tensor, " batch"], source: int, target: int
) -> Float[Tensor, "batch target source"]:
    """Weights that resize the stretch [start, start + length) of ``source`` pixels to ``target`` pixels.

    The triangle filter of PIL's antialiased bilinear resize: as wide as the shrinking factor, at least one
    pixel, cut at the stretch's ends, rows summing to 1.
    """
    scale = (length / target)[:, None, None]
    place = torch.arange(target, device=start.device) + 0.5
    centre = start[:, None, None] + place[None, :, None] * scale
    pixel = torch.arange(source, device=start.device)[None, None, :] + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp_min(1.0)).clamp_min(0.0)
    begin, end = start[:, None, None], (start + length)[:, None, None]
    weight = weight * ((pixel > begin) & (pixel < end))
    return weight / weight.sum(dim=2, keepdim=True)


def crop_and_resize(
    images: Images,
    boxes: Float[Tensor, "batch 4"],
    size: int,
    mirrored: Bool[Tensor, " batch"] | None = None,
) -> Squares:
    """Crop each image to its box (top, left, height, width), resize to (size, size), mirror where asked."""
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def random_resized_crop(
    images: Images, size: int, min_scale: float, flip: float, generator: torch.Generator
) -> Squares:
    """Random crop, resize and mirror of each image."""
    count, _, height, width = images.shape
    boxes = random_boxes(count, height, width, min_scale, generator)
    mirrored = _uniform(count, 0, 1, generator) < flip
    return crop_and_resize(images, boxes, size, mirrored)


def to_grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Luminance (ITU-R 601), as PIL and torchvision compute it."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _blend(images: Images, other: Tensor, factor: Float[Tensor, " batch"]) -> Images:
    share = factor[:, None, None, None]
    return (share * images + (1 - share) * other).clamp(0, 1)


def adjust_brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Scale each image's values by its factor."""
    return (images * factor[:, None, None, None]).clamp(0, 1)


def adjust_contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with the mean of its luminance."""
    return _blend(images, to_grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend each image with its grey form."""
    return _blend(images, to_grey(images), factor)


def adjust_hue(images: Images, shift: Float[Tensor, " batch"]) -> Images:
    """Turn each image's hue by a share of the colour circle, exactly, in HSV.

    The value and the chroma of a pixel stay and only its place on the circle moves, so each channel comes
    straight from the shifted hue: ``v - c * clamp(min(k, 4 - k), 0, 1)`` with ``k = (n + 6 h) mod 6``, n = 5, 3, 1.
    """
    value, lead = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    red, green, blue = images.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        lead == 0,
        (green - blue) / safe,
        torch.where(lead == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sector + 6 * shift[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    place = (offsets + hue[:, None]) % 6
    fall = torch.minimum(place, 4 - place).clamp(0, 1)
    return value[:, None] - chroma[:, None] * fall


def colour_jitter(images: Images, strength: float, generator: torch.Generator) -> Images:
    """Brightness, contrast, saturation and hue, each image with its own factors in its own order.

    Args:
        images: (B, 3, H, W) in 0..1.
        strength: s of SimCLR: factors in [1 - 0.8 s, 1 + 0.8 s] (not below 0), hue in [-0.2 s, 0.2 s].
        generator: random source on the images' device.
    """
    count = len(images)
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    factors = [_uniform(count, low, high, generator) for _ in range(3)]
    factors.append(_uniform(count, -0.2 * strength, 0.2 * strength, generator))
    order: Int[Tensor, "batch 4"] = torch.rand(count, len(changes), generator=generator, device=images.device).argsort(
        dim=1
    )
    for turn in range(len(changes)):
        for number, (change, factor) in enumerate(zip(changes, factors, strict=True)):
            rows = (order[:, turn] == number).nonzero().flatten()
            if len(rows):
                images = images.index_copy(0, rows, change(images[rows], factor[rows]))
    return images


def blur_matrix(sigma: Float[Tensor, " batch"], size: int, radius: int) -> Float[Tensor, "batch size size"]:
    """Weights of a Gaussian blur along one axis of ``size`` pixels, mirrored at the borders."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    place = torch.arange(size, device=sigma.device)[:, None] + offsets
    mirrored = (size - 1) - ((size - 1) - place.abs()).abs()
    spread = torch.zeros(len(offsets), size, size, device=sigma.device)
    spread.scatter_(2, mirrored.T[:, :, None], 1.0)
    return torch.einsum("bk,kij->bij", kernel, spread)


def random_blur(images: Images, generator: torch.Generator) -> Images:
    """Gaussian blur, sigma uniform in [0.1, 2] pixels, a kernel of a tenth of the image (SimCLR, appendix A)."""
    sigma = _uniform(len(images), 0.1, 2.0, generator)
    height, width = images.shape[2:]
    radius = max(1, min(height, width) // 20)
    rows = blur_matrix(sigma, height, radius)[:, None]
    columns = blur_matrix(sigma, width, radius)[:, None]
    return rows @ images @ columns.transpose(2, 3)
