"""Each kind of head from stage one to a prediction, on real reviews."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from teacher_cache.cache.confusion import ON_LABELS
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import convert, evaluate, train_student, verify
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.evaluation.config import ClassifyingOptions, GenerationOptions
from teacher_cache.stages.evaluation.runs import known_task
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.heads import HEADS
from teacher_cache.stages.losses.objective import loss_of
from tests.headed import LENGTH, NAMES, cache_labeled, write_headed_bert, write_labeled
from tests.ready_made import ReadyMade
from tests.tiny_runs import result_log, student_config

MULTI, NUMBER = NAMES
TEXT = "A warm, funny film that never drags."


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What one user has.

    Attributes:
        head: kind of the teacher's.
    """

    head: str
    teacher: Path
    data: Path
    held_out: Path
    cache: Path
    run: Path


@pytest.fixture(scope="module", params=NAMES)
def journey(
    request: pytest.FixtureRequest,
    ready_made: ReadyMade,
    bert_tokenizer: PreTrainedTokenizerBase,
) -> Journey:
    head = request.param

    def make(folder: Path) -> None:
        folder.mkdir()
        data = write_labeled(folder / "train.jsonl", head)
        write_labeled(folder / "test.jsonl", head, num=40, split="test")
        teacher = write_headed_bert(folder / "teacher", bert_tokenizer, head)
        cache = cache_labeled(folder / "cache", teacher, data, views=1)
        train_student.run(student_config(cache, folder / "run", unlabeled_alpha=0.3))

    folder = ready_made.folder(f"headed/{head}", make)
    return Journey(
        head=head, teacher=folder / "teacher", data=folder / "train.jsonl",
        held_out=folder / "test.jsonl", cache=folder / "cache", run=folder / "run",
    )  # fmt: skip


def labels_by_text(file: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["text"]: row["label"] for row in rows}


def expected_label(head: str, written: Any) -> np.ndarray:
    if head == NUMBER:
        return np.float32(written)  # pyright: ignore[reportReturnType]
    return np.array([name in written for name in NAMES[MULTI]], np.int8)


def test_the_cache_holds_logits_and_labels_as_they_are(journey: Journey) -> None:
    manifest = read_manifest(journey.cache)
    assert manifest.settings["head"] == journey.head
    tokenizer = AutoTokenizer.from_pretrained(journey.teacher)
    model = AutoModelForSequenceClassification.from_pretrained(journey.teacher).eval()
    corpus = load_corpus(CorpusConfig(source=str(journey.data), labeled=False))
    texts = {one.sample_id: one.text for one in corpus.documents(0, len(corpus))}
    written, reader = labels_by_text(journey.data), CacheReader(journey.cache)
    for idx in range(0, len(reader), 7):
        sample = reader.sample(idx)
        text = texts[sample["sample_id"].tobytes()]
        np.testing.assert_array_equal(sample["label"], expected_label(journey.head, written[text]))
        batch = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0].numpy()
        np.testing.assert_allclose(sample["class_logits"], logits, rtol=0, atol=1e-5)
    views = CacheReader(journey.cache, "labeled_views_1")
    assert not HEADS[journey.head].has_label(views.column("label")).any()
    assert verify.verify_deep(journey.cache, 5) < 1e-4


def test_the_teacher_is_measured_on_the_labels(journey: Journey) -> None:
    found = read_manifest(journey.cache).about[ON_LABELS]
    reader = CacheReader(journey.cache)
    figures = HEADS[journey.head].metrics(reader.column("class_logits"), reader.column("label"))
    assert found == pytest.approx({"num_labeled": 120, **figures})


def test_another_format_holds_the_same(journey: Journey, tmp_path: Path) -> None:
    config = ConvertConfig.of(cache=journey.cache, out=tmp_path / "zarr", format="zarr")
    other, reader = CacheReader(convert.run(config).cache), CacheReader(journey.cache)
    for name in ("label", "class_logits"):
        np.testing.assert_array_equal(other.column(name), reader.column(name))


