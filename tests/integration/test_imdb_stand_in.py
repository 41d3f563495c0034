"""The whole path on real reviews in IMDb's layouts, with both kinds of teacher, as a user types it.

A BERT has a CLS token first and pads; a GPT-2, the imdb preset's kind, has neither CLS nor a
padding token, and its classes have no names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from tests.command_line import TINY_STUDENT, done, pipe
from tests.stand_ins import write_hub_parquet

# The README shows this program: a cache needs nothing of ours to be read.
PLAIN_READER = """\
import json, sys
from pathlib import Path
import pyarrow as pa
cache, sample_id = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
names = json.loads((cache / "manifest.json").read_text())["about"]["id2label"]
for shard in sorted(cache.glob("*/*/*.arrow")):
    table = pa.ipc.open_file(shard).read_all()
    for found, logits in zip(table["sample_id"].to_pylist(), table["class_logits"].to_pylist()):
        if found == sample_id:
            print({names[str(i)]: logit for i, logit in enumerate(logits)})
"""

NUM_TRAIN, NUM_TEST, NUM_UNLABELED = 120, 40, 60  # of both stand-ins
TEXTS = ("A warm, funny film that never drags.", "Dull.", 100 * "long " + "film")


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What one user typed, and what they have now.

    Attributes:
        folder: where they worked.
        data: the data set's folder.
        teacher: the teacher's folder.
        cache_teacher: the first command.
        cache: relative to `folder`, as is `run`.
        printed: standard output of each command.
        evaluation: what `pipe evaluate --json` wrote.
    """

    folder: Path
    data: Path
    teacher: Path
    cache_teacher: tuple[str | Path, ...]
    cache: Path
    run: Path
    printed: dict[str, str]
    evaluation: dict[str, Any]


@pytest.fixture(scope="module", params=["gpt2, aclImdb", "bert, hub's parquet"])
def journey(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    acl_imdb: Path,
) -> Iterator[Journey]:
    kind, layout = request.param.split(", ")
    teacher = request.getfixturevalue(f"tiny_{kind}")
    folder = tmp_path_factory.mktemp("journey")
    data = acl_imdb
    if layout != "aclImdb":
        data = write_hub_parquet(
            folder / "imdb",
            num_train=NUM_TRAIN,
            num_test=NUM_TEST,
            num_unsupervised=NUM_UNLABELED,
        )
    # A folder's classes are in no order of their own, so a teacher without names needs one.
    needs_names = kind == "gpt2" and layout == "aclImdb"
    names = ("--label-names", "neg,pos") if needs_names else ()
    with chdir(folder):
        cache_teacher = (
            "cache-teacher", "--data", data, "--teacher", teacher, *names,
            "--shard-documents", "32",
        )  # fmt: skip
        printed = {
            "cache-teacher": done(*cache_teacher),
            "train-student": done("train-student", "--unlabeled-alpha", "0.3", *TINY_STUDENT),
        }
        (cache,), (run,) = Path("caches").iterdir(), Path("runs").iterdir()
        printed["evaluate"] = done(
            "evaluate", run, "--data", data, "--latency-lengths", "8,32", "--json", "figures.json"
        )
        yield Journey(
            folder=folder,
            data=data,
            teacher=teacher,
            cache_teacher=cache_teacher,
            cache=cache,
            run=run,
            printed=printed,
            evaluation=json.loads(Path("figures.json").read_text()),
        )


