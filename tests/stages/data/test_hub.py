"""Hub data sets without a hub: what is said, what the cache still gives, what a hub would."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import datasets
import pytest
from datasets import config as datasets_config
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] -- httpx's or httpx2's
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data import hub
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_corpus
from teacher_cache.stages.data.opening import SourceUnavailable
from tests.stand_ins import write_hub_parquet

REVISION = "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"


def _load(**settings: object) -> Corpus:
    settings = {"source": "stanfordnlp/imdb", **settings}
    return load_corpus(CorpusConfig.model_validate(settings))


def _builder(folder: Path, cache: Path) -> datasets.DatasetBuilder:
    """What `datasets` makes of the hub's parquet files."""
    files = {
        split: str(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
        for split in ("train", "test", "unsupervised")
    }
    return datasets.load_dataset_builder(
        "parquet", "plain_text", data_files=files, cache_dir=str(cache)
    )


@pytest.fixture
def reachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the stand-in."""
    builder = _builder(write_hub_parquet(tmp_path / "hub"), tmp_path / "cache")
    builder.hash = REVISION
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


def test_unreachable_is_one_sentence_with_the_way_out():
    start = time.perf_counter()
    with pytest.raises(SourceUnavailable, match="--data /path/to/aclImdb") as raised:
        _load()
    assert time.perf_counter() - start < 5
    message = str(raised.value)
    assert "'stanfordnlp/imdb'" in message
    assert "could not be reached" in message
    assert "\n" not in message


def test_no_connection_is_found_out_with_one_question(monkeypatch):
    questions: list[float] = []

    def refuse(self: HfApi, name: str, *, timeout: float) -> None:
        questions.append(timeout)
        raise HTTPError("no route to host")

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(SourceUnavailable, match=r"could not be reached \(no route to host\)"):
        _load()
    assert questions == [hub.PROBE_TIMEOUT_S]


def test_a_data_set_that_the_hub_does_not_have(monkeypatch):
    def refuse(self: HfApi, name: str, *, timeout: float) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(SourceUnavailable, match="the hub has no data set 'stanfordnlp/imbd'"):
        _load(source="stanfordnlp/imbd")


def test_a_reachable_hub(reachable_hub):
    train = _load()
    assert (len(train), train.label_names) == (60, ("neg", "pos"))
    assert train.identity == {
        "kind": "hub",
        "name": "stanfordnlp/imdb",
        "revision": REVISION,
        "split": "train",
        "text_column": "text",
        "label_column": "label",
        "seed": 0,
    }
    assert train.documents(0, 1)[0].source == f"stanfordnlp/imdb@{REVISION}"
    assert len(_load(split="unsupervised", labeled=False)) == 30


def test_a_published_order_of_classes_stands(reachable_hub):
    train = _load()
    mapped = train.with_class_names({0: "LABEL_0", 1: "LABEL_1"})
    assert mapped.documents(0, 60) == train.documents(0, 60)


def test_a_missing_split_is_named_with_those_there_are(reachable_hub):
    with pytest.raises(UserError, match=r"no split 'tests' \(it has train, test, unsupervised\)"):
        _load(split="tests")


def test_a_data_set_that_datasets_cannot_read(monkeypatch):
    def refuse(name: str, revision: str | None = None) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(SourceUnavailable, match=r"from the hub \(Dataset scripts are no longer"):
        _load(source="someone/old")


def test_what_was_loaded_once_needs_no_hub(tmp_path, monkeypatch):
    builder = _builder(write_hub_parquet(tmp_path / "hub"), tmp_path / "scratch")
    builder.dataset_name = "imdb"
    cached = tmp_path / "cache" / "stanfordnlp___imdb" / "plain_text" / "0.0.0" / REVISION
    builder.download_and_prepare(str(cached))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train = _load()
    assert len(train) == 60
    assert train.identity["revision"] == REVISION


def test_loading_prints_and_logs_nothing(tmp_path, capfd, caplog):
    folder = write_hub_parquet(tmp_path / "hub")
    datasets.enable_progress_bars()
    capfd.readouterr()
    # What the project itself says of a source is no noise of another library.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.WARNING, "teacher_cache"):
        load_corpus(CorpusConfig(source=str(folder)))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not datasets.are_progress_bars_disabled()


def _texts(folder: Path, name: str, num: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(num)]})
    table.to_parquet(folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


def test_a_data_set_of_code_is_read_from_its_converted_files(tmp_path, monkeypatch):
    files = {"train": _texts(tmp_path, "train", 3)}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path))
    asked: list[tuple[str, str | None]] = []

    def converted_only(name: str, revision: str | None = None) -> datasets.DatasetBuilder:
        asked.append((name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found old.py")
        return builder

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", converted_only)
    assert len(_load(source="someone/old", labeled=False)) == 3
    assert asked == [("someone/old", None), ("someone/old", "refs/convert/parquet")]


def test_a_subset_is_named_behind_a_colon(tmp_path, monkeypatch):
    files = {"train": _texts(tmp_path, "train", 3)}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path))
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda _, name, **__: asked.append((name,)))
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *names: asked.append(names) or builder
    )
    corpus = _load(source="Salesforce/wikitext:wikitext-2-raw-v1", labeled=False)
    assert asked == [("Salesforce/wikitext",), ("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert corpus.identity["name"] == "Salesforce/wikitext:wikitext-2-raw-v1"


def test_a_revision_is_named_behind_an_at_sign(tmp_path, monkeypatch):
    files = {"train": _texts(tmp_path, "train", 3)}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path))
    asked: list[object] = []

    def load(*names: str, **pinned: str) -> datasets.DatasetBuilder:
        asked.append((*names, pinned))
        return builder

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda _, name, **asked_: asked.append(asked_))
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    pinned = _load(source="some/texts:small@v1.0", labeled=False)
    timeout = {"timeout": hub.PROBE_TIMEOUT_S}
    assert asked == [timeout | {"revision": "v1.0"}, ("some/texts", "small", {"revision": "v1.0"})]
    # What was read says the revision, however it was asked for.
    assert pinned.identity == _load(source="some/texts:small", labeled=False).identity


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    def refuse(self: HfApi, name: str, **_: object) -> None:
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(SourceUnavailable, match="'some/texts' has no revision 'v2'"):
        _load(source="some/texts@v2")


def test_without_a_hub_a_commit_is_found_again_and_a_branch_is_not(tmp_path, monkeypatch):
    other = "0" * 40
    for number, commit in enumerate((REVISION, other)):
        folder = tmp_path / str(number)
        builder = _builder(write_hub_parquet(folder / "hub", num_train=20 + number), folder / "x")
        builder.dataset_name = "imdb"
        cached = tmp_path / "cache" / "stanfordnlp___imdb" / "plain_text" / "0.0.0" / commit
        builder.download_and_prepare(str(cached))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = [_load(source=f"stanfordnlp/imdb@{commit}") for commit in (REVISION, other)]
    assert [len(one) for one in found] == [20, 21]
    assert [one.identity["revision"] for one in found] == [REVISION, other]
    for asked in ("main", "1" * 40):
        with pytest.raises(SourceUnavailable, match=rf"whole commit alone, and it is not {asked}"):
            _load(source=f"stanfordnlp/imdb@{asked}")


def test_a_part_of_a_hub_split(reachable_hub):
    part, whole = _load(split="train[:50%]"), _load()
    assert len(part) == 30
    assert part.identity == whole.identity | {"part": "[:50%]"}


@pytest.fixture
def streamed_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of two files, the second of which cannot be read: whoever asks for it fails."""
    whole = _texts(tmp_path / "hub", "a", 40)
    damaged = tmp_path / "hub" / "b.parquet"
    damaged.write_bytes(b"PAR1 no parquet at all")
    builder = datasets.load_dataset_builder(
        "parquet", data_files={"train": [whole, str(damaged)]}, cache_dir=str(tmp_path / "scratch")
    )
    builder.hash = REVISION
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


def _stream(num: int | None, **settings: object) -> Corpus:
    return _load(
        source="Skylion007/openwebtext", labeled=False, streamed=True, max_samples=num, **settings
    )


def test_a_streamed_data_set_is_read_as_far_as_is_asked_for(streamed_hub, monkeypatch):
    few, more = _stream(5), _stream(30)
    assert [one.text for one in few.documents(0, 5)] == [f"a {i}" for i in range(5)]
    assert few.documents(0, 5) == more.documents(0, 5)  # its order is its own, so more appends
    assert few.identity == more.identity
    assert few.identity["streamed"] is True and "seed" not in few.identity
    assert few.identity["revision"] == REVISION
    with pytest.raises(SourceUnavailable, match="could not be loaded from the hub"):
        _stream(41)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    kept = _stream(30)
    assert kept.identity == more.identity and kept.documents(0, 30) == more.documents(0, 30)
    with pytest.raises(SourceUnavailable, match="the hub could not be reached"):
        _stream(31)


def test_what_is_here_is_not_streamed(tmp_path):
    file = _texts(tmp_path, "train", 3)
    with pytest.raises(UserError, match="nothing of it has to be streamed"):
        load_corpus(CorpusConfig(source=file, labeled=False, streamed=True))
