"""Labels at the command line: the table that was used, missing ones, the teacher against them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from teacher_cache.cache.confusion import ON_LABELS, Confusion
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.tables import confusion_table
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.small_caches import read_unchecked

SHORT = ("--max-length", "16", "--device", "cpu")
WORDS = ("warm", "dull", "funny", "slow", "love", "war")
Teacher = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture
def teacher(tmp_path: Path, tiny_bert: Path) -> Teacher:
    """A tiny teacher with these classes and settings."""

    def make(*names: str, **config: object) -> Path:
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert,
            id2label=dict(enumerate(names)),
            label2id={name: class_id for class_id, name in enumerate(names)},
            num_labels=len(names),
            ignore_mismatched_sizes=True,
            **config,
        )
        folder = tmp_path / "teacher"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
        return folder

    return make


def texts(num: int) -> list[str]:
    return [f"a {WORDS[i % 6]} film, {WORDS[i // 6 % 6]} and number {i}" for i in range(num)]


def write(name: str, labels: Sequence[object] | None, num: int = 40) -> str:
    rows = [{"text": text} for text in texts(num)]
    for row, label in zip(rows, labels or [], strict=False):
        row["label"] = label  # pyright: ignore[reportArgumentType]
    Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return name


def said_by(teacher: Path, tmp_path: Path, num: int = 40) -> list[int]:
    """The classes that a teacher gives these texts."""
    write("said.jsonl", None, num)
    done(
        "cache-teacher", "--unlabeled", "said.jsonl", "--teacher", teacher, *SHORT, "--out", "said"
    )
    reader = CacheReader("said")
    order = np.random.RandomState(0).permutation(num)
    given = np.empty(num, int)
    given[order] = reader.column("class_logits").argmax(axis=1)
    return given.tolist()


def spread(teacher: Path) -> Path:
    """A teacher that gives each class to a good part of the texts."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(teacher / "model.safetensors")
    done(
        "cache-teacher",
        "--unlabeled",
        write("t.jsonl", None),
        "--teacher",
        teacher,
        *SHORT,
        "--out",
        "t",
    )
    logits = CacheReader("t").column("class_logits")
    weights["classifier.bias"] = weights["classifier.bias"] - np.median(logits, axis=0)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree("t")
    return teacher


def test_text_without_labels_is_enough(teacher: Teacher) -> None:
    folder = teacher("ham", "spam")
    data = write("texts.jsonl", None)
    outcome = pipe("cache-teacher", "--data", data, "--teacher", folder, *SHORT, "--out", "one")
    assert outcome.code == 0 and "no column but 'text'" in outcome.stderr
    done("cache-teacher", "--unlabeled", data, "--teacher", folder, *SHORT, "--out", "two")
    one, two = CacheReader("one"), CacheReader("two")
    assert (one.column("label") == -1).all() and len(one) == 40
    np.testing.assert_array_equal(one.column("class_logits"), two.column("class_logits"))
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert one.manifest.about["id2label"] == {"0": "ham", "1": "spam"}
    assert ON_LABELS not in one.manifest.about

    student = (*TINY_STUDENT, "--eval-fraction", "0.3", "--early-stopping", "2")
    done("train-student", "--cache", "one", "--out", "run", *student)
    evaluation = json.loads(Path("run/run.json").read_text())["result"]["evaluation"]
    assert 0 <= evaluation["eval_agreement"] <= 1
    assert "eval_accuracy" not in evaluation
    printed = done("evaluate", "run", "--data", data, "--latency-lengths", "8", "--json", "e.json")
    assert "majority" not in printed
    teacher_row, run_row = json.loads(Path("e.json").read_text())["rows"]
    assert (teacher_row["agreement"], teacher_row["accuracy"]) == (1.0, None)
    assert run_row["kl"] > 0
    refused(
        "train-student", "--cache", "one", *TINY_STUDENT, "--alpha", "0", saying="--alpha 0 learns"
    )
    refused("evaluate", "run", "--data", data, "--teacher", "none", saying="have no labels")


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ((), "needs --data: labelled documents.* or --unlabeled alone"),
        (("--unlabeled", "none"), "needs --data"),
        (("--unlabeled", "t.jsonl", "--task", "lm"), "--unlabeled is a second corpus"),
        (("--unlabeled", "t.jsonl", "--label-names", "a,b"), "--label-names is of labels"),
        (("--unlabeled", "t.jsonl", "--missing-labels", "drop"), "--missing-labels is of labels"),
        (("--data", "t.jsonl", "--label-column", "mood"), "no column 'mood'"),
    ],
)
def test_text_without_labels_and_options_of_labels(
    options: tuple[str, ...], saying: str, teacher: Teacher
) -> None:
    write("t.jsonl", None)
    refused("cache-teacher", *options, "--teacher", teacher("ham", "spam"), saying=saying)


