from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
)
from teacher_cache.pipeline.presets import (
    PRESETS,
    data_name,
    held_out_corpus,
    resolve_cache_teacher,
    resolve_finetune_teacher,
    with_own_cache,
)
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.tasks import TASKS, TaskName
from tests.command_line import done, pipe

pytestmark = pytest.mark.usefixtures("no_network")


def held_out(task: TaskName, **options: Any) -> CorpusConfig | None:
    return held_out_corpus(EvaluateCommandOptions.model_validate(options), TASKS[task])


def held_out_labeled(**options: Any) -> CorpusConfig:
    found = held_out("classification", **options)
    assert found is not None and found.labeled
    return found


def resolve(data: str, **options: Any) -> CacheTeacherConfig:
    return resolve_cache_teacher(CacheTeacherOptions.of(data=data, **options))


# Design, section 3: data set, text column, training split, held-out split, labels, unlabelled
# text, teacher.
TABLE = {
    "imdb": (
        "stanfordnlp/imdb", "text", "train", "test", ("neg", "pos"),
        ("stanfordnlp/imdb", "unsupervised"), "hipnologo/gpt2-imdb-finetune",
    ),
    "sst2": (
        "stanfordnlp/sst2", "sentence", "train", "validation", ("negative", "positive"),
        ("stanfordnlp/imdb", "unsupervised"),
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    ),
    "mnli": (
        "nyu-mll/glue:mnli", "premise,hypothesis", "train", "validation_matched",
        ("contradiction", "entailment", "neutral"), None, "cross-encoder/nli-distilroberta-base",
    ),
    "qnli": (
        "nyu-mll/glue:qnli", "question,sentence", "train", "validation",
        ("entailment", "not_entailment"), None, "textattack/bert-base-uncased-QNLI",
    ),
    "demo": (
        "reviews", "text", "train", "test", ("rotten", "fresh"),
        ("reviews", "unlabeled"), "teachers/demo-minilm",
    ),
}  # fmt: skip


def test_the_table_is_whole() -> None:
    assert set(TABLE) == {name for name, one in PRESETS.items() if one.label_names}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_names_data_teacher_and_splits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teachers/demo-minilm").mkdir(parents=True)  # the demo's is made by its own run
    source, text_column, train, test, names, unlabeled, teacher = TABLE[name]
    config = resolve(name)
    assert config.name == name
    assert config.forward.teacher == teacher
    labeled = config.labeled
    assert (labeled.source, labeled.split) == (source, train)
    assert (labeled.text_column, labeled.label_column) == (text_column, "label")
    assert (labeled.label_names, labeled.max_samples) == (names, None)
    if unlabeled is None:
        assert config.unlabeled is None
    else:
        assert config.unlabeled is not None and not config.unlabeled.labeled
        assert (config.unlabeled.source, config.unlabeled.split) == unlabeled
        assert config.unlabeled.max_samples == 5000
    assert config.fallback == ()
    evaluated = held_out_labeled(data=name)
    assert (evaluated.source, evaluated.split) == (source, test)
    assert (evaluated.text_column, evaluated.label_column) == (text_column, "label")


