"""Training in this process or several; what a whole tiny benchmark does is in test_quality."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.distillation.jobs import Job, run_jobs
from benchmarks.distillation.predictions import HeldOut
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Document
from tests.tiny_runs import cache_reviews, student_config


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    return cache_reviews(tmp_path_factory.mktemp("caches") / "tiny", tiny_bert, acl_imdb)


@pytest.fixture
def held_out() -> HeldOut:
    texts = ["a warm, funny film", "it drags", "a dull mess of a film"]
    documents = [Document(text, "test", "test", idx) for idx, text in enumerate(texts)]
    return HeldOut(
        documents=documents, key="abc", labels=np.array([1, 0, 0]), movie_idx=np.array([0, 0, 1])
    )


def test_trains_asks_and_says_so(tiny_cache: Path, tmp_path: Path, held_out: HeldOut) -> None:
    configs = [student_config(tiny_cache, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    jobs = [
        Job(title=f"seed {config.training.seed}", config=config, held_out=held_out)
        for config in configs
    ]
    said: list[str] = []
    run_jobs(jobs, num_workers=1, num_threads=1, say=said.append)
    assert said[0] == "started seed 0" and said[1].startswith("1 of 2: seed 0 trained in ")
    for config in configs:
        assert config.training.out is not None
        with np.load(config.training.out / "logits-abc.npz") as found:
            assert found["logits"].shape == (3, 2)
    run_jobs(jobs[1:], num_workers=1, num_threads=1, say=said.append)
    assert said[-1] == "1 of 1: seed 1 was trained before"


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_ends_all_with_its_sentence(
    tmp_path: Path, held_out: HeldOut, num_workers: int
) -> None:
    configs = [student_config(tmp_path / "none", tmp_path / str(idx)) for idx in range(3)]
    jobs = [
        Job(title=str(config.training.out), config=config, held_out=held_out) for config in configs
    ]
    said: list[str] = []
    with pytest.raises(UserError, match="none"):
        run_jobs(jobs, num_workers=num_workers, num_threads=1, say=said.append)
    assert len(said) == num_workers, "nothing was started after the error"
    assert not multiprocessing.active_children()
