"""Image views on the device: the whole batch in one go, random for each image."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.positives import Positives
from contrastive_mm.views import RandomStream, Views
from contrastive_mm.vision.data.decoding import Crop, view_names
from contrastive_mm.vision.views.blur import blur
from contrastive_mm.vision.views.colour import jitter_, solarise, to_grey
from contrastive_mm.vision.views.crops import crop_and_resize
from contrastive_mm.vision.views.draws import Images, Plan, Squares, change_some_, draw_plan
from contrastive_mm.vision.views.mixing import MIXINGS
from contrastive_mm.vision.views.presets import NORMALISATIONS, PRESETS, Normalisation, Preset, Recipe, simclr_jitter
from contrastive_mm.vision.views.randaugment import LARGEST_MAGNITUDE, OPERATIONS, rand_augment_

CACHED = 1 << 19
"""Values of a part of a batch on a CPU: 2 MiB of floats."""

Pixels = UInt8[Tensor, "batch channels height width"] | Images

PROBABILITIES = ("flip", "jitter", "greyscale", "blur", "solarise")


@dataclass(frozen=True)
class ImageViewConfig:
    """Views of each image: a published augmentation by name, and what is to be different."""

    augmentation: str = "simclr-cifar"
    """simclr, simclr-v2, simclr-cifar, moco-v1, moco-v2, moco-v3, moco-cifar, byol, swav or swav-cifar; or
    package.module:name, a Preset or Recipe of your own."""
    crop_scale: float | None = None
    """Smallest share of the image's area that a full view takes; the largest is 1. None, here and below: as the
    augmentation has it."""
    flip: float | None = None
    """Probability of mirroring. Set it to 0 where left and right differ, as in digits."""
    jitter: float | None = None
    """Probability of the colour jitter."""
    jitter_strength: float | None = None
    """Colour jitter: 0.8 s for brightness, contrast and saturation, 0.2 s for hue (1 on ImageNet, 0.5 on CIFAR-10)."""
    greyscale: float | None = None
    """Probability of taking the colour away."""
    blur: float | None = None
    """Probability of Gaussian blur."""
    solarise: float | None = None
    """Probability of inverting the brighter half of the grey levels."""
    rand_augment: int | None = None
    """Operations of RandAugment for each view, before the colours are changed."""
    rand_augment_magnitude: int = 9
    """How strong they are: 0 to 30."""
    small_crops: int | None = None
    """Small crops beside the two full views, for methods with multi-crop (SwAV)."""
    small_size: int | None = None
    """Side of a small crop in pixels."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Mix the first view of each image with another image of the batch; positives are soft then (i-Mix)."""
    mix_alpha: float = 1.0
    """The share that is left of the image itself comes from Beta(alpha, alpha)."""
    mix_both: bool = False
    """Mix the second view alike, which SupCon wants."""
    normalisation: Literal["half", "none", "imagenet", "cifar10"] | None = None
    """What values are brought to: half (-1 to 1), none (0 to 1), or mean 0 and deviation 1 on ImageNet or CIFAR-10."""

    def __post_init__(self) -> None:
        for name in PROBABILITIES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} = {value}; a probability lies between 0 and 1.")
        for name, low, high in (
            ("rand_augment", 0, 10),
            ("rand_augment_magnitude", 0, LARGEST_MAGNITUDE),
            ("small_crops", 0, 64),
            ("small_size", 4, 10_000),
            ("jitter_strength", 0, 1.25),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} = {value}; it must lie between {low} and {high}.")
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise UserError(f"--crop-scale = {self.crop_scale}; it must lie in (0, 1].")
        if not self.mix_alpha > 0:
            raise UserError(f"--mix-alpha = {self.mix_alpha}; it must be above 0.")
        if self.mix_both and self.mix == "none":
            raise UserError("--mix-both has nothing to mix by: add --mix mixup or --mix cutmix.")

    def preset(self) -> Preset:
        """The augmentation with the changes.

        Raises:
            UserError: there is none of that name.
        """
        preset = find_preset(self.augmentation)
        small = preset.small
        if self.small_crops and small is None:
            small = dataclasses.replace(preset.first, crop_scale=(0.05, preset.first.crop_scale[0] or 0.14))
        return dataclasses.replace(
            preset,
            first=self._changed(preset.first, full=True),
            second=None if preset.second is None else self._changed(preset.second, full=True),
            small=None if small is None else self._changed(small, full=False),
            small_crops=preset.small_crops if self.small_crops is None else self.small_crops,
            normalisation=self.normalisation or preset.normalisation,
        )

    def _changed(self, recipe: Recipe, full: bool) -> Recipe:
        changes: dict[str, Any] = {name: getattr(self, name) for name in PROBABILITIES}
        if self.jitter_strength is not None:
            changes["jitter_strengths"] = simclr_jitter(self.jitter_strength)
        if self.rand_augment is not None:
            changes["rand_augment"] = (self.rand_augment, self.rand_augment_magnitude)
        if full and self.crop_scale is not None:
            changes["crop_scale"] = (self.crop_scale, 1.0)
        return dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def find_preset(name: str) -> Preset:
    """A published augmentation by name, or one of the user's own by ``package.module:name``.

    Raises:
        UserError: there is none, or it is neither a ``Preset`` nor a ``Recipe``.
    """
    if name in PRESETS:
        return PRESETS[name]
    if ":" not in name:
        raise unknown_name("augmentation", name, PRESETS, "--augmentation")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--augmentation {name} can't be found: {error}. Write package.module:name.") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"--augmentation {name}: importing {name.partition(':')[0]} fails with {type(error).__name__}: {error}."
        ) from error
    if isinstance(found, Recipe):
        return Preset(found)
    if not isinstance(found, Preset):
        raise UserError(f"--augmentation {name} is a {type(found).__name__}; it must be a Preset or a Recipe.")
    return found