def test_dry_run_of_imdb_prints_data_set_teacher_and_splits() -> None:
    printed = done("cache-teacher", "--data", "imdb", "--dry-run")
    values = [tuple(part.strip() for part in line.split("│")[1:3]) for line in printed.splitlines()]
    assert ("teacher", "hipnologo/gpt2-imdb-finetune") in values
    assert ("labeled.source", "stanfordnlp/imdb") in values
    assert ("labeled.split", "train") in values
    assert ("labeled.text_column", "text") in values
    assert ("labeled.label_names", "['neg', 'pos']") in values
    assert ("unlabeled.source", "stanfordnlp/imdb") in values
    assert ("unlabeled.split", "unsupervised") in values
    assert ("unlabeled.max_samples", "5000") in values


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done("cache-teacher", "--data", "sst2", "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_options_win_over_the_preset() -> None:
    config = resolve(
        "imdb",
        teacher="some/teacher",
        split="test",
        text_column="body",
        label_column="stars",
        label_names="bad, good",
        max_samples=10,
        unlabeled_split="more",
        unlabeled_max_samples=7,
        seed=3,
        max_length=128,
        shard_mb=1,
        out="somewhere",
    )
    assert config.forward.teacher == "some/teacher"
    assert config.labeled.model_dump() == {
        "source": "stanfordnlp/imdb",
        "split": "test",
        "text_column": "body",
        "label_column": "stars",
        "txt_unit": "line",
        "labeled": True,
        "pairs": True,
        "heads": ("single_label_classification",),
        "conversations": False,
        "label_names": ("bad", "good"),
        "label_map": None,
        "missing_labels": "refuse",
        "max_samples": 10,
        "seed": 3,
        "streamed": False,
        "quoting": None,
        "columns": None,
    }
    assert config.unlabeled is not None
    assert (config.unlabeled.split, config.unlabeled.max_samples) == ("more", 7)
    assert config.unlabeled.seed == 3
    assert (config.forward.max_length, config.shards.shard_mb, config.shards.out) == (
        128,
        1,
        Path("somewhere"),
    )


def test_unlabeled_text_can_be_left_out_or_taken_from_elsewhere() -> None:
    assert resolve("imdb", unlabeled="none").unlabeled is None
    other = resolve("imdb", unlabeled="sst2").unlabeled
    assert other is not None and other.source == "stanfordnlp/imdb"
    file = resolve("imdb", unlabeled="texts.txt").unlabeled
    assert file is not None and (file.source, file.split) == ("texts.txt", None)


def test_all_unlabeled_text_is_taken_without_a_limit() -> None:
    unlabeled = resolve("imdb", unlabeled_max_samples=None).unlabeled
    assert unlabeled is not None and unlabeled.max_samples is None


def test_a_folder_with_an_unlabeled_split_brings_it(acl_imdb: Path) -> None:
    config = resolve(str(acl_imdb), teacher="t")
    assert config.unlabeled is not None
    assert (config.unlabeled.source, config.unlabeled.split) == (str(acl_imdb), "unsupervised")
    assert config.unlabeled.max_samples == 5000
    assert config.labeled.split is None  # train, as the corpus decides


def test_a_file_brings_no_unlabeled_text(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\na,0\nb,1\n")
    config = resolve(str(file), teacher="t")
    assert config.unlabeled is None
    assert config.name == "reviews"


def test_a_fallback_is_only_what_the_user_lists() -> None:
    config = resolve("a/b", teacher="t", text_column="body", fallback="sst2, reviews.csv")
    sst2, file = config.fallback
    # A preset brings its own columns and split; a file is read as the data would have been.
    assert (sst2.source, sst2.text_column, sst2.split) == ("stanfordnlp/sst2", "sentence", "train")
    assert (file.source, file.text_column, file.split) == ("reviews.csv", "body", None)


def test_a_fallback_of_text_has_the_texts_column_and_its_own_split() -> None:
    options = {"teacher": "t", "task": "lm", "split": "s", "text_column": "body"}
    config = resolve("a/b", **options, fallback="wikitext,c/d")
    assert [(one.source, one.text_column, one.split) for one in config.fallback] == [
        ("Salesforce/wikitext:wikitext-2-raw-v1", "body", "train"),
        ("c/d", "body", None),
    ]
    assert [one.txt_unit for one in config.fallback] == ["article", "line"]


def test_a_text_is_no_preset_of_classifiers() -> None:
    config = resolve("wikitext", task="classification", teacher="t")
    assert (config.labeled.source, config.labeled.labeled) == ("wikitext", True)
    with pytest.raises(UserError, match="is no preset, so it names no teacher"):
        resolve("wikitext", task="classification")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("imdb", "imdb"),
        ("stanfordnlp/imdb", "imdb"),
        ("/data/aclImdb/", "aclImdb"),
        ("reviews.jsonl.gz", "reviews"),
        (".", "data"),
    ],
)
def test_folders_are_named_after_the_data(data: str, name: str) -> None:
    assert data_name(data) == name


def test_data_that_is_no_preset_needs_a_teacher(acl_imdb: Path) -> None:
    with pytest.raises(UserError, match="is no preset, so it names no teacher: give --teacher"):
        resolve(str(acl_imdb))


def test_the_demo_needs_its_teacher_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `pipe finetune-teacher --data demo` first"):
        resolve("demo")


def test_a_misspelt_preset_suggests_the_nearest() -> None:
    error = pipe("cache-teacher", "--data", "imbd", "--dry-run").error
    assert "'imbd'" in error and "did you mean 'imdb'?" in error