def test_the_student_is_of_the_same_kind_in_transformers(journey: Journey) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(journey.run).eval()
    assert model.config.problem_type == journey.head
    assert tuple(model.config.id2label.values()) == NAMES[journey.head]
    head, labels = HEADS[journey.head], CacheReader(journey.cache).column("label")[:6]
    ids = torch.randint(0, 1000, (6, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(head.batched(labels)).float()
    with torch.no_grad():
        output = model(input_ids=ids, labels=targets)
    torch.testing.assert_close(output.loss, loss_of(head).hard(output.logits, targets).mean())


def test_the_log_has_the_heads_measures(journey: Journey) -> None:
    lines = [line for line in result_log(journey.run) if "eval_loss" in line]
    names = {
        MULTI: {"eval_micro_f1", "eval_macro_f1", "eval_exact_match", "eval_agreement", "eval_kl"},
        NUMBER: {"eval_mse", "eval_pearson", "eval_spearman", "eval_mse_to_teacher"},
    }
    assert lines and all(names[journey.head] <= line.keys() for line in lines)
    assert all(np.isfinite(line["eval_loss"]) for line in lines)


def evaluated(journey: Journey, **changes: Any) -> dict[str, Any]:
    asked = EvaluateConfig.model_validate(
        {
            "runs": (journey.run,), "corpus": CorpusConfig(source=str(journey.held_out)),
            "device": "cpu", "latency_lengths": (8,), **changes,
        }
    )  # fmt: skip
    return {row.name: row for row in evaluate.run(asked).rows}


def test_students_are_scored_beside_their_teacher(journey: Journey) -> None:
    rows = evaluated(journey)
    head = HEADS[journey.head]
    assert list(rows) == [head.baseline, "teacher", "run"]
    tokenizer = AutoTokenizer.from_pretrained(journey.run)
    model = AutoModelForSequenceClassification.from_pretrained(journey.run).eval()
    logits, labels = [], []
    for text, written in labels_by_text(journey.held_out).items():
        batch = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**batch).logits[0].numpy())
        labels.append(expected_label(journey.head, written))
    for name, figure in head.metrics(np.array(logits), np.array(labels)).items():
        assert getattr(rows["run"], name) == pytest.approx(figure, abs=1e-5)
    if journey.head == MULTI:
        assert rows["teacher"].agreement == 1.0 and rows["run"].kl > 0
        assert evaluated(journey, threshold=0.01)["run"] != rows["run"]
    else:
        assert rows["teacher"].mse_to_teacher == 0.0 and rows["mean"].pearson is None
        with pytest.raises(UserError, match="--threshold is of multi-label classifiers"):
            evaluated(journey, threshold=0.3)


def predicted(journey: Journey, **given: Any) -> str:
    (line,) = known_task([journey.run]).evaluation.predict(
        journey.run,
        [TEXT],
        device=DeviceConfig(device="cpu"),
        generation=GenerationOptions(),
        classifying=ClassifyingOptions(**given),
        one_a_line=False,
    )
    return line


def test_an_answer_is_labels_or_a_number(journey: Journey) -> None:
    tokenizer = AutoTokenizer.from_pretrained(journey.run)
    model = AutoModelForSequenceClassification.from_pretrained(journey.run).eval()
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits[0].double()
    if journey.head == NUMBER:
        assert predicted(journey) == f"{logits[0]:.4g}\t{TEXT}"
        with pytest.raises(UserError, match="--threshold is of multi-label classifiers"):
            predicted(journey, threshold=0.3)
        return
    shares = {name: one.item() for name, one in zip(NAMES[MULTI], logits.sigmoid(), strict=True)}
    for threshold in (0.001, sorted(shares.values())[1], 0.999):
        names, probabilities, text = predicted(journey, threshold=threshold).split("\t")
        above = sorted((n for n in shares if shares[n] > threshold), key=lambda n: -shares[n])
        assert names == ",".join(above) and text == TEXT
        assert probabilities == ",".join(f"{shares[name]:.3f}" for name in above)


def test_options_that_mean_nothing_of_a_number_are_refused(
    journey: Journey, tmp_path: Path
) -> None:
    for option, value in (("temperature", 3.0), ("conf_power", 1.0), ("label_smoothing", 0.1)):
        config = student_config(journey.cache, tmp_path / option, max_steps=1, **{option: value})
        if journey.head == MULTI:
            train_student.run(config)
            continue
        with pytest.raises(UserError, match=r"does nothing here: the teacher is a regression"):
            train_student.run(config)


def test_labels_of_another_kind_than_the_head_are_refused(journey: Journey, tmp_path: Path) -> None:
    other = NUMBER if journey.head == MULTI else MULTI
    data = write_labeled(tmp_path / "other.jsonl", other, num=20)
    saying = {
        MULTI: r"holds one label a document .*, and a multi-label teacher has any number",
        NUMBER: r"holds string such as .*, and this teacher gives a number",
    }
    with pytest.raises(UserError, match=saying[journey.head]):
        cache_labeled(tmp_path / "cache", journey.teacher, data)


def test_a_pretrained_student_gets_a_head_of_the_kind(
    journey: Journey, tiny_bert: Path, tmp_path: Path
) -> None:
    config = student_config(journey.cache, tmp_path / "run").model_dump(exclude_unset=True)
    kept = {k: v for k, v in config.items() if k not in (
        "d_model", "num_layers", "expand", "d_state", "head_dim"
    )}  # fmt: skip
    again = train_student.TrainStudentConfig.of(**kept | {"arch": f"hf:{tiny_bert}"})
    run = train_student.run(again).run
    model = AutoModelForSequenceClassification.from_pretrained(run)
    assert model.config.problem_type == journey.head
    assert model.num_labels == len(NAMES[journey.head])


def test_lists_make_a_teacher_that_does_not_say_it_multi_label(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    from tests.tiny_models import write_tiny_bert

    data = write_labeled(tmp_path / "train.jsonl", MULTI, num=30)
    teacher = write_tiny_bert(
        tmp_path / "teacher", bert_tokenizer, classes=dict(enumerate(NAMES[MULTI]))
    )
    cache = cache_labeled(tmp_path / "cache", teacher, data)
    assert read_manifest(cache).settings["head"] == MULTI
