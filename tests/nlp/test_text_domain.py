"""What the text domain learns from, what it is scored on, and what it refuses before training."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import contrastive_mm.nlp.domain as text_domain
from contrastive_mm.errors import UserError
from contrastive_mm.nlp.domain import TextConfig, TextDomain
from contrastive_mm.nlp.encoders import longest_input, train_tokenizer

CLASSES, EACH = 3, 8
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def class_of(row):
    """Classes stand one behind the other, so that the parts alternate and a row is not its place in its part."""
    return row // EACH


def letter(row):
    """A character of its own for each row, which no other row has."""
    return chr(0x4E00 + row)


@pytest.fixture
def domain(tmp_path):
    lines = [f"{letter(row)} of many,class {class_of(row)}" for row in range(CLASSES * EACH)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return TextDomain(TextConfig(data=str(tmp_path / "a.csv"), batch_size=4, vocabulary=200), 0)


class Recorder(torch.nn.Module):
    """An encoder whose feature is the first token behind the frame; it notes what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, inputs):
        tokens = inputs["input_ids"][:, 1]
        self.seen.append(tokens)
        return torch.stack([tokens.float(), torch.ones(len(tokens))], dim=1)


def test_an_epoch_holds_training_rows_only_and_each_with_its_label(domain):
    seen = []
    for batch in domain.train_batches():
        rows = domain.train_rows[batch["index"]]
        assert torch.equal(batch["label"], class_of(rows))
        assert torch.equal(domain.tokens.batch(rows)["input_ids"], batch["input_ids"])
        views = domain.make_views(batch)
        assert torch.equal(views.labels, batch["label"])
        seen += rows.tolist()
    held_back = domain.validation_rows.tolist()
    assert held_back == [6, 7, 14, 15, 22, 23], "the last three tenths of each class, rounded"
    assert len(seen) == len(set(seen)) == 16, "18 of them, less the batch that is not full"
    assert set(seen) <= set(domain.train_rows.tolist())
    assert not set(seen) & set(held_back)


def test_batches_without_classes_have_no_label(tmp_path):
    (tmp_path / "a.txt").write_text("one cat\ntwo cats\nthree cats\n")
    batch = next(iter(TextDomain(TextConfig(data=str(tmp_path / "a.txt"), batch_size=2), 0).train_batches()))
    assert set(batch) == {"input_ids", "attention_mask", "index"}


def test_the_tokenizer_learns_from_the_training_part_alone(domain):
    known = set(domain.tokenizer.get_vocab())
    assert {letter(row) for row in domain.train_rows.tolist()} <= known
    assert not {letter(row) for row in domain.validation_rows.tolist()} & known


def test_scores_are_learned_from_training_rows_and_measured_on_validation_rows(domain, monkeypatch):
    # Every character gets a token of its own, so that the recorder's features name their rows.
    domain.tokenizer = train_tokenizer(domain.source.texts, 200)
    domain.tokens = text_domain.TokenizedTexts(domain.source.texts, domain.tokenizer, 16)
    token = {domain.tokenizer.convert_tokens_to_ids(letter(row)): row for row in range(CLASSES * EACH)}
    calls = []
    monkeypatch.setattr(text_domain, "retrieval_scores", lambda *given: calls.append((*given[2:], *given[:2])) or {})
    monkeypatch.setattr(text_domain, "linear_probe_accuracy", lambda *given: calls.append(given) or 0.0)
    recorder = Recorder()
    domain.evaluate(recorder)
    assert len(calls) == 2
    for train, train_labels, test, test_labels in calls:
        rows = [[token[int(feature)] for feature in features[:, 0]] for features in (train, test)]
        assert sorted(rows[0]) == domain.train_rows.tolist()
        assert sorted(rows[1]) == domain.validation_rows.tolist()
        for numbers, labels in zip(rows, (train_labels, test_labels), strict=True):
            assert [class_of(number) for number in numbers] == labels.tolist()
    assert len(torch.cat(recorder.seen)) == CLASSES * EACH, "each sentence is encoded once"


