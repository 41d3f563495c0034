"""Pairs of texts: read as the teacher's tokenizer reads them, from the cache to the student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import TOKEN_TYPES
from teacher_cache.stages import cache_teacher, evaluate, train_student, verify
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, Document, load_corpus
from teacher_cache.stages.data.tokenization import Reading, tokenize
from teacher_cache.stages.data.views import perturb
from teacher_cache.stages.evaluation.config import ClassifyingOptions, GenerationOptions
from teacher_cache.stages.evaluation.runs import known_task
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.join import TokenizationMismatch, join
from teacher_cache.stages.models.pretrained import reads_token_types
from tests.ready_made import ReadyMade
from tests.stand_ins import write_glue
from tests.tiny_models import write_tiny_bert
from tests.tiny_runs import student_config

LENGTH = 24
CPU = DeviceConfig(device="cpu")
COLUMNS = "premise,hypothesis"
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="session")
def pairs(ready_made: ReadyMade) -> Path:
    """Pairs in the columns of GLUE's MNLI."""
    return ready_made.folder("glue/mnli", lambda folder: write_glue(folder, "mnli"))


@pytest.fixture(scope="session")
def teacher(ready_made: ReadyMade, bert_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny BERT to which the token types mean much."""

    def make(folder: Path) -> None:
        names = {0: "contradiction", 1: "entailment", 2: "neutral"}
        write_tiny_bert(folder, bert_tokenizer, classes=names, initializer_range=0.2)

    return ready_made.folder("teachers/nli", make)


def corpus_config(source: Path, **changes: object) -> CorpusConfig:
    given = {"split": "train", "text_column": COLUMNS, "pairs": True}
    return CorpusConfig.model_validate({"source": str(source), **given, **changes})


def stage_one(out: Path, teacher: Path, labeled: CorpusConfig, **changes: object) -> Path:
    config = CacheTeacherConfig.of(
        name="pairs", teacher=str(teacher), device="cpu", max_length=LENGTH, labeled=labeled,
        out=out, **changes,
    )  # fmt: skip
    return cache_teacher.run(config).cache


@pytest.fixture(scope="session")
def cache(ready_made: ReadyMade, teacher: Path, pairs: Path) -> Path:
    return ready_made.folder(
        "caches/pairs", lambda folder: stage_one(folder, teacher, corpus_config(pairs), views=1)
    )


@pytest.fixture(scope="session")
def run(ready_made: ReadyMade, cache: Path) -> Path:
    def make(folder: Path) -> None:
        train_student.run(student_config(cache, folder, unlabeled_alpha=0.3))

    return ready_made.folder("runs/pairs", make)


def pair(first: str, second: str | None, position: int = 0) -> Document:
    return Document(text=first, second=second, source="s", split="train", position=position)


@settings(max_examples=60)
@given(st.lists(st.tuples(_TEXTS, _TEXTS), max_size=4), st.integers(5, 14), st.booleans())
def test_a_pair_is_what_its_tokenizer_makes_of_it(
    bert_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    max_length: int,
    is_bert: bool,
) -> None:
    tokenizer = bert_tokenizer if is_bert else gpt2_tokenizer
    documents = [pair(*one, position=i) for i, one in enumerate(texts)]
    samples = tokenize(documents, tokenizer, max_length=max_length, with_types=is_bert)
    expected = [one for one in texts if all(text.strip() for text in one)]
    for sample, (first, second) in zip(samples, expected, strict=True):
        whole = tokenizer(first, second)
        cut = tokenizer(first, second, truncation="longest_first", max_length=max_length)
        assert sample.input_ids.tolist() == cut["input_ids"]
        assert sample.was_truncated == (len(whole["input_ids"]) > max_length)
        if is_bert:
            assert sample.token_types is not None
            assert sample.token_types.tolist() == cut["token_type_ids"]


def test_room_for_both_texts(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenize([pair("a b c", "d e f")], bert_tokenizer, max_length=5)[0].input_ids) == 5
    with pytest.raises(UserError, match="adds 3 special tokens, so give at least 5"):
        tokenize([pair("a b c", "d e f")], bert_tokenizer, max_length=4)


def test_the_second_text_is_in_the_id() -> None:
    ids = {pair("a", one).sample_id for one in (None, "", "b", "c")}
    assert len(ids) == 4
    assert pair("ab", "").sample_id != pair("a", "b").sample_id


def test_cached_logits_are_those_of_the_model_on_what_its_tokenizer_gives(
    cache: Path, teacher: Path, pairs: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    corpus = load_corpus(corpus_config(pairs))
    documents = {one.sample_id: one for one in corpus.documents(0, len(corpus))}
    reader = CacheReader(cache)
    without = []
    for idx in range(len(reader)):
        sample = reader.sample(idx)
        texts = documents[sample["sample_id"].tobytes()].texts
        batch = tokenizer(*texts, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).logits[0].numpy()
            without.append(model(batch["input_ids"]).logits[0].numpy() - expected)
        assert sample["input_ids"].tolist() == batch["input_ids"][0].tolist()
        assert sample[TOKEN_TYPES].tolist() == batch["token_type_ids"][0].tolist()
        np.testing.assert_allclose(sample["class_logits"], expected, rtol=0, atol=1e-3)
    assert np.abs(without).max() > 0.1, "so that a teacher without types would not pass"
    assert verify.verify_deep(cache, 8) < 1e-3


def test_the_manifest_says_what_a_pair_is(cache: Path) -> None:
    settings = read_manifest(cache).settings
    assert settings["data"]["labeled"]["text_column"] == ["premise", "hypothesis"]
    assert settings[TOKEN_TYPES] is True
    record = json.loads((cache / "teacher" / "tokenization.json").read_text())
    assert record["pair_form"] == "[CLS] a [SEP] b [SEP]"


def test_half_a_pair_is_left_out_and_counted(tmp_path: Path, teacher: Path) -> None:
    rows = [
        {"premise": f"film {i}", "hypothesis": ["good", " ", ""][i % 3], "label": i % 2}
        for i in range(12)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    cache = stage_one(tmp_path / "cache", teacher, corpus_config(data, split=None))
    summary = read_manifest(cache).splits["labeled"]
    assert (summary.num_samples, summary.report["num_empty"]) == (4, 8)


def test_a_view_perturbs_each_text(bert_tokenizer: PreTrainedTokenizerBase, pairs: Path) -> None:
    corpus = load_corpus(corpus_config(pairs))
    documents = corpus.documents(0, 40)
    reading = Reading.of(bert_tokenizer, max_length=512)
    assert reading.cut("  A film. ", " Good? ") == ("A film.", "Good?")
    changed = np.zeros(2)
    for document in documents:
        for view in perturb(document, 3, seed=0, reading=reading, other=lambda _: documents[0]):
            assert view is not None and view.second is not None and not view.is_empty
            changed += [a != b for a, b in zip(view.texts, document.texts, strict=True)]
            sides = zip(view.texts, document.texts, documents[0].texts, strict=True)
            for made, own, others in sides:
                assert {*made.split()} <= {*own.split(), *others.split(), "[MASK]"}
    assert (changed > 60).all()


def test_the_join_compares_how_a_pair_is_written(
    cache: Path, bert_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    joined = join(cache, JoinConfig(), longest_sample=LENGTH)
    assert joined.report.verified and "form of a pair" in joined.report.compared
    bert_tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    cls, sep = (other.convert_tokens_to_ids(one) for one in ("[CLS]", "[SEP]"))
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    roles = {role: str(token) for role, token in other.special_tokens_map.items()}
    # A class of its own would write its own form again.
    plain = PreTrainedTokenizerFast(tokenizer_object=other.backend_tokenizer, **roles)
    plain.save_pretrained(tmp_path)
    with pytest.raises(TokenizationMismatch, match="form of a pair") as found:
        join(cache, JoinConfig(student_tokenizer=str(tmp_path)), longest_sample=LENGTH)
    (difference,) = [one for one in found.value.report.differences if one.name == "form of a pair"]
    assert (difference.cache, difference.student) == ("[CLS] a [SEP] b [SEP]", "[CLS] a [SEP] b")


def test_a_teacher_reads_pairs_or_single_texts(
    pairs: Path, teacher: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    single = CorpusConfig(source=str(acl_imdb), split="unsupervised", labeled=False)
    with pytest.raises(UserError, match=r"read as pairs of texts and .* as single ones"):
        stage_one(tmp_path / "cache", teacher, corpus_config(pairs), unlabeled=single)


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"text_column": "premise,hypothesis,idx"}, "names 3 columns: give one, or the two"),
        ({"text_column": "premise,premise"}, "names 2 columns: give one, or the two different"),
        ({"text_column": "premise,hypo"}, "no column 'hypo'"),
        ({"text_column": "premise,idx"}, "the column 'idx' holds int32, expected text"),
        ({"text_column": None}, "look like a pair: read both with --text-column premise,hyp"),
        ({"pairs": False}, "is a pair of texts, which classifiers read"),
        ({"label_column": "premise"}, "'premise' of .* is named for both texts and labels"),
    ],
)
def test_wrong_columns_get_their_sentence(
    pairs: Path, changes: dict[str, object], saying: str
) -> None:
    with pytest.raises(UserError, match=saying):
        load_corpus(corpus_config(pairs, **changes))


def test_a_column_whose_name_has_a_comma_is_one(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    rows = [{"a,b": f"film {i}", "label": i % 2} for i in range(4)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    corpus: Corpus = load_corpus(corpus_config(data, split=None, text_column="a,b"))
    assert corpus.num_texts == 1 and corpus.identity["text_column"] == "a,b"


def test_students_are_scored_beside_the_teacher_on_pairs(run: Path, pairs: Path) -> None:
    corpus = corpus_config(pairs, split="validation_matched")
    asked = EvaluateConfig(runs=(run,), corpus=corpus, device="cpu", latency_lengths=(8,))
    rows = {row.name: row for row in evaluate.run(asked).rows}
    assert rows["teacher"].agreement == 1.0 and rows[run.name].kl > 0
    single = asked.model_copy(
        update={"corpus": corpus.model_copy(update={"text_column": "premise"})}
    )
    with pytest.raises(UserError, match=r"reads pairs .premise, hypothesis., and .* single texts"):
        evaluate.run(single)


def predicted(run: Path, texts: list[str], *, one_a_line: bool = False, **given: str) -> list[str]:
    return list(
        known_task([run]).evaluation.predict(
            run,
            texts,
            device=CPU,
            generation=GenerationOptions(),
            classifying=ClassifyingOptions.model_validate(given),
            one_a_line=one_a_line,
        )
    )


def test_a_student_reads_a_pair_as_it_learned_to(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    (answer,) = predicted(run, ["A warm film."], second="It is cold.")
    with torch.no_grad():
        batch = tokenizer("A warm film.", "It is cold.", return_tensors="pt")
        shares = model(**batch).logits[0].softmax(dim=0)
    best = int(shares.argmax())
    name = model.config.id2label[best]
    assert answer == f"{name}\t{shares[best]:.3f}\tA warm film.\tIt is cold."
    lines = ["A warm film.\tIt is cold.", "Dull.\tLong."]
    assert predicted(run, lines, one_a_line=True)[0] == answer


def test_half_a_pair_is_not_predicted(run: Path) -> None:
    with pytest.raises(UserError, match="here is one text: give the second with --second"):
        predicted(run, ["A warm film."])
    with pytest.raises(UserError, match="line 2 has 2 tabs, expected one"):
        predicted(run, ["a\tb", "a\tb\tc"], one_a_line=True)
    with pytest.raises(UserError, match="1 of 1 pairs have an empty text"):
        predicted(run, ["a"], second=" ")
    with pytest.raises(UserError, match="of lines, each holds both"):
        predicted(run, ["a\tb"], second="c", one_a_line=True)


def test_token_types_are_read_where_tokenizer_and_model_have_them(
    bert_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
    teacher: Path,
    tiny_gpt2: Path,
    run: Path,
) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(teacher)
    gpt2 = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2)
    student = AutoModelForSequenceClassification.from_pretrained(run)
    assert reads_token_types(bert, bert_tokenizer)
    assert not reads_token_types(gpt2, gpt2_tokenizer)
    assert not reads_token_types(student, AutoTokenizer.from_pretrained(run))
    bert.config.type_vocab_size = 1
    with pytest.raises(UserError, match="the types 0 to 1, and the model knows 1"):
        reads_token_types(bert, bert_tokenizer)
