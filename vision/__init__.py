"""Images: batched augmentations, encoders, data sources."""

from contrastive_mm.vision.augment import ImageViewConfig, ImageViews
from contrastive_mm.vision.encoders import SmallConvNet, build_image_encoder
from contrastive_mm.vision.presets import PRESETS, Preset, Recipe

__all__ = ["PRESETS", "ImageViewConfig", "ImageViews", "Preset", "Recipe", "SmallConvNet", "build_image_encoder"]