def test_both_parts_are_capped_alike_for_every_encoder(domain, monkeypatch):
    monkeypatch.setattr(text_domain, "EVALUATION_ROWS", 5)
    sizes, queries = [], []

    def note(test, test_labels, train, train_labels):
        sizes.append((len(test), len(train)))
        queries.append(test_labels.tolist())
        return {}

    monkeypatch.setattr(text_domain, "retrieval_scores", note)
    monkeypatch.setattr(text_domain, "linear_probe_accuracy", lambda *given: 0.0)
    for encoder in (Recorder(), None):
        domain.evaluate(encoder)
    assert sizes == [(5, 5), (5, 5)]
    assert queries[0] == queries[1]


def test_raw_words_are_learned_from_the_training_part_alone(domain):
    domain.source.texts = ["known" if row in domain.train_rows else "unknown" for row in range(CLASSES * EACH)]
    assert domain.embed(None).features.shape == (6, 1)
    assert not domain.embed(None).features.any(), "a word that only validation has is no column"


@pytest.mark.parametrize("texts", [["a b", "b c", "a c"] * 4, ["!?", "?", "..."] * 4])
def test_texts_without_words_are_scored_by_their_characters(tmp_path, texts):
    lines = "\n".join(f"{text},{number % 3}" for number, text in enumerate(texts))
    (tmp_path / "a.csv").write_text(f"text,label\n{lines}\n")
    scores = TextDomain(TextConfig(data=str(tmp_path / "a.csv")), 0).evaluate(None)
    assert scores["precision_at_1"] == 1.0


def test_one_sentence_has_no_score(tmp_path):
    (tmp_path / "a.txt").write_text("only one\n")
    domain = TextDomain(TextConfig(data=str(tmp_path / "a.txt")), 0)
    for encoder in (None, domain.build_encoder()):
        with pytest.raises(UserError, match="1 samples have no spread to score"):
            domain.evaluate(encoder)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    scores = TextDomain(TextConfig(data=str(tmp_path / "a.txt")), 0).evaluate(None)
    assert all(math.isfinite(score) for score in scores.values())


def test_a_run_without_its_tokenizer_is_named(tmp_path, domain):
    config = domain.config
    with pytest.raises(UserError, match=r"no folder .*tokenizer"):
        TextDomain(config, 0, saved=tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"tokenizer in .*tokenizer can't be read"):
        TextDomain(config, 0, saved=tmp_path)
    domain.save(tmp_path)
    assert TextDomain(config, 0, saved=tmp_path).tokenizer.get_vocab() == domain.tokenizer.get_vocab()


def test_the_small_transformer_takes_512_tokens_and_no_more(tmp_path):
    with pytest.raises(UserError, match="--max-length = 513, but small-transformer takes at most 512"):
        TextConfig(max_length=513)
    (tmp_path / "a.txt").write_text("a " * 600)
    domain = TextDomain(TextConfig(data=str(tmp_path / "a.txt"), max_length=512), 0)
    assert domain.embed(domain.build_encoder()).features.isfinite().all()


@pytest.mark.parametrize(
    ("model", "config", "limit"),
    [
        (BertModel, BertConfig(max_position_embeddings=20, intermediate_size=16, **SIZES), 20),
        (RobertaModel, RobertaConfig(max_position_embeddings=20, intermediate_size=16, **SIZES), 18),
    ],
)
def test_a_pretrained_encoder_takes_as_many_tokens_as_it_has_positions(tmp_path, model, config, limit):
    folder = tmp_path / "model"
    encoder = model(config).eval()
    encoder.save_pretrained(folder)
    train_tokenizer(["a word and another"], 60).save_pretrained(folder)
    (tmp_path / "a.txt").write_text("a word " * 30)
    # The limit is the last length that works: one more, and the model itself fails.
    mask = torch.ones(1, limit + 1, dtype=torch.long)
    encoder(input_ids=7 * mask[:, 1:], attention_mask=mask[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        encoder(input_ids=7 * mask, attention_mask=mask)
    data = {"data": str(tmp_path / "a.txt"), "encoder": str(folder)}
    domain = TextDomain(TextConfig(**data, max_length=limit), 0)
    assert domain.embed(domain.build_encoder()).features.isfinite().all()
    with pytest.raises(UserError, match=rf"--max-length = {limit + 1}, but .*model takes at most {limit} tokens"):
        TextDomain(TextConfig(**data, max_length=limit + 1), 0).build_encoder()


@pytest.mark.parametrize("settings", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": -1}])
def test_a_model_without_a_limit_has_none(settings):
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(**settings)
    assert longest_input(model) is None
