"""The nlp domain: sentences in, text encoders out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from transformers import AutoTokenizer

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    effective_rank,
    extract_features,
    linear_probe_accuracy,
    retrieval_scores,
    split_rows,
    uniformity,
)
from contrastive_mm.nlp.data import TokenizedTexts, by_length, find_texts
from contrastive_mm.nlp.encoders import (
    Pooling,
    pretrained_encoder,
    pretrained_tokenizer,
    small_transformer,
    train_tokenizer,
)
from contrastive_mm.nlp.views import DropoutViews

EVALUATION_BATCH = 256
EVALUATION_ROWS = 10_000
RAW_WORDS = 10_000
FROM_SCRATCH = "small-transformer"


@dataclass(frozen=True)
class TextConfig:
    """Text."""

    data: str = ""
    """Text file (a sentence a line), CSV, TSV, JSONL or Parquet table, pydoc-topics, or hf:owner/name."""
    text_column: str = "text"
    """Column of a table with the sentences."""
    label_column: str = "label"
    """Column of a table with classes, used by `evaluate` only."""
    encoder: str = FROM_SCRATCH
    """small-transformer (from scratch, with a tokenizer trained on the data), or a Hugging Face model's name or
    folder."""
    pooling: Pooling = "mean"
    """How token states become one feature."""
    dropout: float = 0.1
    """Dropout of small-transformer, which makes its views; a pretrained model keeps its own."""
    vocabulary: int = 8000
    """Tokens of a tokenizer trained from scratch, at the most."""
    max_length: int = 64
    """Tokens kept of a sentence."""
    batch_size: int = 128
    """Sentences a step; each has batch_size - 1 negatives."""
    validation_share: float = 0.3
    """Last part of each class, held back from training for `evaluate`; nothing where there are no labels."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UserError(f"--validation-share = {self.validation_share}; it must lie in [0, 1).")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout = {self.dropout}; it must lie in [0, 1).")
        if self.max_length < 3:
            raise UserError(f"--max-length = {self.max_length}; two tokens frame a sentence, so at least 3.")


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
        self.make_views = DropoutViews()

    def _find_tokenizer(self, saved: Path | None) -> Any:
        if saved is not None:
            return AutoTokenizer.from_pretrained(saved / "tokenizer")
        if self.config.encoder == FROM_SCRATCH:
            texts = (self.source.texts[row] for row in self.train_rows.tolist())
            return train_tokenizer(texts, self.config.vocabulary)
        return pretrained_tokenizer(self.config.encoder)

    def build_encoder(self) -> nn.Module:
        """The encoder named in the options: pretrained, or small with random weights."""
        if self.config.encoder == FROM_SCRATCH:
            return small_transformer(len(self.tokenizer), dropout=self.config.dropout, pooling=self.config.pooling)
        return pretrained_encoder(self.config.encoder, self.config.pooling)

    def train_batches(self) -> ShuffledBatches:
        """Batches of ``input_ids``, ``attention_mask`` (B, L) and ``index`` (B,), of similar length."""
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
        return {**self.tokens.batch(rows), "index": rows}

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores on the validation part, with the training part as gallery; TF-IDF for None.

        With labels: ``precision_at_1`` and ``mean_average_precision`` of retrieving sentences of the same class
        by cosine, and ``linear_probe_accuracy``. Without: ``uniformity`` and ``effective_rank`` of up to 2,048
        sentences. At most 10,000 training sentences are used.
        """
        features = self._features_of(encoder)
        labels = self.source.labels
        few = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(0))
        gallery = self.train_rows[few[:EVALUATION_ROWS]]
        if labels is None or len(labels.unique()) < 2 or len(self.validation_rows) == 0:
            sample = features(gallery[:2048])
            return {"uniformity": uniformity(sample), "effective_rank": effective_rank(sample)}
        train = features(gallery)
        test = features(self.validation_rows)
        scores = retrieval_scores(test, labels[self.validation_rows], train, labels[gallery])
        scores["linear_probe_accuracy"] = linear_probe_accuracy(
            train, labels[gallery], test, labels[self.validation_rows]
        )
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
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def _features_of(self, encoder: nn.Module | None) -> Callable[[Tensor], Tensor]:
        """A function from row numbers to features."""
        if encoder is not None:
            return partial(self._encoded, encoder)
        words = TfidfVectorizer(sublinear_tf=True, max_features=RAW_WORDS)
        words.fit([self.source.texts[row] for row in self.train_rows.tolist()])
        return partial(self._counted, words)

    def _encoded(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        # Longest first: batches of like lengths need little padding. The order is put back afterwards.
        order = self.tokens.lengths[rows].argsort(descending=True)
        batches = (self.tokens.batch(rows[part]) for part in order.split(EVALUATION_BATCH))
        return extract_features(encoder, batches)[order.argsort()]

    def _counted(self, words: TfidfVectorizer, rows: Tensor) -> Tensor:
        counted = words.transform([self.source.texts[row] for row in rows.tolist()])
        return torch.from_numpy(counted.toarray()).float()
