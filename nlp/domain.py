"""The nlp domain: sentences in, text encoders out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    extract_features,
    linear_probe_accuracy,
    retrieval_scores,
    split_rows,
    unlabelled_scores,
)
from contrastive_mm.nlp.data import TokenizedTexts, by_length, find_texts
from contrastive_mm.nlp.encoders import (
    MAX_POSITIONS,
    Pooling,
    check_length,
    longest_input,
    pretrained_encoder,
    pretrained_tokenizer,
    saved_tokenizer,
    small_transformer,
    train_tokenizer,
)
from contrastive_mm.nlp.views import CropViews, DropoutViews, frame_of
from contrastive_mm.views import ViewMaker

EVALUATION_BATCH = 256
EVALUATION_ROWS = 10_000
UNLABELLED_ROWS = 2048
RAW_WORDS = 10_000
FROM_SCRATCH = "small-transformer"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TextConfig:
    """Text."""

    data: str = ""
    """Text file (a sentence a line), CSV, TSV, JSONL or Parquet table, pydoc-topics, or hf:owner/name."""
    text_column: str = "text"
    """Column of a table with the sentences."""
    label_column: str = "label"
    """Column of a table with classes, used by `evaluate` and by methods that learn from labels, such as supcon."""
    encoder: str = FROM_SCRATCH
    """small-transformer (from scratch, with a tokenizer trained on the data), or a Hugging Face model's name or
    folder."""
    pooling: Pooling = "mean"
    """How token states become one feature."""
    dropout: float = 0.1
    """Dropout of small-transformer, which makes its views differ; with crops it may be 0. A pretrained model keeps
    its own."""
    views: Literal["dropout", "crops"] = "dropout"
    """dropout gives a sentence twice, told apart by the encoder's dropout alone; crops gives two random spans of it,
    from which every method can learn."""
    crop_least: float = 0.2
    """Smallest share of a sentence's tokens in a crop; of longer texts less will do (0.1 of 256 tokens in the paper's
    code)."""
    crop_most: float = 0.5
    """Largest share of a sentence's tokens in a crop."""
    vocabulary: int = 8000
    """Tokens of a tokenizer trained from scratch, at the most."""
    max_length: int = 64
    """Tokens kept of a sentence; at most as many as the encoder has positions, 512 with small-transformer."""
    batch_size: int = 128
    """Sentences a step; each has batch_size - 1 negatives."""
    validation_share: float = 0.3
    """Last part of each class, held back from training for `evaluate`; nothing where there are no labels."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UserError(f"--validation-share = {self.validation_share}; it must lie in [0, 1).")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout = {self.dropout}; it must lie in [0, 1).")
        if not 0 < self.crop_least <= self.crop_most <= 1:
            raise UserError(
                f"--crop-least = {self.crop_least} and --crop-most = {self.crop_most}; they are shares above 0 and up "
                "to 1, the smallest and the largest."
            )
        if self.max_length < 3:
            raise UserError(f"--max-length = {self.max_length}; two tokens frame a sentence, so at least 3.")
        if self.encoder == FROM_SCRATCH:
            check_length(self.max_length, MAX_POSITIONS, FROM_SCRATCH)


class TextDomain:
    """Pretrains sentence encoders and scores them (retrieval, linear probe)."""

    config_class: ClassVar[type[TextConfig]] = TextConfig
    default_method: ClassVar[str] = "simcse"

    def __init__(self, config: TextConfig, seed: int, saved: Path | None = None) -> None:
        self.config = config
        self.seed = seed
        self.source = find_texts(config.data, config.text_column, config.label_column)
        count = len(self.source.texts)
        self.train_rows, self.validation_rows = split_rows(count, self.source.labels, config.validation_share)
        self.tokenizer = self._find_tokenizer(saved)
        self.tokens = TokenizedTexts(self.source.texts, self.tokenizer, config.max_length)
        self.make_views = self._view_maker()

    def _view_maker(self) -> ViewMaker:
        if self.config.views == "dropout":
            return DropoutViews()
        longest = self.source.texts[int(self.tokens.lengths.argmax())]
        frame, padding = frame_of(self.tokenizer, longest), int(self.tokenizer.pad_token_id)
        return CropViews(self.config.crop_least, self.config.crop_most, frame, padding, self.seed)

    def _find_tokenizer(self, saved: Path | None) -> Any:
        if saved is not None:
            return saved_tokenizer(saved / TOKENIZER_FOLDER)
        if self.config.encoder == FROM_SCRATCH:
            texts = (self.source.texts[row] for row in self.train_rows.tolist())
            return train_tokenizer(texts, self.config.vocabulary)
        return pretrained_tokenizer(self.config.encoder)

    def build_encoder(self) -> nn.Module:
        """The encoder named in the options: pretrained, or small with random weights.

        Raises:
            UserError: there is none of that name, or it has fewer positions than ``max_length``.
        """
        if self.config.encoder == FROM_SCRATCH:
            return small_transformer(len(self.tokenizer), dropout=self.config.dropout, pooling=self.config.pooling)
        encoder = pretrained_encoder(self.config.encoder, self.config.pooling)
        check_length(self.config.max_length, longest_input(encoder.transformer), self.config.encoder)
        return encoder

    def train_batches(self) -> ShuffledBatches:
        """Batches of ``input_ids``, ``attention_mask`` (B, L) and ``index`` (B,), of similar length.

        ``index`` is the sentence's number among those trained on.
        Labelled data come with ``label`` (B,), for the methods that learn from labels; the others leave it alone.
        """
        lengths, size = self.tokens.lengths[self.train_rows], self.config.batch_size
        return ShuffledBatches(
            len(self.train_rows),
            size,
            self._load,
            self.seed,
            arrange=lambda order, generator: by_length(order, lengths, size, generator),
        )

    def _load(self, indices: Tensor) -> dict[str, Tensor]:
        rows = self.train_rows[indices]
        batch = {**self.tokens.batch(rows), "index": indices}
        if self.source.labels is not None:
            batch["label"] = self.source.labels[rows]
        return batch

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores on the validation part, with the training part as gallery; TF-IDF for None.

        With labels: ``precision_at_1`` and ``mean_average_precision`` of retrieving sentences of the same class
        by cosine, and ``linear_probe_accuracy``. Without: ``uniformity`` and ``effective_rank`` of up to 2,048
        sentences. At most 10,000 sentences of each part are used, drawn once for all encoders: TF-IDF takes
        memory of 10,000 numbers a sentence.
        """
        features = self._features_of(encoder)
        labels = self.source.labels
        gallery = _at_most(EVALUATION_ROWS, self.train_rows)
        if labels is None or len(labels.unique()) < 2 or len(self.validation_rows) == 0:
            return unlabelled_scores(features(gallery[:UNLABELLED_ROWS]))
        queries = _at_most(EVALUATION_ROWS, self.validation_rows)
        train, test = features(gallery), features(queries)
        scores = retrieval_scores(test, labels[queries], train, labels[gallery])
        scores["linear_probe_accuracy"] = linear_probe_accuracy(train, labels[gallery], test, labels[queries])
        return scores

    def embed(self, encoder: nn.Module | None, everything: bool = False) -> Embeddings:
        """Embed the validation part (all sentences where nothing is held back), or everything; TF-IDF for None."""
        held_back = len(self.validation_rows) > 0 and not everything
        rows = self.validation_rows if held_back else torch.arange(len(self.tokens))
        names, labels = self.source.class_names, self.source.labels
        chosen = rows.tolist()
        return Embeddings(
            features=self._features_of(encoder)(rows),
            ids=[self.source.ids[row] for row in chosen],
            labels=None if names is None or labels is None else [names[i] for i in labels[rows].tolist()],
            previews=[self.source.texts[row] for row in chosen],
        )

    def save(self, folder: Path) -> None:
        """Keep the tokenizer."""
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)

    def _features_of(self, encoder: nn.Module | None) -> Callable[[Tensor], Tensor]:
        """A function from row numbers to features."""
        if encoder is not None:
            return partial(self._encoded, encoder)
        return partial(self._counted, _tf_idf([self.source.texts[row] for row in self.train_rows.tolist()]))

    def _encoded(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        # Longest first: batches of like lengths need little padding. The order is put back afterwards.
        order = self.tokens.lengths[rows].argsort(descending=True)
        batches = (self.tokens.batch(rows[part]) for part in order.split(EVALUATION_BATCH))
        return extract_features(encoder, batches)[order.argsort()]

    def _counted(self, words: TfidfVectorizer, rows: Tensor) -> Tensor:
        counted = words.transform([self.source.texts[row] for row in rows.tolist()])
        return torch.from_numpy(counted.astype(np.float32).toarray())


def _at_most(count: int, rows: Tensor) -> Tensor:
    """So many of the rows, drawn at random but always the same."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]


def _tf_idf(texts: list[str]) -> TfidfVectorizer:
    """Weights of words as learned from these texts; of characters where no text has a word of two letters."""
    words = TfidfVectorizer(sublinear_tf=True, max_features=RAW_WORDS)
    find_words = words.build_analyzer()
    if not any(find_words(text) for text in texts):
        words = TfidfVectorizer(sublinear_tf=True, max_features=RAW_WORDS, analyzer="char")
    return words.fit(texts)
