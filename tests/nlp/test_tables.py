"""Files as they come: odd line ends, byte order marks, quotes, long fields, damage."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive_mm.errors import UserError
from contrastive_mm.nlp.data import find_texts


def read(tmp_path, name, content, **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return find_texts(str(path), **columns)


def test_a_quoted_newline_stays_in_its_sentence(tmp_path):
    source = read(tmp_path, "a.csv", 'text,label\n"one\ntwo",x\r\n"three\r\nfour",y\n')
    assert source.texts == ["one\ntwo", "three\r\nfour"]
    assert source.ids == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text,label\nok,1\n"never closed,1\nnext,2\n', 3),
        ('text,label\n"two\nlines",1\n\n"open,1\nlast "word",2\n', 5),
        ('text,label\n"closed" too early,1\n', 2),
    ],
)
def test_an_unbalanced_quote_is_named_by_the_line_where_its_row_begins(tmp_path, content, line):
    with pytest.raises(UserError, match=rf"a\.csv, line {line}: .*quote"):
        read(tmp_path, "a.csv", content)


def test_a_sentence_cut_by_a_comma_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv, line 3: 3 fields, where the header has 2.*quotes"):
        read(tmp_path, "a.csv", "text,label\nok,1\nwell, no,1\n")
    assert read(tmp_path, "b.csv", "text,label\nok,1,,\n").texts == ["ok"], "empty fields at the end lose nothing"


@pytest.mark.parametrize(
    ("kind", "mark"),
    [
        *((kind, mark) for kind in ("txt", "csv") for mark in "\u2028\u2029\x85\x0b\x0c\x1c\r"),
        *(("jsonl", mark) for mark in "\u2028\u2029\x85"),  # JSON writes control characters as escapes
    ],
)
def test_only_line_ends_split_lines(tmp_path, kind, mark):
    text = f"one{mark}two"
    quoted = f'"{text}"'
    content = {"txt": f"{text}\r\nthree\n", "csv": f"text\n{quoted}\nthree\n"}
    content["jsonl"] = f'{{"text": {quoted}}}\r\n{{"text": "three"}}\n'
    source = read(tmp_path, f"a.{kind}", content[kind])
    assert source.texts == [text, "three"]
    assert source.ids == (["line 1", "line 2"] if kind == "txt" else ["row 1", "row 2"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n"),
        ("a.csv", "text,label\none,1\ntwo,2\n"),
        ("a.csv", '"text",label\none,1\ntwo,2\n'),
        ("a.tsv", "text\tlabel\none\t1\ntwo\t2\n"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    assert read(tmp_path, name, b"\xef\xbb\xbf" + content.encode()).texts == ["one", "two"]


def test_bytes_are_counted_from_the_first_of_the_file(tmp_path):
    with pytest.raises(UserError, match="not UTF-8 at byte 5"):
        read(tmp_path, "a.csv", b"\xef\xbb\xbfte\xff")


def test_a_field_may_be_long_and_csv_keeps_its_limit_elsewhere(tmp_path):
    text = "word " * 40_000
    before = csv.field_size_limit(1000)
    try:
        assert read(tmp_path, "a.csv", f"text\n{text}\n").texts == [text.strip()]
        with pytest.raises(UserError):
            read(tmp_path, "b.csv", 'text\n"open')
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_rows_may_end_as_old_macintoshes_end_them(tmp_path):
    assert read(tmp_path, "a.csv", "text,label\rone,1\rtwo,2\r").texts == ["one", "two"]


@pytest.mark.parametrize("name", ["a.CSV", "a.Tsv", "a.JSONL", "a.PARQUET"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, name):
    content = {"a.CSV": "text,n\none,1\n", "a.Tsv": "text\tn\none\t1\n", "a.JSONL": '{"text": "one"}\n'}
    if name in content:
        (tmp_path / name).write_text(content[name])
    else:
        pq.write_table(pa.table({"text": ["one"]}), tmp_path / name)
    assert find_texts(str(tmp_path / name)).texts == ["one"]


def test_an_empty_label_is_no_class(tmp_path):
    assert read(tmp_path, "a.csv", "text,label\none,\ntwo, \n").labels is None
    with pytest.raises(UserError, match=r"row 2, column 'label': no label"):
        read(tmp_path, "a.csv", "text,label\none,x\ntwo,\n")
    pq.write_table(pa.table({"text": ["one", "two"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2, column 'label': no label"):
        find_texts(str(tmp_path / "a.parquet"))


def test_a_row_keeps_its_number_behind_quoted_newlines_and_empty_lines(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv, row 3, column 'text': no sentence"):
        read(tmp_path, "a.csv", 'text,label\n"a\nb\nc",1\n\nok,1\n" ",2\n')
    with pytest.raises(UserError, match=r"a\.jsonl, row 2, column 'text': no sentence, but None"):
        read(tmp_path, "a.jsonl", '{"text": "ok"}\n\n{"text": null}\n')


def test_half_a_surrogate_pair_is_named(tmp_path):
    with pytest.raises(UserError, match=r"row 1, column 'text': character 4 is half of a surrogate pair"):
        read(tmp_path, "a.jsonl", '{"text": "abc\\ud83d"}\n')


@pytest.mark.parametrize("line", ["[" * 100_000, f'{{"text": "a", "n": {"7" * 5000}}}'])
def test_json_beyond_the_reader_is_named(tmp_path, line):
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: "):
        read(tmp_path, "a.jsonl", '{"text": "ok"}\n' + line)


def test_a_damaged_parquet_file_is_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": [f"sentence {number}" for number in range(500)]}), whole)
    content = whole.read_bytes()
    for damaged in (b"", b"text\none\n", content[: len(content) // 2], content[:4] + b"\xff" * 2000 + content[2004:]):
        with pytest.raises(UserError, match=r"a\.parquet can't be read as Parquet: ."):
            read(tmp_path, "a.parquet", damaged)
