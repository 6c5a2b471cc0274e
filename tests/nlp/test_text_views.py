"""Crops of sentences: what a span may be, how it is drawn, and what stays around it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from contrastive_mm.configuration import parse_run
from contrastive_mm.errors import UserError
from contrastive_mm.nlp.data import TokenizedTexts
from contrastive_mm.nlp.domain import TextConfig, TextDomain
from contrastive_mm.nlp.encoders import train_tokenizer
from contrastive_mm.nlp.views import CropViews, DropoutViews, frame_of

CLS, SEP, PAD = 101, 102, 9


def batch_of(*sentences, frame=(1, 1), padding=PAD):
    """Right-padded tokens; each sentence is a list of ids that do not hold the frame."""
    framed = [[CLS] * frame[0] + sentence + [SEP] * frame[1] for sentence in sentences]
    longest = max(map(len, framed))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in framed])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in framed])
    return {"input_ids": ids, "attention_mask": mask}


def spans_of(view, frame=(1, 1), padding=PAD):
    """The tokens inside the frame of each row, after a look at the frame and at the padding."""
    spans = []
    for ids, mask in zip(view["input_ids"].tolist(), view["attention_mask"].tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert ids[length:] == [padding] * (len(ids) - length)
        assert ids[: frame[0]] == [CLS] * frame[0]
        assert ids[length - frame[1] : length] == [SEP] * frame[1]
        spans.append(ids[frame[0] : length - frame[1]])
    return spans


@pytest.mark.parametrize("frame", [(1, 1), (0, 1), (2, 0), (0, 0)])
def test_a_view_is_one_span_of_the_sentence_in_its_frame(frame):
    sentences = [list(range(1000 * row, 1000 * row + length)) for row, length in enumerate((1, 2, 7, 20, 20, 13), 1)]
    make_views = CropViews(0.25, 0.6, frame, PAD)
    for _ in range(50):
        views = make_views(batch_of(*sentences, frame=frame))
        assert views.inputs[0]["input_ids"].shape == views.inputs[1]["input_ids"].shape
        for view in views.inputs:
            for span, sentence in zip(spans_of(view, frame), sentences, strict=True):
                start = sentence.index(span[0])
                assert span == sentence[start : start + len(span)]
                assert 0.25 * len(sentence) <= len(span) < 0.6 * len(sentence) + 1


def test_every_length_and_every_place_occurs_about_equally_often():
    sentence = list(range(10))
    make_views = CropViews(0.2, 0.5, (1, 1), PAD)
    spans = []
    for _ in range(20):
        spans += spans_of(make_views(batch_of(*[sentence] * 400)).inputs[1])
    lengths = [len(span) for span in spans]
    # The share is uniform in [0.2, 0.5] and counted up: just above 2, 3 and 4 of 10 tokens.
    assert {length: round(lengths.count(length) / len(spans), 1) for length in set(lengths)} == {
        3: 0.3,
        4: 0.3,
        5: 0.3,
    }
    starts = [span[0] for span in spans if len(span) == 5]
    shares = [starts.count(start) / len(starts) for start in range(6)]
    assert sum(shares) == 1
    assert max(abs(share - 1 / 6) for share in shares) < 0.03


def test_spans_of_the_two_views_and_of_the_samples_are_independent():
    batch = batch_of(*[list(range(30))] * 64)
    first, second = (spans_of(view) for view in CropViews(0.2, 0.5, (1, 1), PAD)(batch).inputs)
    assert len({tuple(span) for span in first}) > 20
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    assert any(not set(a) & set(b) for a, b in zip(first, second, strict=True)), "some pairs share no token"
    assert any(set(a) & set(b) for a, b in zip(first, second, strict=True)), "and some do"


def test_a_whole_sentence_is_the_largest_crop():
    sentences = [[1, 2, 3], [4], [5, 6, 7, 8]]
    batch = batch_of(*sentences)
    view = CropViews(1.0, 1.0, (1, 1), PAD)(batch).inputs[0]
    assert torch.equal(view["input_ids"], batch["input_ids"])
    assert torch.equal(view["attention_mask"], batch["attention_mask"])


def test_a_sentence_without_tokens_stays_an_empty_frame():
    assert spans_of(CropViews(0.2, 0.5, (1, 1), PAD)(batch_of([], [1, 2, 3])).inputs[0])[0] == []


def test_ids_and_labels_stay_with_their_sentences():
    batch = {**batch_of([1], [2]), "index": torch.tensor([7, 8]), "label": torch.tensor([1, 0])}
    views = CropViews(0.2, 0.5, (1, 1), PAD)(batch)
    assert views.sample_ids.tolist() == [7, 8]
    assert views.labels.tolist() == [1, 0]


def test_the_stream_is_the_views_own_and_goes_on_where_it_was():
    batch = batch_of(*[list(range(30))] * 8)
    make_views = CropViews(0.2, 0.5, (1, 1), PAD, seed=3)
    state_before = torch.get_rng_state()
    make_views(batch)
    assert torch.equal(torch.get_rng_state(), state_before)
    state = make_views.state_dict()
    expected = make_views(batch).inputs[1]["input_ids"]
    other = CropViews(0.2, 0.5, (1, 1), PAD, seed=4)
    assert not torch.equal(other(batch).inputs[1]["input_ids"], expected)
    other.load_state_dict(state)
    assert torch.equal(other(batch).inputs[1]["input_ids"], expected)


def word_tokenizer(template):
    """A tokenizer of whole words that frames sentences by a template, as T5's or GPT-2's would."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        built.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", unk_token="<unk>", model_max_length=512)


