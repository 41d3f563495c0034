"""Distances to a teacher's inside, against loops over samples, rows and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.distillation.inside import RIDGE, Distances, distances
from benchmarks.distillation.tables import inside_grid
from benchmarks.transfer import Inside, goals
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.evaluation.matched_attention import InsideOfRun
from tests.tiny_runs import cache_reviews, student_config

LAYERS: dict[str, Any] = {"attention": "mean", "attention_layers": "all", "hidden": "0,1"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "mapped"
    return cache_reviews(folder, tiny_bert, acl_imdb, unlabeled=None, **LAYERS)


def trained(cache: Path, out: Path, **settings: Any) -> Path:
    asked = {"num_layers": 2, "eval_fraction": 0.0} | settings
    return train_student.run(student_config(cache, out, **asked)).run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return trained(cache, tmp_path_factory.mktemp("runs") / "plain", max_steps=2)


def row_kls(inside: InsideOfRun, sample: dict[str, Any], *, evenly: bool) -> list[float]:
    """Of each row of each layer, entry by entry."""
    found: list[float] = []
    for layer in inside.matched_attention(sample).layers:
        for teacher, student in zip(layer.teacher, layer.student, strict=True):
            reached = ~np.isnan(student)
            other = np.where(reached, 1 / reached.sum(), np.nan) if evenly else student
            smoothed = (1 - 1e-6) * other + 1e-6 / reached.sum()
            terms = [
                p * (np.log(p) - np.log(q))
                for p, q in zip(teacher[reached], smoothed[reached], strict=True)
                if p > 0
            ]
            found.append(float(sum(terms)))
    return found


def states(inside: InsideOfRun, sample: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each layer, the student's and the teacher's in the student's order."""
    outputs = inside.outputs(inside.batch([sample]))
    num = len(sample["input_ids"])
    order = [*range(1, num), 0]  # CLS goes last
    return [
        (
            outputs.hidden_states[layer + 1][0, :num].double().numpy(),
            sample[f"hidden_{layer}"].astype(np.float64)[order],
        )
        for layer in (0, 1)
    ]


def test_distances_are_those_of_loops(cache: Path, run: Path) -> None:
    reader = CacheReader(cache)
    inside = InsideOfRun.of(run, reader)
    samples = [reader.sample(idx) for idx in range(7)]
    found = distances(run, cache, num_reviews=7)
    assert found.num_reviews == 7
    for value, evenly in ((found.map_kl, False), (found.even_kl, True)):
        kls = [kl for sample in samples for kl in row_kls(inside, sample, evenly=evenly)]
        assert value == pytest.approx(np.mean(kls), rel=1e-4, abs=1e-7)
    assert found.map_kl != pytest.approx(found.even_kl, rel=0.01)

    apart: list[float] = []
    by_sample = [states(inside, sample) for sample in samples]
    for layer in (0, 1):
        x = np.concatenate([one[layer][0] for one in by_sample[::2]])
        y = np.concatenate([one[layer][1] for one in by_sample[::2]])
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        ridge = RIDGE * np.mean((x**2).sum(axis=0))
        # Ridge regression as least squares with a row more for each weight.
        extended = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
        wanted = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
        projection = np.linalg.lstsq(extended, wanted, rcond=None)[0]
        for one in by_sample[1::2]:
            for student, teacher in zip(*one[layer], strict=True):
                projected = student @ projection
                cosine = projected @ teacher / np.linalg.norm(projected) / np.linalg.norm(teacher)
                apart.append(1 - cosine)
    assert found.hidden == pytest.approx(np.mean(apart), rel=1e-3)


def test_matching_brings_them_nearer(tmp_path: Path, cache: Path, run: Path) -> None:
    before = distances(run, cache, num_reviews=8)
    weights = {"attention_weight": 20.0, "hidden_weight": 20.0}
    matched = trained(cache, tmp_path / "matched", max_steps=60, lr=1e-2, **weights)
    after = distances(matched, cache, num_reviews=8)
    assert after.map_kl < 0.9 * before.map_kl
    assert after.hidden < 0.9 * before.hidden
    assert after.even_kl == pytest.approx(before.even_kl)


def inside(name: str, *map_kl: float, block: str = "main") -> Inside:
    return Inside(
        key=f"{block}/{name}",
        title=f"the {name}",
        block=block,
        num_reviews=512,
        map_kl=map_kl,
        even_kl=0.75,
        hidden=tuple(kl / 2 for kl in map_kl),
    )


def test_goals_are_of_the_worst_seed() -> None:
    rows = [inside("logits", 0.5, 0.4), inside("attention", 0.2, 0.3)]
    found = list(goals(rows, standard=True))
    assert [goal.value for goal in found] == [pytest.approx(0.75), None, None]
    assert [goal.verdict for goal in found] == ["met", "not measured", "not measured"]
    worse = [*rows, inside("both", 0.1, 0.41), inside("staged", 0.1, 0.1)]
    assert [goal.verdict for goal in goals(worse, standard=True)] == ["met", "missed", "met"]
    assert {goal.verdict for goal in goals(worse, standard=False)} == {"other sizes"}


def test_table_shows_each_seed() -> None:
    grid = inside_grid("inside", [inside("logits", 0.5, 0.4), inside("both", 0.2)])
    assert grid.lines == (
        ("any row spread evenly", "0.750", "–"),
        ("the logits", "0.450 (0.500, 0.400)", "0.225 (0.250, 0.200)"),
        ("the both", "0.200", "0.100"),
    )


def test_fewer_reviews_than_asked_for(cache: Path, run: Path) -> None:
    found = distances(run, cache, num_reviews=10_000)
    assert isinstance(found, Distances) and found.num_reviews == len(CacheReader(cache))