def test_the_demo_is_fine_tuned_from_minilm_on_its_own_splits(minilm_dir: Path) -> None:
    config = resolve_finetune_teacher(FinetuneTeacherOptions.of(data="demo"))
    assert Path(config.model) == minilm_dir
    assert (config.labeled.source, config.labeled.split) == ("reviews", "train")
    assert config.validation == config.labeled.model_copy(update={"split": "validation"})


def test_a_limit_on_training_documents_does_not_shorten_the_validation() -> None:
    config = resolve_finetune_teacher(FinetuneTeacherOptions.of(data="demo", max_samples=10))
    assert config.labeled.max_samples == 10
    assert config.validation is not None and config.validation.max_samples is None


@pytest.mark.parametrize("data", ["imdb", "reviews.csv"])
def test_other_data_needs_a_base_model(data: str) -> None:
    with pytest.raises(UserError, match="names no base model: give --model"):
        resolve_finetune_teacher(FinetuneTeacherOptions.of(data=data))


def test_evaluation_reads_a_folders_held_out_split(acl_imdb: Path) -> None:
    assert held_out_labeled(data=str(acl_imdb)).split == "test"
    assert held_out_labeled(data=str(acl_imdb), split="train").split == "train"


def test_evaluation_reads_a_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "held.csv"
    file.write_text("text,label\na,0\nb,1\n")
    assert held_out_labeled(data=str(file)).split is None


def test_evaluation_does_not_fall_back_to_what_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(UserError, match=r"has no split test or validation \(it has train\)"):
        held_out_labeled(data=str(tmp_path))


def test_evaluation_needs_data() -> None:
    with pytest.raises(UserError, match="evaluate needs --data"):
        held_out_labeled()


# Design, section 3: data set, training split, held-out split, unit, teacher.
TEXT_TABLE = {
    "austen": ("austen", "train", "test", "line", None),
    "wikitext": (
        "Salesforce/wikitext:wikitext-2-raw-v1", "train", "test", "article",
        "openai-community/gpt2",
    ),
    "openwebtext": ("Skylion007/openwebtext", "train", None, "line", "openai-community/gpt2"),
}  # fmt: skip


def test_the_table_of_texts_is_whole() -> None:
    assert set(TEXT_TABLE) <= set(PRESETS) - set(TABLE)


@pytest.mark.parametrize("name", TEXT_TABLE)
def test_a_text_names_data_teacher_and_splits(name: str) -> None:
    source, train, test, unit, teacher = TEXT_TABLE[name]
    config = resolve(name, **({} if teacher else {"teacher": "t"}))
    assert (config.task, config.forward.teacher, config.name) == ("lm", teacher or "t", name)
    labeled = config.labeled
    assert (labeled.source, labeled.split, labeled.text_column) == (source, train, "text")
    assert (labeled.txt_unit, labeled.labeled, config.unlabeled) == (unit, False, None)
    assert labeled.streamed == (name == "openwebtext")
    if test is None:
        with pytest.raises(UserError, match="has no held-out split: evaluate on other text"):
            held_out("lm", data=name)
        return
    evaluated = held_out("lm", data=name)
    assert evaluated is not None
    assert (evaluated.source, evaluated.split, evaluated.txt_unit) == (source, test, unit)


def test_a_language_model_is_evaluated_on_text_or_on_a_cache(acl_imdb: Path) -> None:
    held = held_out("lm", data="imdb")
    assert held is not None and (held.split, held.labeled) == ("test", False)
    assert held_out("lm", cache=Path("c")) is None
    folder = held_out("lm", data=str(acl_imdb))
    assert folder is not None and folder.split == "test"
    for options, saying in (
        ({}, "needs --data, text that .* or --cache"),
        ({"data": "imdb", "cache": "c"}, "--data is of text, and --cache takes its place"),
        ({"cache": "c", "txt_unit": "line"}, "--txt-unit is of text"),
        ({"cache": "c", "quoting": "none"}, "--quoting is of text"),
        ({"data": "imdb", "label_column": "x"}, "--label-column is of classifiers"),
        ({"data": "wikitxt"}, "did you mean 'wikitext'"),
    ):
        with pytest.raises(UserError, match=saying):
            held_out("lm", **options)
    assert held_out("classification", cache="c") is None


def test_students_are_evaluated_on_their_own_cache_unless_data_are_named() -> None:
    cache, none = Path("c"), EvaluateCommandOptions.of()
    assert with_own_cache(none, cache).cache == cache
    for named in ({"data": "imdb"}, {"cache": "other"}):
        options = EvaluateCommandOptions.model_validate(named)
        assert with_own_cache(options, cache) == options
