"""Folders, patterns, archives, URLs, parts of splits: all is read, or it is said what is not."""

from __future__ import annotations

import functools
import gzip
import http.server
import logging
import lzma
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data import sources
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.opening import SourceUnavailable
from teacher_cache.stages.data.sources import own_split
from tests.stages.data.reading import read

HERE, THERE = "text,label\na,1\nb,0\n", "text,label\nc,1\nd,0\n"
A, C = [("a", "1"), ("b", "0")], [("c", "1"), ("d", "0")]


def folder_of(folder: Path, **files: str) -> Path:
    """Files by their names, with `__` for a folder's end."""
    for name, content in files.items():
        *parts, last = name.split("__")
        path = folder.joinpath(*parts, last)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training.csv", "test.csv"),
        ("training.csv", "testing.csv"),
        ("imdb_train.csv", "imdb_test.csv"),
        ("Train.csv", "TEST.CSV"),
        ("train/part-a.csv", "test/part-a.csv"),
        ("data/en/train.csv", "data/en/test.csv"),
        ("train-2024.csv", "eval-2024.csv"),
    ],
)
def test_splits_by_what_people_call_them(tmp_path: Path, train: str, test: str) -> None:
    folder_of(tmp_path, **{train.replace("/", "__"): HERE, test.replace("/", "__"): THERE})
    assert read(tmp_path) == A
    assert read(tmp_path, split="test") == C
    assert own_split(str(tmp_path), ("validation", "test")) not in (None, "train")


