"""Views of sentences."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from contrastive_mm.views import Views

TOKEN_INPUTS = ("input_ids", "attention_mask")


class DropoutViews:
    """The same tokens twice; the encoder's dropout makes the two views differ (SimCSE, section 3).

    The batch maps ``"input_ids"`` and ``"attention_mask"`` to (B, L); ``"index"`` (B,), where given, becomes the
    sample ids and ``"label"`` (B,) the labels. An encoder without dropout would give the same features twice.
    """

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Two equal views; no random number is drawn here."""
        tokens = {name: batch[name] for name in TOKEN_INPUTS}
        return Views((tokens, tokens), sample_ids=batch.get("index"), labels=batch.get("label"))
