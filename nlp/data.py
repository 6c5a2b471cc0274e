"""Where sentences come from: text files, tables with named columns, Hugging Face data sets."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.nlp.tables import TABLE_SUFFIXES, read_lines, read_table

NAMED_SETS = ["pydoc-topics"]
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
SENTENCE_WORDS = range(5, 60)


@dataclass
class TextSource:
    """Sentences.

    Attributes:
        texts: the sentences.
        ids: a name for each: its line or row.
        labels: (N,) class numbers, or None.
        class_names: name of each class.
    """

    texts: list[str]
    ids: list[str]
    labels: Tensor | None = None
    class_names: list[str] | None = None


def find_texts(data: str, text_column: str = "text", label_column: str = "label") -> TextSource:
    """Read sentences by path or name.

    Args:
        data: a text file (a sentence a line); a CSV, TSV, JSONL or Parquet table; ``pydoc-topics``, the help
            texts of Python's standard library; or a Hugging Face data set, ``hf:owner/name`` (``:split`` behind it).
        text_column: column of a table that holds the sentences.
        label_column: column that holds classes; a table without it, or with nothing in it, is unlabelled.

    Raises:
        UserError: nothing is there, a row can't be read (file, row and column are named), or no sentence is left.
    """
    if not data:
        raise UserError("--data is missing: give a text file, a table, or pydoc-topics.")
    path = Path(data).expanduser()
    if data == "pydoc-topics":
        return _pydoc_topics()
    if data.startswith("hf:"):
        return _hugging_face(data[3:], text_column, label_column)
    if not path.is_file():
        if path.exists() or path.suffix or "/" in data:
            raise UserError(f"{data} is not a file. Give a text file, a table, or hf:owner/name.")
        raise unknown_name("data set (and no such file)", data, NAMED_SETS)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _from_rows(read_table(path), str(path), text_column, label_column)
    kept = [(number, line.strip()) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if not kept:
        raise UserError(f"{path} has no sentence in it.")
    return TextSource([text for _, text in kept], [f"line {number}" for number, _ in kept])


def _from_rows(rows: Iterable[dict[str, Any]], source: str, text_column: str, label_column: str) -> TextSource:
    texts, labels = [], []
    for number, row in enumerate(rows, 1):
        if text_column not in row:
            columns = ", ".join(str(name) for name in row)
            raise UserError(f"{source}, row {number}: no column {text_column!r} (--text-column) among {columns}.")
        texts.append(_sentence(row[text_column], f"{source}, row {number}, column {text_column!r}"))
        label = row.get(label_column)
        # NaN, which alone differs from itself, is how tables of numbers say that nothing is there.
        labels.append(None if label is None or label != label else str(label).strip() or None)
    if not texts:
        raise UserError(f"{source} has no rows.")
    ids = [f"row {number}" for number in range(1, len(texts) + 1)]
    present = [label for label in labels if label is not None]
    if not present:
        return TextSource(texts, ids)
    if len(present) < len(labels):
        number = labels.index(None) + 1
        raise UserError(f"{source}, row {number}, column {label_column!r}: no label, where other rows have one.")
    return TextSource(texts, ids, *_as_labels(present))


def _sentence(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: no sentence, but {value!r}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"{place}: character {error.start + 1} is half of a surrogate pair.") from error
    return value.strip()


def _as_labels(values: list[str]) -> tuple[Tensor, list[str]]:
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[value] for value in values]), names


def _pydoc_topics() -> TextSource:
    from pydoc_data.topics import topics

    rows: dict[str, dict[str, Any]] = {}
    # Long articles repeat short ones whole: a sentence belongs to the shortest article that has it.
    for topic, article in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        for paragraph in article.split("\n\n"):
            # Code is indented by five or more columns; up to there it is prose, with some markup left.
            if paragraph.startswith("     "):
                continue
            prose = re.sub(r"[*`\"]", "", " ".join(paragraph.split()))
            for sentence in SENTENCE_END.split(prose):
                if len(sentence.split()) in SENTENCE_WORDS:
                    rows.setdefault(sentence, {"text": sentence, "label": topic})
    # Articles end in notes on versions, unlike their beginnings; shuffled, a held-back part is like the rest.
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return _from_rows(shuffled, "pydoc_data.topics", "text", "label")


def _hugging_face(name: str, text_column: str, label_column: str) -> TextSource:
    try:
        import datasets
    except ImportError as error:
        raise UserError('Hugging Face data sets need one more package: pip install "contrastive_mm[hub]".') from error
    owner_and_name, _, split = name.partition(":")
    try:
        dataset = datasets.load_dataset(owner_and_name, split=split or "train")
    except Exception as error:  # the library raises many kinds, for a missing name, split, file and network
        raise UserError(f"Hugging Face data set {name!r} could not be loaded: {error}") from error
    return _from_rows(dataset, f"hf:{name}", text_column, label_column)


class TokenizedTexts:
    """Token ids of all sentences, and padded batches of them.

    Args:
        texts: the sentences.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens kept of each sentence.
    """

    def __init__(self, texts: list[str], tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
        self._ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self._padding = int(tokenizer.pad_token_id)
        self.lengths = torch.tensor([len(ids) for ids in self._ids])

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, rows: Int[Tensor, " batch"]) -> dict[str, Int[Tensor, "batch length"]]:
        """``input_ids`` and ``attention_mask`` of these sentences, padded to the longest of them."""
        members = [self._ids[row] for row in rows.tolist()]
        ids = pad_sequence(members, batch_first=True, padding_value=self._padding)
        mask = torch.arange(ids.shape[1])[None] < self.lengths[rows][:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}


def by_length(
    permutation: Int[Tensor, " samples"],
    lengths: Int[Tensor, " samples"],
    batch_size: int,
    generator: torch.Generator,
    window: int = 8,
) -> Int[Tensor, " samples"]:
    """Reorder a permutation into batches of similar length, which need little padding.

    Sentences are sorted by length only inside windows of a few batches, and the batches are shuffled: a sentence
    meets others in every epoch, and the model can't tell from the step which lengths its negatives have.

    Args:
        permutation: the epoch's order.
        lengths: tokens of each sample.
        batch_size: samples a batch.
        generator: shuffles the batches.
        window: batches that are sorted together.
    """
    full = len(permutation) // batch_size * batch_size
    pieces = []
    for rows in permutation[:full].split(window * batch_size):
        pieces += list(rows[lengths[rows].argsort(stable=True)].split(batch_size))
    order = torch.randperm(len(pieces), generator=generator).tolist()
    return torch.cat([*(pieces[number] for number in order), permutation[full:]])
