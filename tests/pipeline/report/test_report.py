"""`pipe report` as a user drives it, on students of a second."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages.training.config import TrainStudentConfig
from tests.command_line import done, refused
from tests.pipeline.report.read_page import Page
from tests.tiny_runs import cache_reviews, language_config, student_config

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


def read(page: Path) -> Page:
    """A whole page, whose structure is what any reader relies on."""
    found = Page.of(page)
    levels = [level for level, _ in found.headings]
    assert levels[:2] == [1, 2] and 1 not in levels[1:]
    assert all(low + 1 >= high for low, high in pairwise(levels)), "no level is passed over"
    assert all(one == {"svg", "figcaption", "table"} for one in found.figures)
    assert len(set(found.ids)) == len(found.ids)
    assert all(one.startswith("#") and one[1:] in found.ids for one in found.addresses)
    outside = re.findall(r"https?://[^\s<\"]+|@import|url\(", page.read_text())
    assert not outside, outside
    return found


def test_a_page_that_needs_no_other_file(run: Path, mapped: Path) -> None:
    assert f"✓ report {run / 'report.html'}" in done("report", run)
    found = read(run / "report.html")
    assert list(found.sections) == [
        *("Result", "Right and sure", "Agreement with the teacher", "Where they disagree most"),
        *("Time and memory", "Training", "Cache", "Attention", "Make it again"),
    ]
    assert "the same tokens: verified" in found.sections["Cache"]
    assert "attention_weight" in found.sections["Make it again"]
    evaluation = json.loads((run / "run.json").read_text())["result"]["evaluation"]
    accuracy = f"{100 * evaluation['eval_accuracy']:.1f}"
    # The training measured the same samples of the same cache.
    assert accuracy in found.sections["Result"] and accuracy in found.sections["Training"]
    first = CacheReader(mapped).sample(0)["sample_id"].tobytes().hex()
    assert f"mixing matrices of matched, sample {first}" in found.sections["Attention"]
    # The run is what it was: it can be evaluated, and reported again.
    assert "✓ report" in done("report", run)


def test_the_commands_make_the_run_again(run: Path) -> None:
    done("report", run)
    (command,) = re.findall(r"pipe (train-student [^#]*)#", Page.of(run / "report.html").words)
    assert "was trained before" in done(*shlex.split(command))


def test_samples_and_an_evaluation_are_asked_for(
    run: Path, mapped: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done("evaluate", run, "--data", acl_imdb, "--split", "test", "--json", figures)
    ids = [CacheReader(mapped).sample(idx)["sample_id"].tobytes().hex() for idx in (1, 2)]
    chosen = [word for one in ids for word in ("--sample", one)]
    done("report", run, "--out", page, "--evaluation", figures, *chosen)
    found = read(page)
    assert all(f"sample {one}" in found.sections["Attention"] for one in ids)
    written = json.loads(figures.read_text())
    assert [row["name"] for row in written["rows"]] == ["majority", "teacher", "matched"]
    for row in written["rows"]:
        assert f"{100 * row['accuracy']:.1f}" in found.sections["Result"]
    for one in written["details"]["models"]["matched"]["disagreements"]:
        assert one["text"] in found.words
    # Of an older release, which wrote no details.
    del written["details"]
    figures.write_text(json.dumps(written))
    done("report", run, "--out", page, "--evaluation", figures)
    assert list(read(page).sections)[:2] == ["Result", "Time and memory"]


def test_several_runs_on_one_page(run: Path, mapped: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    labels = trained(mapped, tmp_path / "matched-plain", alpha=0.0)
    done("report", labels, run, "--out", page)
    found = read(page)
    assert "2 runs compared" in found.words and "learned from labels alone" in found.words
    assert {"matched", "matched-plain"} <= {one.removesuffix("labels") for one in found.cells}
    other = trained(mapped, tmp_path / "deep" / "matched")
    refused("report", run, other, saying="two have one name: rename one")


def test_what_is_not_there_is_said(
    run: Path, mapped: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    plain = trained(tiny_cache, tmp_path / "plain", eval_fraction=0.0)
    done("report", plain, "--out", page)
    found = read(page)
    assert "held out no sample" in found.sections["Result"] and "Attention" not in found.sections
    refused("report", plain, "--sample", "00", "--out", page, saying="holds none: leave it out")
    done("report", plain, run, "--out", page)
    assert "trained from different caches; --evaluation FILE" in read(page).sections["Result"]
    refused("report", plain, run, "--cache", mapped, saying="different caches: leave out --cache")

    cache = shutil.copytree(mapped, tmp_path / "cache")
    moved = trained(cache, tmp_path / "moved")
    cache.rename(tmp_path / "elsewhere")
    done("report", moved, "--out", page)
    found = read(page)
    assert "--cache names where it lies now" in found.sections["Cache"]
    assert "Attention" not in found.sections and "Training" in found.sections
    refused("report", moved, "--out", page, "--sample", "00", saying="has no manifest.json")
    done("report", moved, "--out", page, "--cache", tmp_path / "elsewhere")
    assert "Attention" in read(page).sections


def test_a_student_without_matrices_leaves_the_teachers_maps(mapped: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    bert = tmp_path / "bert"
    shutil.copytree(CacheReader(mapped).manifest.about["teacher"], bert)
    config = TrainStudentConfig.of(
        cache=mapped, out=tmp_path / "run", arch=f"hf:{bert}", max_steps=1, device="cpu"
    )
    done("report", train_student.run(config).run, "--out", page)
    found = read(page).sections["Attention"]
    assert "is no Mamba student" in found and "Teacher's maps of run, sample" in found


def test_a_language_models_page(tmp_path: Path, tiny_gpt2: Path, acl_imdb: Path) -> None:
    cache = cache_teacher.run(language_config(tmp_path / "cache", tiny_gpt2, acl_imdb)).cache
    run = trained(cache, tmp_path / "run", unlabeled_alpha=0.0)
    done("report", run)
    found = read(run / "report.html")
    assert "perplexity" in found.sections["Result"] and "nats a token" in found.sections["Result"]
    assert "captured mass" in found.sections["Cache"]
    assert "next" in found.sections["Where they disagree most"]


def test_a_teachers_run(run: Path, mapped: Path, acl_imdb: Path, tmp_path: Path) -> None:
    """Reported without a cache; no student whose matrices could be drawn."""
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["cache_fingerprint"], record["about"]["max_length"]
    teacher = shutil.copytree(run, tmp_path / "fine-tuned")
    (teacher / "run.json").write_text(json.dumps(record))
    done("report", teacher)
    found = read(teacher / "report.html").sections
    assert list(found) == ["Result", "Training", "Make it again"]
    refused("report", teacher, run, saying="some of the runs are teachers'")
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
        saying = f"has the figures of {words}, and none of {run.name}"
        refused("report", run, "--evaluation", bad, saying=saying)
    refused("report", run, "--out", tmp_path, saying="it is a folder; give the path of a file")
    refused("report", run, "--out", "/dev/null", saying="it is no regular file")
    half = shutil.copytree(run, tmp_path / "half")
    record = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps(record | {"complete": False}))
    refused("report", half, saying="is not finished")