@pytest.mark.parametrize("called", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("asked", ["validation", "dev"])
def test_a_validation_split_has_many_names(tmp_path: Path, called: str, asked: str) -> None:
    folder_of(tmp_path, **{"train.csv": HERE, f"{called}.csv": THERE})
    assert read(tmp_path, split=asked) == C


@pytest.mark.parametrize("split", ["train+test", "train[:1]+test[:1]"])
def test_splits_are_read_one_at_a_time(tmp_path: Path, split: str) -> None:
    folder_of(tmp_path, **{"train.csv": HERE, "test.csv": THERE})
    with pytest.raises(UserError, match=r"train.*\+test.* joins splits, and one is read at a time"):
        read(tmp_path, split=split)


def test_numbered_files_are_one_split_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder_of(tmp_path, **{"train_2.csv": THERE, "train_10.csv": HERE, "train_1.csv": HERE})
    assert read(tmp_path) == A + C + A
    assert "other splits" not in str(sources.open_source(str(tmp_path), None).notes)


def test_files_that_are_named_like_no_split_do_not_vanish(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, **{"train.csv": HERE, "extra.csv": THERE, "README.md": "x"})
    with caplog.at_level(logging.INFO):
        assert read(tmp_path) == A
    assert "left out, named like no split: extra.csv" in caplog.text
    assert "README.md" in caplog.text
    assert read(tmp_path, split="extra") == C
    assert sorted(read(f"{tmp_path}/*.csv")) == sorted(A + C)


def test_of_texts_one_may_be_called_like_a_split(tmp_path: Path) -> None:
    folder_of(tmp_path, **{"one.txt": "a\n", "two.txt": "b\n", "test.txt": "c\n"})
    with pytest.raises(UserError, match=r"split test and .*\(one\.txt, two\.txt\).*--split"):
        read(tmp_path, labeled=False)
    texts = read(f"{tmp_path}/*.txt", labeled=False)
    assert texts == [("a", None), ("c", None), ("b", None)]


def test_files_of_no_split_are_read_together(tmp_path: Path) -> None:
    folder_of(tmp_path, **{"part1.csv": HERE, "part2.csv": THERE})
    assert read(tmp_path) == A + C
    assert read(tmp_path, split="part2") == C


@pytest.mark.parametrize(
    ("files", "saying"),
    [
        ({"a_train.csv": HERE, "b_train.csv": THERE}, "several splits that may be 'train'"),
        ({"data.csv": HERE, "notes.txt": "x"}, "several kinds"),
        ({"train.csv": HERE, "train.tsv": HERE}, "several kinds"),
        ({"en__train.csv": HERE, "de__train.csv": HERE}, "'train' is in de and in en"),
        ({"en__x.csv": HERE, "de__x.csv": HERE}, "data in de and in en"),
        ({"neg__1.txt": "a", "pos__1.txt": "b", "neu__1.md": "c"}, r"neu .* \(1\.md\)"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path: Path, files: dict[str, str], saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        read(folder_of(tmp_path, **files))


def test_one_file_twice_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, **{"train.csv": HERE})
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(HERE.encode()))
    with pytest.raises(UserError, match="a file twice"):
        read(tmp_path)


def test_texts_of_a_class_whatever_the_case_of_their_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"neg__1.txt": "a", "neg__test.txt": "t", "pos__1.TXT": "b", "pos__2.Txt": "c"}
    folder_of(tmp_path, **files, **{"pos__3.md": "x", "notes.txt": "y", ".git__z.txt": "z"})
    wanted = [("a", "neg"), ("t", "neg"), ("b", "pos"), ("c", "pos")]
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == wanted
    assert "3.md" in caplog.text and "notes.txt" in caplog.text and "z.txt" not in caplog.text


@pytest.mark.parametrize("above", ["data", "data__en"])
@pytest.mark.parametrize("split", ["", "train__"])
def test_classes_however_deep_they_lie(tmp_path: Path, above: str, split: str) -> None:
    folder_of(tmp_path, **{f"{above}__{split}{c}__1.txt": c for c in ("neg", "pos")})
    assert read(tmp_path) == [("neg", "neg"), ("pos", "pos")]


@pytest.mark.parametrize(
    "files",
    [
        {"x__train__neg__1.txt": "a", "x__train__pos__1.txt": "b", "y__test__neg__1.txt": "c"},
        {"train__neg__a.jsonl": '{"text": "a"}\n', "train__pos__a.jsonl": '{"text": "b"}\n'},
        {"label=0__a.csv": "text\na\n", "label=1__a.csv": "text\nb\n"},
    ],
)
def test_folders_that_may_be_classes_do_not_vanish(tmp_path: Path, files: dict[str, str]) -> None:
    folder = folder_of(tmp_path, **files)
    with pytest.raises(UserError, match=r"may be their classes|called like no splits"):
        read(folder)
    assert len(read(f"{folder}/**/*.*", labeled=False)) == len(files)
    with pytest.raises(UserError, match="which may be their classes"):
        read(f"{folder}/**/*.*")


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, train__a="", **{"train__a.txt": "one\ntwo\n", "test__a.txt": "three\n"})
    assert read(tmp_path, labeled=False) == [("one", None), ("two", None)]


def test_a_list_beside_the_classes_is_not_the_data(tmp_path: Path) -> None:
    files = {"train__neg__1.txt": "a", "train__pos__1.txt": "b", "test__neg__1.txt": "c"}
    folder_of(tmp_path, **files, **{"imdbEr.txt": "4.0", "train__urls_neg.txt": "d"})
    assert read(tmp_path) == [("a", "neg"), ("b", "pos")]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}),
            "test": datasets.Dataset.from_dict({"text": ["c", "d"], "label": [1, 0]}),
        }
    )
    both.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_what_datasets_saved(saved: Path) -> None:
    assert (read(saved), read(saved, split="test"), read(saved / "test")) == (A, C, C)
    (saved / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="as `save_to_disk` writes it"):
        read(saved)


@pytest.mark.parametrize("suffix", ["xz", "zst", "lz4"])
def test_further_compressions(tmp_path: Path, suffix: str) -> None:
    content = HERE.encode()
    codec = {"zst": "zstd", "lz4": "lz4"}.get(suffix)
    if codec is None:
        (tmp_path / "a.csv.xz").write_bytes(lzma.compress(content))
    else:
        with pa.CompressedOutputStream(str(tmp_path / f"a.csv.{suffix}"), codec) as stream:
            stream.write(content)
    assert read(tmp_path / f"a.csv.{suffix}") == A


