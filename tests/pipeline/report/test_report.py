"""`pipe report` as a user drives it, on students of a second."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.training.config import TrainStudentConfig
from tests.command_line import done, refused
from tests.tiny_runs import cache_reviews, student_config

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "mapped"
    asked: dict[str, Any] = {"attention": "mean", "attention_layers": "all", "unlabeled": None}
    return cache_reviews(folder, tiny_bert, acl_imdb, **asked)


def trained(cache: Path, out: Path, **settings: Any) -> Path:
    asked = {"max_steps": 4, "log_steps": 1, "checkpoint_steps": 2, "eval_fraction": 0.3}
    return train_student.run(student_config(cache, out, **(asked | settings))).run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mapped: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "matched"
    return trained(mapped, out, num_layers=2, attention_weight=0.5)


def parts(page: Path) -> dict[str, str]:
    """The text of each section by its title."""
    found = re.findall(r"<h2>(.*?)</h2>(.*?)</section>", page.read_text(), re.DOTALL)
    return dict(found)


def pictures(part: str) -> list[str]:
    return re.findall(r'src="data:image/(\w+)', part)


def test_a_page_that_needs_no_other_file(run: Path, mapped: Path) -> None:
    assert f"✓ report {run / 'report.html'}" in done("report", run)
    found = parts(run / "report.html")
    assert list(found) == ["Training", "Held out", "Curves", "Cache", "Attention", "Settings"]
    assert "verified" in found["Training"] and ">attention_weight<" in found["Settings"]
    evaluation = json.loads((run / "run.json").read_text())["result"]["evaluation"]
    assert f"{evaluation['eval_accuracy']:,.4g}" in found["Held out"]
    assert pictures(found["Curves"]) == ["svg"] and pictures(found["Attention"]) == ["png"]
    first = CacheReader(mapped).sample(0)["sample_id"].tobytes().hex()
    assert f"student&#39;s mixing matrices, sample {first}" in found["Attention"]
    outside = re.findall(r'(?:src|href)="(?!data:|#)', (run / "report.html").read_text())
    assert not outside
    # The run is what it was: it can be evaluated, and reported again.
    assert "✓ report" in done("report", run)


def test_samples_and_an_evaluation_are_asked_for(
    run: Path, mapped: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done("evaluate", run, "--data", acl_imdb, "--split", "test", "--json", figures)
    ids = [CacheReader(mapped).sample(idx)["sample_id"].tobytes().hex() for idx in (1, 2)]
    chosen = [word for one in ids for word in ("--sample", one)]
    done("report", run, "--out", page, "--evaluation", figures, *chosen)
    found = parts(page)
    assert pictures(found["Attention"]) == ["png", "png"]
    rows = json.loads(figures.read_text())["rows"]
    assert [row["name"] for row in rows] == ["majority", "teacher", "matched"]
    for row in rows:
        assert f"<td>{row['name']}</td>" in found["Evaluation"]
        assert f"{row['accuracy']:,.4g}" in found["Evaluation"]


def test_what_is_not_there_is_said(
    run: Path, mapped: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    plain = trained(tiny_cache, tmp_path / "plain", eval_fraction=0.0)
    done("report", plain, "--out", page)
    found = parts(page)
    assert "Held out" not in found and "holds no attention maps" in found["Attention"]
    refused("report", plain, "--sample", "00", "--out", page, saying="holds none: leave it out")

    cache = shutil.copytree(mapped, tmp_path / "cache")
    moved = trained(cache, tmp_path / "moved")
    cache.rename(tmp_path / "elsewhere")
    done("report", moved, "--out", page)
    found = parts(page)
    assert "--cache names where it lies now" in found["Cache"] and "Attention" not in found
    refused("report", moved, "--out", page, "--sample", "00", saying="has no manifest.json")
    done("report", moved, "--out", page, "--cache", tmp_path / "elsewhere")
    assert pictures(parts(page)["Attention"]) == ["png"]


def test_a_student_without_matrices_leaves_the_teachers_maps(mapped: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    bert = tmp_path / "bert"
    shutil.copytree(CacheReader(mapped).manifest.about["teacher"], bert)
    config = TrainStudentConfig.of(
        cache=mapped, out=tmp_path / "run", arch=f"hf:{bert}", max_steps=1, device="cpu"
    )
    done("report", train_student.run(config).run, "--out", page)
    found = parts(page)["Attention"]
    assert "is no Mamba student" in found and pictures(found) == ["png"]
    assert "Teacher&#39;s maps, sample" in found


def test_a_teachers_run(run: Path, mapped: Path, acl_imdb: Path, tmp_path: Path) -> None:
    """Reported without a cache; no student whose matrices could be drawn."""
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["cache_fingerprint"], record["about"]["max_length"]
    teacher = shutil.copytree(run, tmp_path / "fine-tuned")
    (teacher / "run.json").write_text(json.dumps(record))
    done("report", teacher)
    found = parts(teacher / "report.html")
    assert "Curves" in found and "Cache" not in found and "Attention" not in found
    for option in (("--cache", mapped), ("--sample", "00")):
        refused("report", teacher, *option, saying="run of a teacher, .* leave out --cache")
    first = CacheReader(mapped).sample(0)["sample_id"].tobytes().hex()
    drawing = ("inspect", mapped, "--sample", first, "--attention-image", tmp_path / "x.png")
    refused(*drawing, "--run", teacher, saying="is the run of a teacher .* give a student's")
    evaluating = ("evaluate", teacher, "--data", acl_imdb, "--split", "test")
    refused(*evaluating, saying="is the run of a teacher")


def test_what_cannot_be_reported_is_refused(
    run: Path, mapped: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    refused("report", tmp_path, saying="is no run")
    refused("report", run, "--cache", tiny_cache, saying="is not the cache that")
    refused("report", run, "--cache", tmp_path, saying="has no manifest.json")
    refused("report", run, "--sample", "zz", saying="0 samples of")
    bad = tmp_path / "figures.json"
    refused("report", run, "--evaluation", bad, saying="cannot be read")
    for text in ("{", "[]", '{"rows": 1}'):
        bad.write_text(text)
        refused("report", run, "--evaluation", bad, saying="cannot be read")
    for rows, words in (([], "no model"), ([{"name": "teacher"}, {"name": "b"}], "teacher, b")):
        bad.write_text(json.dumps({"rows": rows}))
        saying = f"has the figures of {words}, and none of {run}"
        refused("report", run, "--evaluation", bad, saying=saying)
    refused("report", run, "--out", tmp_path, saying="it is a folder; give the path of a file")
    refused("report", run, "--out", "/dev/null", saying="it is no regular file")
    half = shutil.copytree(run, tmp_path / "half")
    record = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps(record | {"complete": False}))
    refused("report", half, saying="is not finished")
