import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.nlp.data import TokenizedTexts, by_length, find_texts
from contrastive_mm.nlp.domain import TextConfig, TextDomain
from contrastive_mm.nlp.encoders import TextEncoder, small_transformer, train_tokenizer
from contrastive_mm.nlp.views import DropoutViews
from contrastive_mm.views import encode_views

SENTENCES = ["a cat sat on the mat", "a dog ran", "the bird sang in the old tree all day long", "fish swim"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, 100)


def test_a_text_file_is_a_sentence_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße.\n\n  Two. \n")
    source = find_texts(str(tmp_path / "a.txt"))
    assert source.texts == ["Grüße.", "Two."]
    assert source.ids == ["line 1", "line 3"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"sentence": ["one, two", "three"], "topic": ["b", "a"]}), path)
    else:
        text = {
            "csv": 'sentence,topic\n"one, two",b\nthree,a\n',
            "tsv": "sentence\ttopic\none, two\tb\nthree\ta\n",
            "jsonl": '{"sentence": "one, two", "topic": "b"}\n{"sentence": "three", "topic": "a"}\n',
        }
        path.write_text(text[kind])
    source = find_texts(str(path), "sentence", "topic")
    assert source.texts == ["one, two", "three"]
    assert source.labels.tolist() == [1, 0]
    assert find_texts(str(path), "sentence", "nothing").labels is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nok\n\n  \n", r"a\.csv, row 2, column 'text'"),
        ("a.csv", "words\nok\n", r"row 1: no column 'text' \(--text-column\) among words"),
        ("a.jsonl", '{"text": "ok"}\n{"text": 7}\n', r"row 2, column 'text': no sentence, but 7"),
        ("a.jsonl", '{"text": "ok"}\n{oops\n', r"a\.jsonl, row 2: not JSON"),
        ("a.jsonl", "[1]\n", "a JSON object is needed, not list"),
        ("a.csv", "text,label\nok,1\nbad\n", "row 2, column 'label': no label"),
        ("a.txt", "\n\n", "no sentence"),
        ("a.csv", "text\n", "has no rows"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_texts(str(tmp_path / name))


def test_latin_1_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        find_texts(str(tmp_path / "a.txt"))


def test_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]}).to_parquet(tmp_path / "train.parquet")
    source = find_texts(f"hf:{tmp_path}")
    assert source.texts == ["one", "two"]
    assert source.class_names == ["0", "1"]


def test_pydoc_topics_are_labelled_and_never_twice():
    source = find_texts("pydoc-topics")
    assert len(source.texts) > 2000
    assert len(set(source.texts)) == len(source.texts)
    assert len(source.class_names) > 50


def test_the_same_sentences_give_the_same_tokenizer_in_every_process():
    code = (
        "import hashlib, json; from contrastive_mm.nlp.encoders import train_tokenizer; "
        "from contrastive_mm.nlp.data import find_texts; texts = find_texts('pydoc-topics').texts; "
        "vocabulary = sorted(train_tokenizer(texts, 1500).get_vocab().items()); "
        "print(len(vocabulary), hashlib.md5(json.dumps(vocabulary).encode()).hexdigest())"
    )
    said = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(said) == 1
    assert 1000 < int(said.pop().split()[0]) <= 1500


def test_words_are_split_into_pieces_and_put_together_again(tokenizer):
    assert tokenizer.decode(tokenizer("A cat sang")["input_ids"]) == "[CLS] a cat sang [SEP]"
    assert tokenizer.tokenize("tr##ee") != ["tr", "##ee"], "marks in a text are not taken for pieces"
    assert tokenizer("ж")["input_ids"][1] == tokenizer.unk_token_id


def test_batches_are_padded_to_their_longest(tokenizer):
    tokens = TokenizedTexts(SENTENCES, tokenizer, 8)
    batch = tokens.batch(torch.tensor([1, 2]))
    assert batch["input_ids"].shape == (2, 8), "cut at the limit"
    assert batch["attention_mask"].sum(1).tolist() == tokens.lengths[[1, 2]].tolist()
    assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == tokenizer.pad_token_id).all()


def test_length_buckets_lose_nobody_and_save_padding(generator):
    lengths = torch.randint(3, 40, (1000,), generator=generator)
    order = torch.randperm(1000, generator=generator)
    sorted_order = by_length(order, lengths, 32, generator)
    assert sorted(sorted_order.tolist()) == list(range(1000))

    def padded(rows):
        return sum(int(lengths[part].max()) * len(part) for part in rows.split(32))

    assert padded(sorted_order) < 0.75 * padded(order)
    means = torch.stack([lengths[part].float().mean() for part in sorted_order[:992].split(32)])
    assert not torch.equal(means, means.sort().values), "the batches themselves are shuffled"


def test_dropout_makes_two_views_of_one_sentence(tokenizer):
    encoder = small_transformer(len(tokenizer)).train()
    tokens = TokenizedTexts(SENTENCES, tokenizer, 32)
    views = DropoutViews()(tokens.batch(torch.arange(4)))
    first, second = encode_views(encoder, views.inputs)
    assert float((first - second).detach().abs().max()) > 1e-3
    same = encode_views(encoder.eval(), views.inputs)
    torch.testing.assert_close(same[0], same[1])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_feature(tokenizer, pooling):
    encoder = small_transformer(len(tokenizer), pooling=pooling).eval()
    tokens = TokenizedTexts(SENTENCES, tokenizer, 32)
    alone = encoder(tokens.batch(torch.tensor([3])))
    padded = encoder(tokens.batch(torch.tensor([3, 2])))[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-4)


def test_positions_start_small(tokenizer):
    embeddings = small_transformer(len(tokenizer)).transformer.embeddings
    assert float(embeddings.position_embeddings.weight.detach().std()) < 0.01
    assert float(embeddings.word_embeddings.weight.detach().std()) > 0.04


def test_a_hugging_face_folder_is_an_encoder(tmp_path, tokenizer):
    small_transformer(len(tokenizer)).transformer.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    config = TextConfig(data=str(tmp_path / "a.txt"), encoder=str(tmp_path / "model"), pooling="cls")
    domain = TextDomain(config, 0)
    encoder = domain.build_encoder()
    assert isinstance(encoder, TextEncoder)
    embedded = domain.embed(encoder)
    assert embedded.features.shape == (20, 128)
    same = embedded.features[[0, 4, 8]]
    torch.testing.assert_close(same[0], same[1], atol=1e-5, rtol=1e-4)


def test_embedding_keeps_the_order_of_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    domain = TextDomain(TextConfig(data=str(tmp_path / "a.txt"), vocabulary=100), 0)
    encoder = domain.build_encoder().eval()
    alone = torch.cat([encoder(domain.tokens.batch(torch.tensor([row]))) for row in range(4)])
    torch.testing.assert_close(domain.embed(encoder).features[:4], alone.detach(), atol=1e-5, rtol=1e-4)


def test_a_tokenizer_without_padding_is_named(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / name
        if file.exists():
            file.write_text(file.read_text().replace('"pad_token"', '"no_token"'))
    from contrastive_mm.nlp.encoders import pretrained_tokenizer

    with pytest.raises(UserError, match="no padding token"):
        pretrained_tokenizer(str(tmp_path))
