"""Text: dropout views, encoders, data sources."""

from contrastive_mm.nlp.encoders import TextEncoder, small_transformer, train_tokenizer
from contrastive_mm.nlp.views import DropoutViews

__all__ = ["DropoutViews", "TextEncoder", "small_transformer", "train_tokenizer"]