@pytest.mark.parametrize("hole", [None, -1])
def test_documents_without_a_label(teacher: Teacher, hole: object) -> None:
    folder = teacher("ham", "spam")
    data = write("gaps.jsonl", [hole if i % 4 == 3 else i % 2 for i in range(40)])
    command = ("cache-teacher", "--data", data, "--teacher", folder, *SHORT)
    refused(*command, saying="10 of 40 documents have no label .*--missing-labels drop")
    outcome = pipe(*command, "--missing-labels", "drop", "--out", "dropped")
    assert "10 more without label (left out)" in " ".join(outcome.stderr.split())
    outcome = pipe(*command, "--missing-labels", "unlabeled", "--out", "kept")
    assert "10 without label (kept for the teacher alone)" in " ".join(outcome.stderr.split())
    dropped, kept = CacheReader("dropped"), CacheReader("kept")
    assert (len(dropped), len(kept)) == (30, 40)
    has_label = kept.column("label") != -1
    wanted = [one for one, is_kept in zip(kept.sample_ids(), has_label, strict=True) if is_kept]
    assert list(dropped.sample_ids()) == wanted
    assert kept.manifest.about[ON_LABELS] == dropped.manifest.about[ON_LABELS]
    assert kept.manifest.splits["labeled"].report["num_without_label"] == 10
    done(
        "train-student", "--cache", "kept", "--out", "run", *TINY_STUDENT, "--eval-fraction", "0.3"
    )
    printed = done("evaluate", "run", "--data", data, "--missing-labels", "unlabeled")
    assert "40 held-out documents" in printed and "majority" in printed
    refused(
        "finetune-teacher", "--data", data, "--model", folder, "--missing-labels", "unlabeled",
        saying="10 documents have no label, and a teacher needs",
    )  # fmt: skip


def test_labels_in_two_spellings_and_the_table_that_was_used(teacher: Teacher) -> None:
    folder = teacher("ham", "spam")
    data = write("two.jsonl", [("Spam", "ham", "spam", "HAM")[i % 4] for i in range(40)])
    command = ("cache-teacher", "--data", data, "--teacher", folder, *SHORT, "--out", "cache")
    said = " ".join(pipe(*command).stderr.split())
    assert "HAM (10) is 0 ham, Spam (10) is 1 spam, ham (10) is 0 ham, spam (10) is 1 spam" in said
    assert "20 ham, 20 spam" in said


def test_a_teacher_whose_ids_mean_the_classes_in_another_order(
    teacher: Teacher, tmp_path: Path
) -> None:
    folder = spread(teacher("LABEL_0", "LABEL_1"))
    given = said_by(folder, tmp_path)
    assert 8 <= sum(given) <= 32
    data = write("turned.jsonl", [1 - one for one in given])
    command = ("cache-teacher", "--data", data, "--teacher", folder, *SHORT)
    outcome = pipe(*command, "--out", "turned")
    said = " ".join(outcome.stderr.split())
    assert "WARNING the teacher gives 0.0 % of 40 documents their label" in said
    assert "--label-map 0=1,1=0 --overwrite would fit" in said
    assert "accuracy 0.0 %" in outcome.stdout
    printed = done("inspect", "turned")
    assert "teacher against 40 labels: accuracy 0.0 %" in printed
    assert "LABEL_0 is LABEL_1, LABEL_1 is LABEL_0" in printed
    outcome = pipe(*command, "--out", "mended", "--label-map", "0=1,1=0")
    assert "WARNING" not in outcome.stderr
    assert read_manifest(Path("mended")).about[ON_LABELS]["accuracy"] == 1.0


