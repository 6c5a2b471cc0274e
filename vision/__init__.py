"""Images: batched augmentations, encoders, data sources."""

from contrastive_mm.vision.augment import ImageViewConfig, ImageViews
from contrastive_mm.vision.backbones import ImageEncoder
from contrastive_mm.vision.encoders import SmallConvNet, build_image_encoder

__all__ = ["ImageEncoder", "ImageViewConfig", "ImageViews", "SmallConvNet", "build_image_encoder"]
