"""Students of a language model's cache that real stage one made: a second corpus, a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done
from tests.tiny_runs import cache_language, result_log, student_config

ALPHA, UNLABELED_ALPHA, T = 0.4, 0.7, 1.5


def slow_means(cache: Path, split: str, student: Any) -> dict[str, float]:
    """KD and cross-entropy over all counted positions of a split, a document at a time, float64."""
    reader = CacheReader(cache, split)
    codec: Any = codec_from(reader.manifest.settings["codec"])
    kds, ces = [], []
    for sample_idx in range(len(reader)):
        sample = reader.sample(sample_idx)
        decoded = codec.decode(codec.expand(sample), T)
        for document in np.unique(sample["segment"]):
            places = np.flatnonzero(sample["segment"] == document)
            ids = torch.from_numpy(sample["input_ids"][places].astype(np.int64))
            with torch.no_grad():
                logits = student(input_ids=ids[None]).logits[0].double()
            for row, at, real in zip(logits, places[:-1], ids[1:], strict=False):
                log_q = (row / T).log_softmax(0)
                head = torch.from_numpy(decoded.ids[at])
                log_p = torch.from_numpy(decoded.log_probs[at].astype(np.float64))
                log_tail = torch.tensor(float(decoded.tail_log_prob[at]), dtype=torch.float64)
                outside = torch.ones(len(row), dtype=torch.bool)
                outside[head] = False
                tail = log_tail.exp() * (log_tail - log_q[outside].logsumexp(0))
                kds.append(float((log_p.exp() * (log_p - log_q[head])).sum() + tail))
                ces.append(-float(row.log_softmax(0)[real]))
    return {"kd": float(np.mean(kds)), "ce": float(np.mean(ces))}


def test_a_step_has_the_divergence_of_both_and_the_cross_entropy_of_one(
    small_language_model: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    cache = cache_language(tmp_path / "cache", small_language_model, acl_imdb, exact=True)
    config = student_config(
        cache, tmp_path / "run", batch_size=1000, gradient_accumulation=2, max_steps=1,
        checkpoint_steps=1, eval_fraction=0.0, alpha=ALPHA, temperature=T,
        unlabeled_alpha=UNLABELED_ALPHA,
    )  # fmt: skip
    run = train_student.run(config).run
    (line,) = [one for one in result_log(run) if "loss" in one]
    student = build_language_model(
        MambaStudentConfig.from_pretrained(run), seed=config.training.seed
    )
    labeled, unlabeled = (
        slow_means(cache, split, student.eval()) for split in ("labeled", "unlabeled")
    )
    assert line["ce"] == pytest.approx(labeled["ce"], rel=1e-4)
    assert line["kd"] == pytest.approx(labeled["kd"], rel=1e-4)
    assert line["kd_unlabeled"] == pytest.approx(unlabeled["kd"], rel=1e-4)
    assert unlabeled["kd"] != pytest.approx(labeled["kd"], rel=1e-3)
    expected = T**2 * (ALPHA * labeled["kd"] + UNLABELED_ALPHA * unlabeled["kd"])
    assert line["loss"] == pytest.approx(expected + (1 - ALPHA) * labeled["ce"], rel=1e-3)


def test_from_the_command_line(small_language_model: Path, acl_imdb: Path, tmp_path: Path) -> None:
    """Each corpus by its own option, as a user names them."""
    done(
        "cache-teacher", "--task", "lm", "--data", acl_imdb, "--max-samples", "12",
        "--unlabeled", acl_imdb, "--unlabeled-split", "unsupervised",
        "--unlabeled-max-samples", "6", "--teacher", small_language_model,
        "--max-length", "24", "--device", "cpu", "--top-k", "4", "--out", tmp_path / "cache",
    )  # fmt: skip
    splits = CacheReader(tmp_path / "cache").manifest.splits
    assert {name: one.num_documents for name, one in splits.items()} == {
        "labeled": 12,
        "unlabeled": 6,
    }
    for alpha in ("0.3", "0"):
        run = tmp_path / f"run-{alpha}"
        done(
            "train-student", "--cache", tmp_path / "cache", "--out", run, "--device", "cpu",
            "--d-model", "8", "--num-layers", "1", "--expand", "2", "--d-state", "4",
            "--head-dim", "8", "--batch-size", "4", "--max-steps", "4", "--log-steps", "1",
            "--unlabeled-alpha", alpha,
        )  # fmt: skip
        lines = [line for line in result_log(run) if "loss" in line]
        # Batches of the two kinds alternate; each step's line has the terms of its own kind.
        kinds = ["kd_unlabeled" if "kd_unlabeled" in line else "ce" for line in lines]
        assert kinds == (["ce", "kd_unlabeled"] * 2 if alpha == "0.3" else ["ce"] * 4)


def test_starts_from_the_teachers_embeddings(
    small_language_model: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    """A student of the teacher's width, at a learning rate of almost nothing, has its angles."""
    cache = cache_language(tmp_path / "cache", small_language_model, acl_imdb)
    config = student_config(
        cache, tmp_path / "run", d_model=32, lr=1e-12, max_steps=1, embeddings="teacher"
    )
    run = train_student.run(config).run
    student: Any = AutoModelForCausalLM.from_pretrained(run)
    teacher: Any = AutoModelForCausalLM.from_pretrained(small_language_model)
    angles = [
        torch.nn.functional.normalize(one.get_input_embeddings().weight[:280].detach(), dim=1)
        for one in (student, teacher)
    ]
    found, expected = (one @ one.T for one in angles)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert torch.equal(student.lm_head.weight, student.get_input_embeddings().weight)
    files = read_manifest(cache).teacher_files
    recorded = read_run(run).settings["teacher_embeddings_sha256"]
    assert recorded == files["embeddings.safetensors"]
