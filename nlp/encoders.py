"""Text encoders: any Hugging Face model, or a small transformer from scratch with a tokenizer of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from contrastive_mm.errors import UserError

Pooling = Literal["mean", "cls"]

MAX_POSITIONS = 512
ALPHABET = 1000
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class TextEncoder(nn.Module):
    """A transformer with pooling over its last hidden states.

    Args:
        transformer: a Hugging Face encoder.
        pooling: ``mean`` over the tokens that are not padding, or ``cls``, the first token.

    Shapes:
        ``input_ids`` and ``attention_mask`` (B, L) -> (B, hidden size).
    """

    def __init__(self, transformer: nn.Module, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.feature_dim = int(transformer.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def forward(self, inputs: Mapping[str, Int[Tensor, "batch length"]]) -> Float[Tensor, "batch dim"]:
        """Encode and pool."""
        mask = inputs["attention_mask"]
        output = self.transformer(input_ids=inputs["input_ids"], attention_mask=mask)
        states: Tensor = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


def train_tokenizer(sentences: Iterable[str], vocabulary: int = 8000) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer; the same sentences give the same tokenizer.

    Args:
        sentences: text to learn the vocabulary from.
        vocabulary: tokens at the most; a small text gives fewer.
    """
    texts = list(sentences)
    trained = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(char for text in texts for char in trained.normalize(text) if not char.isspace())
    characters = sorted(sorted(counts), key=lambda char: -counts[char])[:ALPHABET]
    # The trainer numbers the pieces inside words in the random order of a hash map, and breaks ties by number.
    # Given to it as special tokens, they come first and in our order; the tokenizer built below is rid of them.
    inside = [f"##{char}" for char in characters]
    trained.train_from_iterator(
        texts,
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        special_tokens=[*SPECIAL_TOKENS.values(), *inside],
        show_progress=False,
    )
    built = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=built._tokenizer, model_max_length=MAX_POSITIONS, **SPECIAL_TOKENS)


def small_transformer(
    vocabulary: int, dim: int = 128, layers: int = 2, dropout: float = 0.1, pooling: Pooling = "mean"
) -> TextEncoder:
    """A new small BERT: 2 layers, 128 wide.

    Position embeddings start at N(0, 0.005) and token embeddings at N(0, 0.05). With positions as large as tokens
    the features of an untrained encoder tell where words stand rather than which they are, and training is slow
    to undo it.

    Args:
        vocabulary: number of tokens.
        dim: width.
        layers: transformer layers.
        dropout: probability; it makes the views differ.
        pooling: as ``TextEncoder``.
    """
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=max(1, dim // 32),
        intermediate_size=4 * dim,
        max_position_embeddings=MAX_POSITIONS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformer = BertModel(config, add_pooling_layer=False)
    embeddings = transformer.embeddings
    with torch.no_grad():
        embeddings.word_embeddings.weight.normal_(std=0.05)
        embeddings.position_embeddings.weight.normal_(std=0.005)
        embeddings.token_type_embeddings.weight.zero_()
    return TextEncoder(transformer, pooling)


def pretrained_tokenizer(name: str) -> Any:
    """The tokenizer of a Hugging Face model, by hub name or folder.

    Raises:
        UserError: it can't be had, or has no token to pad with.
    """
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer of {name!r} has no padding token; batches of sentences need one.")
    return tokenizer


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer that a run has saved.

    Raises:
        UserError: the folder is not there, or holds no tokenizer.
    """
    if not folder.is_dir():
        # Without a folder of that name, the library would take its path for a model's name on the hub.
        raise UserError(
            f"The run's tokenizer is missing: there is no folder {folder}. Its encoder is of no use without it; "
            "bring the folder back, or train again with --overwrite."
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"The run's tokenizer in {folder} can't be read: {str(error).splitlines()[0]}") from error


def longest_input(transformer: nn.Module) -> int | None:
    """How many tokens a Hugging Face encoder has positions for; None where its configuration sets no limit."""
    positions = getattr(transformer.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in transformer.named_modules():
        # RoBERTa and its kin count positions from behind the padding's, so the first few are never used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - int(module.padding_idx) - 1  # type: ignore[arg-type]
    return positions


def check_length(length: int, limit: int | None, name: str) -> None:
    """Refuse sentences that an encoder has no positions for, before one comes along in the middle of a training.

    Raises:
        UserError: ``length`` is above ``limit``.
    """
    if limit is not None and length > limit:
        raise UserError(
            f"--max-length = {length}, but {name} takes at most {limit} tokens; set it to {limit} or less."
        )


def pretrained_encoder(name: str, pooling: Pooling) -> TextEncoder:
    """A Hugging Face encoder with its weights, by hub name or folder.

    Raises:
        UserError: it can't be had.
    """
    return TextEncoder(_load(AutoModel, name), pooling)


def _load(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        place = "folder" if Path(name).is_dir() else "name"
        raise UserError(
            f"No Hugging Face encoder could be loaded from the {place} {name!r}: {str(error).splitlines()[0]} "
            "Give a model's name or folder, or --encoder small-transformer to train one from scratch."
        ) from error
