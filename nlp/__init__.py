"""Text: views by dropout or by crops, encoders, data sources."""

from contrastive_mm.nlp.encoders import TextEncoder, small_transformer, train_tokenizer
from contrastive_mm.nlp.views import CropViews, DropoutViews

__all__ = ["CropViews", "DropoutViews", "TextEncoder", "small_transformer", "train_tokenizer"]