def test_integers_beside_a_teacher_of_more_classes(teacher: Teacher, tmp_path: Path) -> None:
    folder = spread(teacher("negative", "neutral", "positive"))
    given = said_by(folder, tmp_path, 90)
    kept = [i for i, one in enumerate(given) if one != 1]
    rows = [{"text": texts(90)[i], "label": int(given[i] == 2)} for i in kept]
    assert 5 < sum(row["label"] for row in rows) < len(rows) - 5  # pyright: ignore[reportOperatorIssue, reportArgumentType, reportCallIssue]
    Path("two.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = ("cache-teacher", "--data", "two.jsonl", "--teacher", folder, *SHORT)
    said = " ".join(pipe(*command, "--out", "cache").stderr.split())
    assert "no document of two.jsonl has the class positive of the teacher's 3" in said
    assert "--label-map 0=0,1=2 --overwrite would fit" in said
    printed = done("inspect", "cache")
    assert "no document has the label positive" in printed
    assert "negative is negative, neutral is positive" in printed


def test_what_is_recorded_is_what_the_shards_say_however_often_it_was_killed(
    teacher: Teacher, tmp_path: Path
) -> None:
    folder = teacher("ham", "spam")
    data = write("data.jsonl", [i % 2 for i in range(40)])
    command = (
        "cache-teacher",
        "--data",
        data,
        "--teacher",
        folder,
        *SHORT,
        "--shard-documents",
        "8",
    )
    done(*command, "--out", "cache")
    recorded = read_manifest(Path("cache")).about[ON_LABELS]
    reader = CacheReader("cache")
    labels, classes = reader.column("label"), reader.column("class_logits").argmax(axis=1)
    counts = {(i, j): int(((labels == i) & (classes == j)).sum()) for i in (0, 1) for j in (0, 1)}
    assert {(i, j): n for i, j, n in recorded["confusion"]} == {
        k: n for k, n in counts.items() if n
    }
    assert recorded["accuracy"] == pytest.approx((labels == classes).mean())
    # As a kill between the third shard and the fourth leaves it.
    value = read_unchecked(Path("cache")) | {"complete": False, "completed_at": None, "index": []}
    del value["about"][ON_LABELS]
    Path("cache/manifest.json").write_text(
        json.dumps({k: v for k, v in value.items() if k != "sha256"})
    )
    for suffix in ("arrow", "json"):
        Path(f"cache/labeled/000/000003.{suffix}").unlink()
    done(*command, "--out", "cache")
    assert read_manifest(Path("cache")).about[ON_LABELS] == recorded


def test_many_classes_are_shown_by_their_most_frequent_mistakes() -> None:
    confusion = Confusion(30)
    confusion.add(
        {
            "label": np.arange(30).repeat(4),
            "class_logits": np.eye(30)[(np.arange(30).repeat(4) + 1) % 30],
        }
    )
    assert (confusion.accuracy, confusion.num) == (0.0, 120)
    assert confusion.fitting() == {i: (i + 1) % 30 for i in range(30)}
    shown = confusion_table(confusion, {str(i): f"class {i}" for i in range(30)})
    assert shown.row_count == 12


def test_accident_is_no_permutation() -> None:
    rng = np.random.default_rng(0)
    for num_classes, num in ((2, 200), (2, 12), (3, 12), (30, 60), (30, 900)) * 20:
        confusion = Confusion(num_classes)
        labels, logits = rng.integers(0, num_classes, num), rng.normal(size=(num, num_classes))
        confusion.add({"label": labels, "class_logits": logits})
        assert confusion.fitting() is None and not confusion.is_under_chance


@pytest.mark.parametrize(
    ("names", "config", "saying"),
    [
        (
            ("toxic", "rude"),
            {"problem_type": "multi_label_classification"},
            "one label a document .such as 0., and a multi-label teacher has any number",
        ),
        (("a", "b"), {"problem_type": "regression"}, "gives 2 numbers .* is regression, which is"),
        (("a", "b"), {"problem_type": "ordinal"}, "its problem_type is ordinal, which is not"),
    ],
)
def test_teachers_that_do_not_choose_a_class(
    teacher: Teacher, names: tuple[str, ...], config: dict[str, object], saying: str
) -> None:
    data = write("data.jsonl", [i % 2 for i in range(40)])
    folder = teacher(*names, **config)
    refused("cache-teacher", "--data", data, "--teacher", folder, saying=saying)


def test_a_fine_tuned_teacher_chooses_one_class_whatever_it_began_as(teacher: Teacher) -> None:
    folder = teacher("a", "b", problem_type="multi_label_classification")
    data = write("data.jsonl", [i % 2 for i in range(40)])
    outcome = pipe(
        "finetune-teacher", "--data", data, "--model", folder, "--out", "tuned", "--max-steps", "1",
        "--device", "cpu", "--max-length", "16",
    )  # fmt: skip
    assert outcome.code == 0 and "multi_label_classification" in outcome.stderr
    assert json.loads(Path("tuned/config.json").read_text())["problem_type"] == (
        "single_label_classification"
    )
    done("cache-teacher", "--data", data, "--teacher", "tuned", *SHORT)


@pytest.mark.parametrize("other", ["question", "text_pair", "sentence2", "Hypothesis"])
def test_half_of_a_pair_is_not_read_in_silence(teacher: Teacher, other: str) -> None:
    rows = [{other: "Is it good?", "text": t, "label": i % 2} for i, t in enumerate(texts(20))]
    Path("pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = (
        "cache-teacher",
        "--data",
        "pairs.jsonl",
        "--teacher",
        teacher("ham", "spam"),
        *SHORT,
    )
    refused(*command, saying=f"the columns {other} and text .* look like a pair")
    outcome = pipe(*command, "--text-column", "text")
    assert outcome.code == 0 and "look like a pair: 'text' alone is read" in " ".join(
        outcome.stderr.split()
    )
