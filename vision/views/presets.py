"""Published augmentations by name, each from its paper's appendix or released code.

Probabilities, strengths, shares and order are the publications'; the operations themselves are torchvision's in all of
them. BYOL's released code and the first one of SimCLR add to the brightness where torchvision scales it; these two and
SimCLR v2's draw contrast towards each channel's own mean, not the mean luminance, and resize crops bicubically, not
bilinearly. The blur's kernel is a tenth of the view, as in SimCLR and BYOL; MoCo's and SwAV's code blurs by Pillow,
which doesn't cut it there.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from contrastive_mm.errors import UserError, unknown_name

Jitter: TypeAlias = tuple[float, float, float, float]
"""Strengths of brightness, contrast, saturation and hue."""

Change: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""An augmentation of one's own: (B, C, H, W) images in 0..1 and a random source on their device to changed images."""

Normalisation: TypeAlias = Literal["half", "none", "imagenet", "cifar10"]

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Mean and standard deviation by channel that values in 0..1 are brought to; ``half`` gives -1..1."""


def simclr_jitter(strength: float) -> Jitter:
    """SimCLR's colour distortion of strength s (Chen et al. 2020, appendix A): 0.8 s three times, and 0.2 s."""
    return 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength


def own_change(change: Change, images: Tensor, generator: torch.Generator) -> Tensor:
    """An augmentation of one's own, which must give images as it was given them.

    Raises:
        UserError: it gives something else than a tensor of the same shape, type and device, or NaN or infinity.
    """
    changed: Any = change(images, generator)
    wanted, name = _kind(images), getattr(change, "__name__", type(change).__name__)
    if not isinstance(changed, Tensor) or _kind(changed) != wanted:
        found = ", ".join(map(str, _kind(changed))) if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(
            f"The augmentation's own change {name} gave {found} for {', '.join(map(str, wanted))}: let it return "
            "images in 0..1 of the shape, type and device that it is given."
        )
    if not bool(torch.isfinite(changed).all()):
        raise UserError(f"The augmentation's own change {name} gave NaN or infinity; its values must lie in 0..1.")
    return changed


def _kind(images: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(images.shape), images.dtype, images.device


@dataclass(frozen=True)
class Recipe:
    """What is done to an image to make one kind of view, in this order.

    Attributes:
        crop_scale: smallest and largest share of the image's area that a crop takes.
        flip: probability of mirroring.
        rand_augment: operations of RandAugment, and their magnitude (0 to 30).
        jitter: probability of the colour jitter.
        jitter_strengths: see ``Jitter``.
        greyscale: probability of taking the colour away.
        greyscale_first: whether that comes before the jitter.
        blur: probability of Gaussian blur.
        solarise: probability of inverting the brighter half of the grey levels.
        own: what else is to be done, last; knowledge of a field goes here.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    rand_augment: tuple[int, int] = (0, 9)
    jitter: float = 0.8
    jitter_strengths: Jitter = (0.8, 0.8, 0.8, 0.2)
    greyscale: float = 0.2
    greyscale_first: bool = False
    blur: float = 0.5
    solarise: float = 0.0
    own: Change | None = None


@dataclass(frozen=True)
class Preset:
    """Which views of an image are made.

    Attributes:
        first: recipe of the first full view.
        second: recipe of the second one; by default the first's.
        small: recipe of small crops (multi-crop).
        small_crops: how many of them.
        small_share: side of a small crop as a share of a full view's.
        normalisation: how values are scaled at the end.
    """

    first: Recipe = dataclasses.field(default_factory=Recipe)
    second: Recipe | None = None
    small: Recipe | None = None
    small_crops: int = 0
    small_share: float = 96 / 224
    normalisation: Normalisation = "half"


_CIFAR = Recipe(jitter_strengths=simclr_jitter(0.5), blur=0.0)
_MOCO_V2 = Recipe(crop_scale=(0.2, 1.0), jitter_strengths=(0.4, 0.4, 0.4, 0.1))
_BYOL = Recipe(jitter_strengths=(0.4, 0.4, 0.2, 0.1), blur=1.0)
_SWAV = Recipe(crop_scale=(0.14, 1.0))

PRESETS: dict[str, Preset] = {
    # Chen et al. 2020, arXiv 2002.05709, appendix A; the released code leaves values in 0..1, here they are -1..1.
    "simclr": Preset(),
    # Chen et al. 2020, arXiv 2006.10029, section 3.1: SimCLR's; strength 1 and blur are the released code's defaults.
    "simclr-v2": Preset(),
    # Chen et al. 2020, arXiv 2002.05709, appendix B.9: strength 0.5, no blur.
    "simclr-cifar": Preset(_CIFAR),
    # He et al. 2020, arXiv 1911.05722, section 3.3, and the released code (main_moco.py without --aug-plus): NPID's.
    "moco-v1": Preset(
        Recipe((0.2, 1.0), jitter=1.0, jitter_strengths=(0.4, 0.4, 0.4, 0.4), greyscale_first=True, blur=0.0),
        normalisation="imagenet",
    ),
    # Chen et al. 2020, arXiv 2003.04297, and the released code (main_moco.py --aug-plus).
    "moco-v2": Preset(_MOCO_V2, normalisation="imagenet"),
    # Chen et al. 2021, arXiv 2104.02057, the released code (main_moco.py): BYOL's two recipes. Its commands for ViTs
    # take crops from 0.08 on, as here; those for ResNet-50 from 0.2 on (--crop-min).
    "moco-v3": Preset(_BYOL, dataclasses.replace(_BYOL, blur=0.1, solarise=0.2), normalisation="imagenet"),
    # The authors' CIFAR-10 notebook (moco_cifar10_demo), but for the deviations, by which values are divided: there
    # 0.2023, 0.1994 and 0.2010, here those of CIFAR-10's pixels.
    "moco-cifar": Preset(_CIFAR, normalisation="cifar10"),
    # Grill et al. 2020, arXiv 2006.07733, appendix B, table 6.
    "byol": Preset(_BYOL, dataclasses.replace(_BYOL, blur=0.1, solarise=0.2), normalisation="imagenet"),
    # Caron et al. 2020, arXiv 2006.09882, appendix A.2 and the released code: 2 x 224 and 6 x 96. The code divides red
    # by 0.228, not 0.229.
    "swav": Preset(
        _SWAV,
        small=dataclasses.replace(_SWAV, crop_scale=(0.05, 0.14)),
        small_crops=6,
        normalisation="imagenet",
    ),
    # SimCLR's for small images, with SwAV's shares; not from a publication.
    "swav-cifar": Preset(
        dataclasses.replace(_CIFAR, crop_scale=(0.14, 1.0)),
        small=dataclasses.replace(_CIFAR, crop_scale=(0.05, 0.14)),
        small_crops=6,
        small_share=0.5,
    ),
}


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