def archive(kind: str, folder: Path, path: Path) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for one in sorted(folder.rglob("*.*")):
                file.write(one, one.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:gz") as file:
            file.add(folder, folder.name)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_is_the_folder_in_it(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path / "films", **{"train.csv": HERE, "test.csv": THERE})
    path = archive(kind, folder, tmp_path / f"films.{kind}")
    shutil.rmtree(folder)
    assert (read(path), read(path, split="test")) == (A, C)
    assert own_split(str(path), ("test",)) == "test"


def test_an_archive_of_one_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as file:
        file.writestr("a.csv", HERE)
    assert read(tmp_path / "a.csv.zip") == A


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("hello")
    with pytest.raises(UserError, match=r"a\.zip cannot be unpacked"):
        read(tmp_path / "a.zip")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address on a server of this machine."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_on_a_server(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "films.csv.gz").write_bytes(gzip.compress(HERE.encode()))
    both = folder_of(folder / "both", **{"train.csv": HERE, "test.csv": THERE})
    archive("zip", both, folder / "both.zip")
    assert read(f"{address}/films.csv.gz?download=true") == A
    assert read(f"{address}/both.zip", split="test") == C
    # It is fetched each time: a server may say something else.
    (folder / "films.csv.gz").write_bytes(gzip.compress(THERE.encode()))
    assert read(f"{address}/films.csv.gz?download=true") == C
    with pytest.raises(SourceUnavailable, match=r"missing\.csv could not be fetched"):
        read(f"{address}/missing.csv")


def test_folders_and_patterns_of_other_file_systems() -> None:
    system = fsspec.filesystem("memory")
    for name, content in {
        "d/train.csv": HERE,
        "d/test.csv": THERE,
        "p/x1.csv": HERE,
        "p/x2.csv": THERE,
    }.items():
        system.pipe_file(f"/{name}", content.encode())
    assert read("memory://d") == A
    assert read("memory://d", split="test") == C
    assert read("memory://p/x*.csv") == A + C
    assert read("memory://p/x1.csv") == A


def test_an_address_that_nothing_reads() -> None:
    with pytest.raises(SourceUnavailable, match=r"could not be fetched .*local copy"):
        read("nowhere://bucket/films.csv")


@pytest.mark.parametrize(
    ("part", "positions"),
    [
        ("[:3]", range(3)),
        ("[50%:]", range(5, 10)),
        ("[-2:]", range(8, 10)),
    ],
)
def test_a_part_of_a_split(tmp_path: Path, part: str, positions: range) -> None:
    rows = "".join(f"film {i},{i % 2}\n" for i in range(10))
    folder_of(tmp_path, **{"train.csv": f"text,label\n{rows}", "test.csv": THERE})
    corpus = load_corpus(CorpusConfig(source=str(tmp_path), split=f"train{part}"))
    found = sorted(corpus.documents(0, len(corpus)), key=lambda one: one.position)
    whole = load_corpus(CorpusConfig(source=str(tmp_path), split="train"))
    ids = {one.position: one.sample_id for one in whole.documents(0, 10)}
    assert [one.text for one in found] == [f"film {i}" for i in positions]
    # A document is the same whichever part it is read with.
    assert [one.sample_id for one in found] == [ids[i] for i in positions]
    assert corpus.identity == whole.identity | {"part": part}


@pytest.mark.parametrize("part", ["[x]", "[:1:2]", "[:10%"])
def test_a_part_that_is_not_written_as_datasets_does(tmp_path: Path, part: str) -> None:
    folder_of(tmp_path, **{"train.csv": HERE})
    with pytest.raises(UserError, match=r"cannot be read .*train\[:10%\]|no split"):
        read(tmp_path, split=f"train{part}")


def test_a_part_of_packaged_texts() -> None:
    assert read("reviews", split="test[:7]") == read("reviews", split="test")[:7]


def test_a_part_that_holds_nothing(tmp_path: Path) -> None:
    folder_of(tmp_path, **{"train.csv": HERE})
    with pytest.raises(SourceUnavailable, match="holds none of 2 documents"):
        read(tmp_path, split="train[:0]")