@pytest.mark.parametrize(
    ("template", "frame"),
    [("$A </s>", (0, 1)), ("<s> $A </s>", (1, 1)), ("<s> $A </s> </s>", (1, 2)), (None, (0, 0))],
)
def test_the_frame_is_what_the_tokenizer_makes_it(template, frame):
    tokenizer = word_tokenizer(template)
    assert frame_of(tokenizer, "one two elephant") == frame
    assert frame_of(tokenizer, "elephant") == frame, "an unknown word is not a part of the frame"
    batch = TokenizedTexts(["one two three"], tokenizer, 16).batch(torch.tensor([0]))
    inner = set(CropViews(0.3, 0.3, frame, 0).crop(**named(batch))["input_ids"][0].tolist())
    assert len(inner & {4, 5, 6}) == 1
    assert inner - {4, 5, 6} == set(batch["input_ids"][0].tolist()) - {4, 5, 6}


def named(batch):
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"]}


def test_a_trained_tokenizer_frames_with_two_tokens():
    assert frame_of(train_tokenizer(["a cat sat on the mat"] * 3, 100), "a cat") == (1, 1)


@pytest.fixture
def sentences(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"word{row} " * 4 + "and the end of it" for row in range(12)))
    return str(tmp_path / "a.txt")


def test_the_domain_makes_the_views_that_are_asked_for(sentences):
    assert isinstance(TextDomain(TextConfig(data=sentences), 0).make_views, DropoutViews)
    config = TextConfig(data=sentences, views="crops", crop_least=0.5, crop_most=0.5, batch_size=4)
    first, second = (TextDomain(config, seed) for seed in (0, 1))
    batch = next(iter(first.train_batches()))
    views = first.make_views(batch)
    words = batch["attention_mask"].sum(1) - 2
    assert torch.equal(views.inputs[0]["attention_mask"].sum(1), (words / 2).ceil().long() + 2)
    ids = [view["input_ids"] for view in (*views.inputs, second.make_views(batch).inputs[0])]
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2]), "another seed, other crops"


@pytest.mark.parametrize("flags", [["--crop-least=0"], ["--crop-least=0.6"], ["--crop-most=1.2"]])
def test_shares_out_of_range_are_named(flags, sentences):
    with pytest.raises(UserError, match=r"--crop-least = .* and --crop-most = "):
        parse_run("nlp", [f"--data={sentences}", "--views=crops", *flags])
