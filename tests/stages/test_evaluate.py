from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.stages import evaluate, train_student
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.evaluate import NUM_REPEATS, EvaluateResult, measure_latency
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.training.run_folder import RUN_NAME, read_run
from tests import reference_losses as reference
from tests.tiny_models import write_tiny_bert
from tests.tiny_runs import MAX_LENGTH, student_config

LENGTHS = (8, 16)


@pytest.fixture(scope="module")
def run(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    return train_student.run(student_config(tiny_cache, out, lr=0.02, max_steps=4)).run


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run under another name, with other facts in its record."""

    def copy(name: str, **about: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
        record = json.loads((folder / RUN_NAME).read_text())
        complete = about.pop("complete", True)
        record = record | {"about": record["about"] | about, "complete": complete}
        (folder / RUN_NAME).write_text(json.dumps(record))
        return folder

    return copy


def config(acl_imdb: Path, *runs: Path, **changes: Any) -> EvaluateConfig:
    given: dict[str, Any] = {
        "runs": runs,
        "corpus": CorpusConfig(source=str(acl_imdb), split="test"),
        "device": "cpu",
        "latency_lengths": LENGTHS,
    }
    return EvaluateConfig(**(given | changes))


@pytest.fixture(scope="module")
def result(acl_imdb: Path, run: Path) -> EvaluateResult:
    return evaluate.run(config(acl_imdb, run))


def alone(folder: Path | str, texts: list[str]) -> list[list[float]]:
    """Each document by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits[0].tolist())
    return found


def test_the_rows_are_what_slow_loops_find(
    result: EvaluateResult, acl_imdb: Path, run: Path, tiny_bert: Path
) -> None:
    documents = load_corpus(CorpusConfig(source=str(acl_imdb), split="test")).documents(0, 40)
    labels = [document.label or 0 for document in documents]
    assert result.num_documents == 40
    assert [row.name for row in result.rows] == ["majority", "teacher", "student"]
    majority, *others = result.rows

    most = max(set(labels), key=labels.count)
    assert majority.accuracy == pytest.approx(labels.count(most) / 40)
    assert majority.f1 == pytest.approx(reference.macro_f1([most] * 40, labels))
    of_models = ("ece", "nll", "agreement", "kl", "num_parameters", "megabytes", "latency_ms")
    assert all(getattr(majority, name) is None for name in of_models)
    texts = [document.text for document in documents]
    logits = {"teacher": alone(tiny_bert, texts), "student": alone(run, texts)}
    for row in others:
        mine = logits[row.name]
        predicted = [one.index(max(one)) for one in mine]
        truth = [one.index(max(one)) for one in logits["teacher"]]
        pairs = list(zip(mine, labels, strict=True))
        kls = [reference.kl(t, s, 1.0) for t, s in zip(logits["teacher"], mine, strict=True)]
        assert {
            "accuracy": row.accuracy,
            "f1": row.f1,
            "ece": row.ece,
            "nll": row.nll,
            "agreement": row.agreement,
            "kl": row.kl,
        } == pytest.approx(
            {
                "accuracy": sum(p == y for p, y in zip(predicted, labels, strict=True)) / 40,
                "f1": reference.macro_f1(predicted, labels),
                "ece": reference.expected_calibration_error(mine, labels),
                "nll": sum(reference.cross_entropy(s, y, 0.0) for s, y in pairs) / 40,
                "agreement": sum(p == t for p, t in zip(predicted, truth, strict=True)) / 40,
                "kl": sum(kls) / 40,
            },
            rel=1e-4,
            abs=1e-6,
        )


def test_the_teacher_agrees_with_itself(result: EvaluateResult) -> None:
    assert (result.rows[1].agreement, result.rows[1].kl) == (1.0, pytest.approx(0, abs=1e-9))


def test_size(result: EvaluateResult, run: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(run)
    student = result.rows[2]
    assert student.num_parameters == sum(one.numel() for one in model.parameters())
    assert student.megabytes == pytest.approx(4e-6 * (student.num_parameters or 0))


def test_latency_at_each_length(result: EvaluateResult) -> None:
    for row in result.rows[1:]:
        assert row.latency_ms is not None
        assert tuple(row.latency_ms) == LENGTHS
        assert all(value > 0 for value in row.latency_ms.values())
    assert result.rows[0].latency_ms is None


def test_a_verified_run_has_no_mark(result: EvaluateResult) -> None:
    assert result.marks == {}


def test_a_run_that_was_let_pass_is_marked(acl_imdb: Path, own: Callable[..., Path]) -> None:
    marked = own("warned", tokenization=["normaliser", "max length"])
    found = evaluate.run(config(acl_imdb, own("verified"), marked, teacher="none"))
    assert found.marks == {
        "warned": "trained although normaliser, max length differed from the cache's"
    }


def test_without_a_teacher(acl_imdb: Path, run: Path, result: EvaluateResult) -> None:
    found = evaluate.run(config(acl_imdb, run, teacher="none"))
    assert [row.name for row in found.rows] == ["majority", "student"]
    student = found.rows[1]
    assert (student.agreement, student.kl) == (None, None)
    assert student.accuracy == result.rows[2].accuracy


def test_another_teacher(
    acl_imdb: Path, run: Path, tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase,
    result: EvaluateResult,
) -> None:  # fmt: skip
    other = write_tiny_bert(tmp_path, bert_tokenizer, seed=7)
    found = evaluate.run(config(acl_imdb, run, teacher=str(other)))
    assert found.rows[1].nll != result.rows[1].nll
    assert found.rows[2].kl != result.rows[2].kl


def test_runs_of_different_teachers(acl_imdb: Path, own: Callable[..., Path], run: Path) -> None:
    with pytest.raises(UserError, match=r"have different teachers \(.*\): name one with --teacher"):
        evaluate.run(config(acl_imdb, run, own("other", teacher="somewhere/else")))


@pytest.mark.parametrize("name", ["student", "teacher", "majority"])
def test_names_that_are_taken(
    acl_imdb: Path, own: Callable[..., Path], run: Path, name: str
) -> None:
    with pytest.raises(UserError, match=rf"'{name}' is there twice: rename"):
        evaluate.run(config(acl_imdb, own(name), run))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"x" * 100, "half"])
