"""The readers that docs/format.md prints, against the product's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import DistinctCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.reader import CacheReader
from tests.tiny_language_models import tiny_teacher, write_cache

PAGE = (Path(__file__).parents[1] / "docs/format.md").read_text()
PYTHON, JAVASCRIPT = (
    re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[0] for language in ("python", "js")
)
NUM_IDS = 100_000  # so that ids have a plane


def program(language: str) -> ModuleType:
    """The page's functions."""
    module = ModuleType("read")
    exec(compile(language, "docs/format.md", "exec"), module.__dict__)
    return module


CODECS: dict[str, Codec] = {
    "a byte a value": TopKCodec(support_size=NUM_IDS, top_k=10),
    "exact": TopKCodec(support_size=NUM_IDS, top_k=10, is_exact=True),
    "a nucleus": TopKCodec(support_size=NUM_IDS, top_k=10, top_p=0.001, version=2),
    "distinct ids": DistinctCodec(support_size=NUM_IDS, num_ids=9),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: object) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    teacher = tiny_teacher(NUM_IDS)
    texts = ["It is a truth universally acknowledged", "that a single man", "must be"]
    return {
        name: write_cache(folder / name.replace(" ", "-"), codec, gpt2_tokenizer, texts, teacher)  # pyright: ignore[reportArgumentType]
        for name, codec in CODECS.items()
    }


@pytest.mark.parametrize("temperature", (1.0, 2.0, 2.5))
@pytest.mark.parametrize("name", [one for one in CODECS if one != "distinct ids"])
def test_heads_and_tails(name: str, temperature: float, caches: dict[str, Path]) -> None:
    codec, read, reader = CODECS[name], program(PYTHON), CacheReader(caches[name], "labeled")
    found = list(read.samples(caches[name]))
    assert len(found) == len(reader) > 0
    for index, sample in enumerate(found):
        assert np.array_equal(sample["input_ids"], reader.sample(index)["input_ids"])
        wanted = codec.decode(codec.expand(reader.sample(index)), temperature)
        assert wanted.ids is not None
        rows = list(read.topk(codec.settings, sample, temperature))
        assert len(rows) == len(wanted.ids)
        for place, (ids, log_probs, rest) in enumerate(rows):
            filled = wanted.ids[place] >= 0
            assert ids.tolist() == wanted.ids[place][filled].tolist()
            np.testing.assert_allclose(log_probs, wanted.log_probs[place][filled], atol=1e-5)
            np.testing.assert_allclose(rest, wanted.tail_log_prob[place], atol=1e-5)
            assert np.exp(log_probs).sum() + np.exp(rest) == pytest.approx(1)
    assert max(ids.max() for ids, _, _ in rows) >= 2**16  # the plane is read


@pytest.mark.parametrize("temperature", (1.0, 3.0))
def test_distinct_ids(temperature: float, caches: dict[str, Path]) -> None:
    codec, cache, read = CODECS["distinct ids"], caches["distinct ids"], program(PYTHON)
    assert isinstance(codec, DistinctCodec)
    reader = CacheReader(cache, "labeled")
    for index, sample in enumerate(read.samples(cache)):
        wanted = codec.kept(codec.expand(reader.sample(index)), temperature)
        for place, (ids, log_probs, weights) in enumerate(
            read.distinct(codec.settings, sample, temperature)
        ):
            filled = wanted.ids[place] >= 0
            assert ids.tolist() == wanted.ids[place][filled].tolist()
            np.testing.assert_allclose(log_probs, wanted.log_probs[place][filled], atol=1e-9)
            np.testing.assert_allclose(weights, wanted.log_weights[place][filled], atol=1e-9)


def test_the_program_runs_without_the_product(caches: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(PYTHON)
    name = "a byte a value"
    ran = subprocess.run(
        [sys.executable, "-I", tmp_path / "read.py", caches[name], "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "teacher_cache" not in PYTHON
    _check_first_of_each(ran.stdout, caches[name], 1.0)


@pytest.mark.slow
def test_the_program_in_javascript(caches: dict[str, Path], tmp_path: Path) -> None:
    npm, node = (shutil.which(one) for one in ("npm", "node"))
    if npm is None or node is None:
        pytest.skip("there is no Node here")
    subprocess.run(
        [npm, "install", "--silent", "apache-arrow@21.1.0"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "read.mjs").write_text(JAVASCRIPT)
    name = "a byte a value"
    ran = subprocess.run(
        [node, "read.mjs", caches[name], "2"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    _check_first_of_each(ran.stdout, caches[name], 2.0)


def _check_first_of_each(printed: str, cache: Path, temperature: float) -> None:
    """Most probable ids and their probabilities, a line a position."""
    codec = CODECS["a byte a value"]
    wanted = codec.decode(codec.expand(CacheReader(cache, "labeled").sample(0)), temperature)
    assert wanted.ids is not None
    rows = [line.split() for line in printed.splitlines()]
    assert [int(token) for token, _ in rows] == wanted.ids[:, 0].tolist()
    found = [float(probability) for _, probability in rows]
    np.testing.assert_allclose(found, np.exp(wanted.log_probs[:, 0]), rtol=1e-5)
