"""Views of sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive_mm.views import RandomStream, Views

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


class CropViews:
    """Two spans of each sentence, drawn independently: they may overlap, or share no token.

    The independent cropping of Contriever (Izacard et al. 2022, arXiv 2112.09118, section 3.2). A span's share of
    the tokens is uniform between ``least`` and ``most``, and so is its place; its tokens are counted up, where the
    released code counts down and can be left with none. The special tokens before and behind a sentence stay around
    each span. Dropout, where the encoder has it, comes on top. The paper also deletes single words; this does not.

    The batch is as for ``DropoutViews``, padded on the right.

    Args:
        least: smallest share of a sentence's tokens, above 0.
        most: largest share, up to 1.
        frame: how many special tokens stand before and behind a sentence, as ``frame_of`` finds them.
        padding: id of the token that fills shorter spans up.
        seed: of the spans' own random stream.
    """

    def __init__(self, least: float, most: float, frame: tuple[int, int], padding: int, seed: int = 0) -> None:
        self.least, self.most = least, most
        self.frame, self.padding = frame, padding
        self.stream = RandomStream(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Two spans of each sentence; both views have the same width."""
        ids, mask = (batch[name] for name in TOKEN_INPUTS)
        views = (self.crop(ids, mask), self.crop(ids, mask))
        return Views(views, sample_ids=batch.get("index"), labels=batch.get("label"))

    def crop(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"]
    ) -> dict[str, Int[Tensor, "batch width"]]:
        """One random span of each sentence as ``input_ids`` and ``attention_mask``."""
        generator, device = self.stream.on(ids.device), ids.device
        before, behind = self.frame
        # The width that the longest sentence may need, whatever is drawn: nothing is waited for on a GPU.
        most = math.ceil(self.most * (ids.shape[1] - before - behind))
        words = mask.sum(dim=1) - before - behind
        share = torch.rand(len(ids), generator=generator, device=device) * (self.most - self.least) + self.least
        kept = (share * words).ceil().long().clamp(max=most)
        free = words - kept
        start = torch.rand(len(ids), generator=generator, device=device) * (free + 1)
        start = torch.minimum(start.long(), free)
        place = torch.arange(before + most + behind, device=device)[None]
        source = torch.where(place < before, place, place + start[:, None])
        source = torch.where(place < (before + kept)[:, None], source, place + free[:, None])
        there = place < (before + kept + behind)[:, None]
        cropped = ids.gather(1, source.clamp(max=ids.shape[1] - 1))
        return {"input_ids": cropped.where(there, self.padding), "attention_mask": there.to(mask.dtype)}

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.stream.load_state_dict(state)


def frame_of(tokenizer: Any, text: str) -> tuple[int, int]:
    """How many special tokens a Hugging Face tokenizer puts before and behind a sentence.

    Args:
        tokenizer: BERT's frames a sentence with [CLS] and [SEP], T5's ends it with </s>.
        text: a sentence that has tokens.
    """
    special = tokenizer(text, truncation=True, return_special_tokens_mask=True)["special_tokens_mask"]
    return special.index(0), special[::-1].index(0)