class ImageViews:
    """Makes augmented views of a batch of images: two full ones, and small crops where they are asked for.

    The batch maps ``"image"`` to (B, C, H, W), uint8 in 0..255 or float in 0..1; ``"index"`` (B,), where given,
    becomes the sample ids and ``"label"`` (B,) the labels. A loader that has cut the crops already (``crops``) gives
    them as ``"view_0"``, ``"view_1"``, ... (B, C, S, S) in place of ``"image"``.

    Args:
        size: side of the square full views, in pixels.
        config: which augmentations, how strong; or a ``Preset`` or ``Recipe`` of your own.
        seed: of the views' own random stream.

    Raises:
        UserError: no such augmentation, or small crops that are as large as the full views.
    """

    def __init__(self, size: int, config: ImageViewConfig | Preset | Recipe | None = None, seed: int = 0) -> None:
        self.size = size
        if isinstance(config, Preset | Recipe):
            self.config = ImageViewConfig()
            self.preset = config if isinstance(config, Preset) else Preset(config)
        else:
            self.config = config or ImageViewConfig()
            self.preset = self.config.preset()
        self.small_size = self.config.small_size or max(4, round(self.preset.small_share * size))
        if self.preset.small_crops and self.small_size >= size:
            raise UserError(
                f"--small-size = {self.small_size}, but full views have a side of {size}; small crops must be smaller."
            )
        self.stream = RandomStream(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """The views of each image, normalised."""
        cropped = "image" not in batch
        sources = [batch[name] for name in view_names(self.crops)] if cropped else [batch["image"]] * len(self.crops)
        first, second, *small = (
            self.augment(images, recipe, crop.size, cropped)
            for images, recipe, crop in zip(sources, self._recipes(), self.crops, strict=True)
        )
        positives = None
        if self.config.mix != "none":
            generator = self.stream.on(first.device)
            mixing = MIXINGS[self.config.mix].draw(first.shape, self.config.mix_alpha, generator)
            first = mixing.apply(first)
            second = mixing.apply(second) if self.config.mix_both else second
            positives = Positives.mixed(mixing.partner, mixing.share)
        return Views(
            (first, second, *small),
            num_global=2,
            sample_ids=batch.get("index"),
            labels=batch.get("label"),
            positives=positives,
        )

    def _recipes(self) -> list[Recipe]:
        preset = self.preset
        small = [preset.small or preset.first] * preset.small_crops
        return [preset.first, preset.second or preset.first, *small]

    @property
    def crops(self) -> list[Crop]:
        """The random crops that the views start from, for a loader that cuts them where it decodes."""
        sizes = [self.size, self.size, *[self.small_size] * self.preset.small_crops]
        return [Crop(size, *recipe.crop_scale) for size, recipe in zip(sizes, self._recipes(), strict=True)]

    def augment(
        self, images: Pixels, recipe: Recipe | None = None, size: int | None = None, cropped: bool = False
    ) -> Squares:
        """One random view of each image, normalised.

        Args:
            images: (B, C, H, W), uint8 in 0..255 or float in 0..1.
            recipe: what is done; by default the first view's.
            size: side of the view in pixels; by default the full views'.
            cropped: whether the images are the view's random crops already, cut where they were decoded.

        Returns:
            (B, C, size, size).
        """
        recipe, size = recipe or self.preset.first, size or self.size
        count, channels, height, width = images.shape
        plan = draw_plan(recipe, count, height, width, len(OPERATIONS), self.stream.on(torch.device("cpu")))
        if cropped:
            plan = dataclasses.replace(plan, boxes=plan.boxes.new_tensor([0, 0, height, width]).expand(count, 4))
        # In parts that stay in a core's cache, where every change reads and writes them.
        part = count if images.device.type != "cpu" else max(1, CACHED // (channels * size * size))
        made: Tensor | None = None
        for start in range(0, count, part):
            rows = slice(start, start + part)
            views = make_view(images[rows], recipe, plan.part(rows), size)
            if recipe.own is not None:
                views = _checked(recipe.own(views, self.stream.on(images.device)), views)
            if made is None:
                made = views.new_empty(count, channels, size, size)
            normalise(views, self.preset.normalisation, out=made[rows])
        return images.new_empty(0, channels, size, size).float() if made is None else made

    def plain(self, images: Pixels) -> Squares:
        """The view that evaluation uses: the whole image, normalised as the views are."""
        return plain_view(images, self.size, self.preset.normalisation)

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.stream.load_state_dict(state)


def make_view(images: Tensor, recipe: Recipe, plan: Plan, size: int) -> Squares:
    """One view of each image, in 0..1, as it was drawn; what is about colours is left out where there is one channel.

    Args:
        images: (B, C, H, W), uint8 in 0..255 or float in 0..1.
        recipe: of which the plan was drawn.
        plan: what is done to each image.
        size: side of the views.
    """
    views = crop_and_resize(images, plan.boxes, size, plan.mirrored)
    if views.shape[1] == 3:
        rand_augment_(views, plan.operations, plan.signs, recipe.rand_augment[1])
        if recipe.greyscale_first:
            change_some_(views, plan.grey, lambda some, rows: to_grey(some).expand_as(some))
        jitter_(views, plan.jittered, plan.factors, plan.order)
        if not recipe.greyscale_first:
            change_some_(views, plan.grey, lambda some, rows: to_grey(some).expand_as(some))
    change_some_(views, plan.blurred, lambda some, rows: blur(some, plan.sigma[rows]))
    change_some_(views, plan.solarised, lambda some, rows: solarise(some))
    return views


def _checked(made: Any, given: Squares) -> Squares:
    """What a recipe's own function made of views, where it is what the encoder can take.

    Raises:
        UserError: it is of another shape or type, or holds NaN or infinity.
    """
    wanted = f"{given.dtype} of shape {tuple(given.shape)}"
    if not isinstance(made, Tensor):
        raise UserError(f"The augmentation's own function returned a {type(made).__name__}, not a tensor of {wanted}.")
    if made.shape != given.shape or made.dtype != given.dtype or made.device != given.device:
        raise UserError(
            f"The augmentation's own function returned {made.dtype} of shape {tuple(made.shape)} on {made.device}; "
            f"it was given, and must return, {wanted} on {given.device}."
        )
    if not bool(torch.isfinite(made).all()):
        raise UserError("The augmentation's own function returned NaN or infinity; its values must lie in 0..1.")
    return made


def normalise(images: Images, normalisation: Normalisation = "half", out: Tensor | None = None) -> Images:
    """Take the mean off and divide by the deviation, channel by channel; into ``out``, if it is given.

    Raises:
        UserError: the normalisation is of three channels, and the images have another number.
    """
    mean, deviation = (images.new_tensor(values) for values in NORMALISATIONS[normalisation])
    if len(mean) not in (1, images.shape[1]):
        raise UserError(
            f"The normalisation {normalisation!r} is of {len(mean)} channels, but the images have {images.shape[1]}: "
            "take --normalisation half."
        )
    return torch.addcmul((-mean / deviation)[:, None, None], images, (1 / deviation)[:, None, None], out=out)


def plain_view(images: Pixels, size: int, normalisation: Normalisation = "half") -> Squares:
    """The view that evaluation uses: resized without cropping, normalised."""
    whole = torch.tensor([[0.0, 0.0, images.shape[2], images.shape[3]]], device=images.device)
    return normalise(crop_and_resize(images, whole.expand(len(images), 4), size), normalisation)