def test_a_damaged_model_is_named(own: Callable[..., Path], name: str, content: Any) -> None:
    file = own("damaged") / name
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match=r"the model in .*damaged cannot be loaded \(.+\): "):
        Classifier.of_run(file.parent, DeviceConfig(device="cpu"))


def test_a_run_that_is_not_finished(acl_imdb: Path, own: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"half is not finished.*it resumes"):
        evaluate.run(config(acl_imdb, own("half", complete=False)))


def test_a_folder_that_is_no_run(acl_imdb: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        evaluate.run(config(acl_imdb, tmp_path))


def test_models_of_other_classes(
    acl_imdb: Path, run: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    described["id2label"] = {"0": "pos", "1": "neg"}
    described["label2id"] = {"pos": 0, "neg": 1}
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"teacher has the classes .* compare models of one task"):
        evaluate.run(config(acl_imdb, run, teacher=str(other)))


def test_documents_that_are_all_empty(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + ",neg\n,pos\n" * 4)
    with pytest.raises(UserError, match=r"the 8 documents of .* are all empty"):
        evaluate.run(config(data, run, corpus=CorpusConfig(source=str(data)), teacher="none"))


def test_empty_documents_do_not_count(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "a joy,pos\n,neg\ndreadful,neg\n" * 3)
    found = evaluate.run(config(data, run, corpus=CorpusConfig(source=str(data)), teacher="none"))
    assert found.num_documents == 6
    assert found.rows[0].accuracy == 0.5


def test_a_student_is_the_same_in_every_batch(run: Path, acl_imdb: Path) -> None:
    student = Classifier.of_run(run, DeviceConfig(device="cpu"))
    samples = student.tokenize(
        load_corpus(CorpusConfig(source=str(acl_imdb), split="test")).documents(0, 20)
    )
    found = [student.logits(samples, batch_tokens=tokens) for tokens in (1, 100, 10_000)]
    assert student.max_length == read_run(run).about["max_length"] == MAX_LENGTH
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-6)


def test_bfloat16_students_are_near(run: Path, acl_imdb: Path) -> None:
    documents = load_corpus(CorpusConfig(source=str(acl_imdb), split="test")).documents(0, 10)
    whole, half = (
        Classifier.of_run(run, DeviceConfig.model_validate({"device": "cpu", "dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    )
    expected, found = (
        one.logits(one.tokenize(documents), batch_tokens=500) for one in (whole, half)
    )
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_latency_is_the_median_of_interleaved_passes(
    run: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Classifier.of_run(run, DeviceConfig(device="cpu"))
    teacher = Classifier.of_teacher(TeacherConfig(teacher=str(tiny_bert), device="cpu"))
    timed: list[tuple[str, int]] = []

    def slower_each_time(classifier: Any, input_ids: torch.Tensor) -> float:
        timed.append((classifier.name, input_ids.shape[1]))
        seconds = sum(name == classifier.name for name, _ in timed)
        return 100.0 if seconds == 1 else float(seconds)  # the first pass is not counted

    monkeypatch.setattr(evaluate, "_time_forward", slower_each_time)
    found = measure_latency([teacher, student], (8,))
    assert timed == [("teacher", 8), ("student", 8)] * (NUM_REPEATS + 1)
    assert found == {"teacher": {8: 6000.0}, "student": {8: 6000.0}}  # of 2 to 10 seconds


def test_a_length_beyond_the_teacher_is_timed_for_the_student_alone(
    run: Path, tiny_bert: Path
) -> None:
    student = Classifier.of_run(run, DeviceConfig(device="cpu"))
    teacher = Classifier.of_teacher(
        TeacherConfig(teacher=str(tiny_bert), device="cpu", max_length=MAX_LENGTH)
    )
    found = measure_latency([teacher, student], (32, 600))
    assert set(found["teacher"]) == {32}  # it reads 512 positions, wherever documents are cut
    assert set(found["student"]) == {32, 600}
