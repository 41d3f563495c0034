"""Files and folders of every kind, read by the one loader."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data import sources
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, Document, load_corpus
from teacher_cache.stages.data.opening import SourceUnavailable
from teacher_cache.stages.data.tables import Format
from tests.stand_ins import write_acl_imdb, write_hub_parquet

# What readers of csv like to spoil: NA and null, numbers, quotes, separators, lines in a text.
ROWS = [
    ("NA", "pos"),
    ("null", "neg"),
    ("007", "pos"),
    ('a "fine", really\tfine film', "neg"),
    ("two\nlines", "pos"),
    ("naïve 电影 🎬", "neg"),
]


def _quoted(separator: str) -> bytes:
    def field(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    rows = [("text", "label"), *ROWS]
    return "".join(separator.join(map(field, row)) + "\n" for row in rows).encode()


def _json_lines() -> bytes:
    return "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS).encode()


def _json_list() -> bytes:
    return json.dumps([{"text": text, "label": label} for text, label in ROWS]).encode()


CONTENTS: dict[str, Callable[[], bytes]] = {
    ".csv": lambda: _quoted(","),
    ".tsv": lambda: _quoted("\t"),
    ".jsonl": _json_lines,
    ".json": _json_list,
}


def _load(source: Path | str, **settings: object) -> Corpus:
    return load_corpus(CorpusConfig.model_validate({"source": str(source), **settings}))


def _documents(corpus: Corpus) -> list[Document]:
    """In the order of the source."""
    return sorted(corpus.documents(0, len(corpus)), key=lambda document: document.position)


def _texts(corpus: Corpus) -> list[str]:
    return [document.text for document in _documents(corpus)]


@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress])
@pytest.mark.parametrize("extension", list(CONTENTS))
def test_tables(tmp_path, extension, compress):
    content = CONTENTS[extension]()
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[compress]
    path = tmp_path / f"films{extension}{suffix}"
    path.write_bytes(compress(content) if compress else content)
    corpus = _load(path)
    assert _texts(corpus) == [text for text, _ in ROWS]
    assert corpus.label_names == ("neg", "pos")
    assert [document.label for document in _documents(corpus)] == [1, 0, 1, 0, 1, 0]
    assert [document.split for document in corpus.documents(0, 1)] == ["films"]
    assert os.listdir(tmp_path) == [path.name]


def test_parquet(tmp_path):
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "films.parquet")
    corpus = _load(tmp_path / "films.parquet")
    assert _texts(corpus) == columns["text"]
    assert corpus.label_names == ("neg", "pos")


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress)])
def test_plain_text_is_one_document_a_line(tmp_path, suffix, compress):
    path = tmp_path / f"lines.txt{suffix}"
    path.write_bytes(compress("first\r\n\nthird\u2028still third\nlast".encode()))
    corpus = _load(path, labeled=False)
    assert _texts(corpus) == ["first", "", "third\u2028still third", "last"]
    assert _documents(corpus)[0].label is None


def test_a_path_may_hold_wildcards(tmp_path):
    folder = tmp_path / "we[i]rd *{a,b}? dir"
    folder.mkdir()
    (folder / "films.csv").write_bytes(_quoted(","))
    assert len(_load(folder / "films.csv")) == len(ROWS)
    assert len(_load(folder)) == len(ROWS)


def test_a_file_that_changed_is_read_anew_even_with_its_old_time(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n")
    before = path.stat()
    first = _load(path, labeled=False)
    path.write_text("two\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = _load(path, labeled=False)
    assert (_texts(first), _texts(second)) == (["one"], ["two"])
    assert first.identity["content_sha256"] != second.identity["content_sha256"]


def test_the_identity_is_the_content_and_not_the_path(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "films.csv").write_bytes(_quoted(","))
    first, second = (_load(tmp_path / name / "films.csv") for name in ("here", "there"))
    assert first.identity == second.identity
    assert str(tmp_path) not in json.dumps(first.identity)
    assert first.documents(0, len(first)) == second.documents(0, len(second))


def test_acl_imdb(tmp_path):
    folder = write_acl_imdb(tmp_path / "aclImdb", num_train=20, num_test=10, num_unsupervised=7)
    before = sorted(folder.rglob("*"))
    train, test = _load(folder), _load(folder, split="test")
    assert (len(train), len(test)) == (20, 10)
    assert train.label_names == ("neg", "pos")
    for document in train.documents(0, 20):
        name = ("neg", "pos")[document.label or 0]
        assert document.text in {path.read_text() for path in (folder / "train" / name).iterdir()}
    unlabeled = _load(folder, split="unsupervised", labeled=False)
    assert len(unlabeled) == 7
    assert unlabeled.documents(0, 1)[0].label is None
    assert sorted(folder.rglob("*")) == before


def test_acl_imdb_elsewhere_is_the_same_corpus(tmp_path):
    first = _load(write_acl_imdb(tmp_path / "a", num_train=9))
    second = _load(write_acl_imdb(tmp_path / "b", num_train=9))
    assert first.identity == second.identity
    assert first.documents(0, 9) == second.documents(0, 9)


def test_class_folders_without_splits_are_sorted_by_name(tmp_path):
    for name, text in (("sad", "Tears."), ("happy", "Joy."), ("angry", "Rage.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text(text)
    corpus = _load(tmp_path)
    assert corpus.label_names == ("angry", "happy", "sad")
    assert [(d.text, d.label, d.split) for d in _documents(corpus)] == [
        ("Rage.", 0, "train"),
        ("Joy.", 1, "train"),
        ("Tears.", 2, "train"),
    ]


def test_hub_parquet(tmp_path):
    folder = write_hub_parquet(tmp_path / "imdb", num_train=20, num_test=10, num_unsupervised=7)
    train = _load(folder)
    assert (len(train), train.label_names) == (20, ("neg", "pos"))
    assert len(_load(folder, split="test")) == 10
    assert len(_load(folder, split="unsupervised", labeled=False)) == 7
    with pytest.raises(UserError, match="7 of 7 documents have no label"):
        _load(folder, split="unsupervised")


def test_both_stand_ins_hold_the_same_texts(tmp_path):
    texts = [
        sorted(_texts(_load(folder)))
        for folder in (write_acl_imdb(tmp_path / "a"), write_hub_parquet(tmp_path / "b"))
    ]
    assert texts[0] == texts[1]


def test_the_parts_of_a_split_follow_each_other(tmp_path):
    (tmp_path / "train-00000-of-00002.txt").write_text("one\ntwo\n")
    (tmp_path / "train-00001-of-00002.txt").write_text("three\n")
    (tmp_path / "test.txt").write_text("four\n")
    assert _texts(_load(tmp_path, labeled=False)) == ["one", "two", "three"]


def test_a_split_in_two_folders_is_refused(tmp_path):
    for name in ("plain", "fancy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("one\n")
    with pytest.raises(UserError, match="'train' is in fancy and in plain"):
        _load(tmp_path, labeled=False)


def test_a_split_of_several_kinds_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("one\n")
    (tmp_path / "train.csv").write_text("text\none\n")
    with pytest.raises(UserError, match=r"several kinds \(train\.csv, train\.txt\)"):
        _load(tmp_path, labeled=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("films.docx", b"x", r"films\.docx has an unknown extension, expected one of \.csv"),
        ("films.parquet.gz", b"x", "unknown extension"),
        ("films.csv", b"", r"films\.csv is empty"),
        ("films.txt", b"", "is empty"),
        ("films.jsonl", b"", "is empty"),
        ("films.csv", b"text,label\n", "holds no documents"),
        ("films.json", b"[]", "no documents|cannot be read"),
        ("films.txt", b"x\xff\xfe\x00x\n", r"cannot be read as txt \('utf-8' codec"),
        ("films.csv", b"text\n\xff\xfe\x00x\n", "cannot be read as csv .*: save it as UTF-8"),
        ("films.csv.gz", b"not compressed", "cannot be read as csv"),
        ("films.jsonl", b'{"text": \n', "cannot be read as jsonl"),
        ("films.parquet", b"hello", "cannot be read as parquet"),
        ("films.csv", b"text,label\ngood, really,1\n", "2 columns and 3 fields"),
        ("films.csv", b"text,label\na,1\nb, c,0\n", "cannot be read as csv"),
        ("films.csv", b"words,label\na,1\n", r"--text-column \(the columns are words, label\)"),
        ("films.csv", b"text,mark\na,1\n", r"--label-column \(the columns are text, mark\)"),
        ("films.jsonl", b'{"text": 3, "label": 1}', "'text' holds int64, expected text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        _load(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "neg").mkdir()
    (tmp_path / "neg" / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"neg/0\.txt is not UTF-8"):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["missing.csv", "./missing", "/missing/folder/of/films"])
def test_a_path_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailable, match="there is no file or folder"):
        _load(name)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_source_that_may_not_be_read(tmp_path, monkeypatch, is_folder):
    path = tmp_path if is_folder else tmp_path / "films.csv"
    (tmp_path / "films.csv").write_bytes(_quoted(","))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "content_hash", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): check"):
        _load(path)


def test_a_folder_without_documents(tmp_path):
    with pytest.raises(SourceUnavailable, match="holds no documents, expected train/neg"):
        _load(tmp_path)


def test_a_missing_split_is_named_with_those_there_are(tmp_path):
    folder = write_acl_imdb(tmp_path / "aclImdb")
    with pytest.raises(
        UserError, match=r"no split 'tset' \(it has test, train, unsupervised\): did"
    ):
        _load(folder, split="tset")


def test_a_split_must_be_named_where_there_is_no_train(tmp_path):
    for name in ("dev", "test"):
        (tmp_path / f"{name}.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"no split 'train' \(it has dev, test\): name"):
        _load(tmp_path, labeled=False)


def test_a_unit_of_text_files_is_refused_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"--txt-unit paragraph is for \.txt files"):
        sources.open_source(
            str(tmp_path / "some.jsonl"), None, written=Format(txt_unit="paragraph")
        )
