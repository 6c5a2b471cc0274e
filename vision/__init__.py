"""Images: batched augmentations, encoders, data sources."""

from contrastive_mm.vision.encoders.backbones import ImageEncoder
from contrastive_mm.vision.encoders.build import SmallConvNet, build_image_encoder
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews
from contrastive_mm.vision.views.presets import PRESETS, Preset, Recipe

__all__ = [
    "PRESETS",
    "ImageEncoder",
    "ImageViewConfig",
    "ImageViews",
    "Preset",
    "Recipe",
    "SmallConvNet",
    "build_image_encoder",
]