@pytest.fixture(scope="module")
def teacher_alone(journey: Journey) -> Iterator[Any]:
    """The teacher as transformers runs it, one text at a time: text -> logits [C]."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(journey.teacher)
    tokenizer = AutoTokenizer.from_pretrained(journey.teacher)
    model.eval()
    yield lambda text: _logits(model, tokenizer(text, return_tensors="pt"))


def _logits(model: PreTrainedModel, inputs: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(**inputs).logits[0].numpy()


def test_the_cache_holds_every_document_once(journey: Journey) -> None:
    manifest = read_manifest(journey.cache)
    assert manifest.complete
    assert journey.cache.name == f"{journey.data.name}-{manifest.fingerprint[:8]}"
    for split, num_documents, num_shards in (
        ("labeled", NUM_TRAIN, -(-NUM_TRAIN // 32)),
        ("unlabeled", NUM_UNLABELED, -(-NUM_UNLABELED // 32)),
    ):
        summary = manifest.splits[split]
        assert (summary.num_documents, summary.num_shards) == (num_documents, num_shards)
        ids = list(CacheReader(journey.cache, split).sample_ids())
        assert len(ids) == num_documents - summary.report["num_empty"]
        assert len(set(ids)) == len(ids)
    assert manifest.about["id2label"] == {"0": "neg", "1": "pos"}
    assert "6 shards computed, 0 kept" in journey.printed["cache-teacher"]


def test_cached_logits_are_the_teachers(journey: Journey, teacher_alone: Any) -> None:
    for split, name in (("labeled", "train"), ("unlabeled", "unsupervised")):
        corpus = load_corpus(
            CorpusConfig(source=str(journey.data), split=name, labeled=split == "labeled")
        )
        reader = CacheReader(journey.cache, split)
        for sample_idx in (0, 31, 32, len(reader) - 1):
            sample = reader.sample(sample_idx)
            (document,) = corpus.documents(sample_idx, sample_idx + 1)
            assert sample["sample_id"].tobytes() == document.sample_id
            assert int(sample["label"]) == (-1 if document.label is None else document.label)
            expected = teacher_alone(document.text)
            np.testing.assert_allclose(sample["class_logits"], expected, atol=1e-5)


def test_ten_lines_of_pyarrow_read_the_logits_of_a_sample(journey: Journey) -> None:
    assert len(PLAIN_READER.splitlines()) <= 10
    reader = CacheReader(journey.cache)
    sample = reader.sample(len(reader) - 1)
    sample_id = sample["sample_id"].tobytes().hex()
    command = [sys.executable, "-c", PLAIN_READER, str(journey.cache), sample_id]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    logits = [float(logit) for logit in sample["class_logits"]]
    assert printed == f"{dict(zip(('neg', 'pos'), logits, strict=True))}\n"


def test_training_takes_the_newest_cache_and_names_it_first(journey: Journey) -> None:
    lines = journey.printed["train-student"].splitlines()
    assert lines[0] == f"cache {journey.cache}"
    assert lines[1].startswith("✓ tokenization verified: tokenizer files, ")
    assert f"✓ student trained: {journey.run}" in lines[-1]


def test_the_student_reads_every_token_before_it_decides(journey: Journey) -> None:
    config = json.loads((journey.run / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(journey.teacher)
    assert config["position_map"] is not None
    model = AutoModelForSequenceClassification.from_pretrained(journey.run.resolve()).eval()
    ids = tokenizer("It begins well, and then it drags.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        for position in range(ids.shape[1]):
            other = ids.clone()
            other[0, position] = ids[0, position] + 1
            assert not torch.equal(model(input_ids=other).logits, before), position


def test_evaluation_stands_beside_the_teacher_and_the_majority(
    journey: Journey, teacher_alone: Any
) -> None:
    assert journey.evaluation["num_documents"] == NUM_TEST
    assert journey.evaluation["marks"] == {}
    rows = {row["name"]: row for row in journey.evaluation["rows"]}
    assert list(rows) == ["majority", "teacher", journey.run.name]
    documents = load_corpus(CorpusConfig(source=str(journey.data), split="test")).documents(
        0, NUM_TEST
    )
    labels = np.array([document.label for document in documents])
    logits = np.stack([teacher_alone(document.text) for document in documents])
    assert rows["teacher"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert rows["teacher"]["agreement"] == 1
    assert rows["teacher"]["kl"] == pytest.approx(0)
    assert rows["majority"]["accuracy"] == max(labels.mean(), 1 - labels.mean())
    student = rows[journey.run.name]
    assert 0 <= student["agreement"] <= 1 and student["kl"] >= 0
    assert student["megabytes"] == pytest.approx(4 * student["num_parameters"] / 1e6)
    for name in ("teacher", journey.run.name):
        assert set(rows[name]["latency_ms"]) == {"8", "32"}
        assert all(latency > 0 for latency in rows[name]["latency_ms"].values())
    table = journey.printed["evaluate"]
    for shown in ("majority", "teacher", journey.run.name, "ms at 8", "ms at 32", "accuracy %"):
        assert shown in table


def test_predictions_are_those_of_transformers_pipeline(journey: Journey) -> None:
    printed = done("predict", journey.run, text="\n".join(TEXTS) + "\n")
    # Nor do they depend on what else is in the batch.
    assert printed.startswith(done("predict", journey.run, TEXTS[0]))
    classify = pipeline("text-classification", model=str(journey.run.resolve()), device="cpu")
    for text, line in zip(TEXTS, printed.splitlines(), strict=True):
        (found,) = classify([text])
        assert line == f"{found['label']}\t{found['score']:.3f}\t{text}"
        assert found["label"] in ("neg", "pos")


def test_predict_refuses_an_empty_text(journey: Journey) -> None:
    outcome = pipe("predict", journey.run, text="good\n\n")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "1 of 2 texts are empty" in outcome.error


def test_inspect_tells_settings_sizes_and_samples(journey: Journey) -> None:
    printed = done("inspect", journey.cache)
    manifest = read_manifest(journey.cache)
    first = CacheReader(journey.cache).sample(0)
    for shown in (
        "complete",
        manifest.fingerprint,
        "bytes a sample",
        str(manifest.splits["labeled"].num_documents),
        "class_logits float32[2]",
        "teacher right %",
        "how sure the teacher is",
        "tokens of a sample",
        first["sample_id"].tobytes().hex(),
    ):
        assert shown in printed


def test_inspect_json_is_the_manifest_and_what_was_measured(journey: Journey) -> None:
    printed = json.loads(done("inspect", journey.cache, "--json"))
    measured = printed.pop("measured")
    assert printed == json.loads((journey.cache / "manifest.json").read_text())
    logits = CacheReader(journey.cache, "unlabeled").column("class_logits").astype(float)
    sure = (1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)).mean()
    assert measured["unlabeled"]["confidence"]["mean"] == pytest.approx(sure)
    assert measured["unlabeled"]["captured_mass"] is None


@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_inspect_shows_a_sample_as_text_with_its_logits(journey: Journey, split: str) -> None:
    sample = CacheReader(journey.cache, split).sample(1)
    sample_id = sample["sample_id"].tobytes().hex()
    printed = done("inspect", journey.cache, "--sample", sample_id[:12])
    assert f"{split} sample 1, id {sample_id}" in printed
    label = {-1: "none", 0: "neg", 1: "pos"}[int(sample["label"])]
    assert f"label: {label}\n" in printed
    for name, logit in zip(("neg", "pos"), sample["class_logits"], strict=True):
        assert f"{name}  logit {logit:+.4f}" in printed
    assert f"{len(sample['input_ids'])} tokens: " in printed
    tokenizer = AutoTokenizer.from_pretrained(journey.teacher)
    text = tokenizer.decode(sample["input_ids"].tolist(), skip_special_tokens=True)
    assert f"text: {text}\n" in printed


def test_verify_finds_the_cache_sound_and_the_teacher_the_same(journey: Journey) -> None:
    printed = done("verify", journey.cache, "--deep", "4")
    assert f"✓ {journey.cache} is sound: 6 shards" in printed
    assert "✓ logits as cached: largest difference" in printed


def test_the_join_alone(journey: Journey) -> None:
    # Of the newest cache, with the tokenizer where the teacher has it.
    assert "✓ tokenization verified" in done("check", "--student-tokenizer", journey.teacher)


def test_both_commands_again_do_nothing(journey: Journey) -> None:
    before = _times(journey.folder)
    printed = done(*journey.cache_teacher)
    assert "0 shards computed, 6 kept" in printed
    printed = done("train-student", "--unlabeled-alpha", "0.3", *TINY_STUDENT)
    assert "student was trained before" in printed
    assert _times(journey.folder) == before


def _times(folder: Path) -> dict[Path, int]:
    """When each committed file was last written; the lock comes and goes."""
    return {
        path: path.stat().st_mtime_ns
        for where in ("caches", "runs")
        for path in (folder / where).rglob("*")
        if path.is_file()
    }
