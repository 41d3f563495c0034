"""The programs of `examples/`, each run in a process of its own, and its notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.verify import verify
from tests.command_line import done
from tests.tiny_runs import cache_reviews

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    return cache_reviews(tmp_path_factory.mktemp("examples") / "cache", tiny_bert, acl_imdb)


def ran(program: str, *words: str | Path, code: str | None = None, **environ: str) -> str:
    """What a program prints; it must end well."""
    asked = ["-c", code] if code is not None else [str(EXAMPLES / program)]
    ended = subprocess.run(
        [sys.executable, *asked, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environ,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_there_are_no_others() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names == {
        *("own_teacher.py", "own_loop.py", "hugging_face_trainer.py", "explore_cache.ipynb")
    }


def test_a_teacher_of_ones_own(gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gpt2_tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"It is a truth that {i} is a number." for i in range(30)))
    out = tmp_path / "cache"
    assert "30 documents" in ran("own_teacher.py", tmp_path / "tokenizer", text, out)
    assert verify(out).problems == () and read_manifest(out).complete
    asked = ("--d-model", "16", "--num-layers", "1", "--head-dim", "16", "--max-steps", "2")
    asked += ("--temperature", "1")  # the one at which its probabilities are known
    printed = done("train-student", "--cache", out, "--out", tmp_path / "run", *asked)
    assert "✓ tokenization verified" in printed


def test_a_loop_of_ones_own(cache: Path, tmp_path: Path) -> None:
    printed = ran("own_loop.py", cache, tmp_path / "out", "30")
    first, last = (float(one) for one in re.findall(r"loss (\d+\.\d+)", printed))
    assert last < first
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_hugging_face_trainer(cache: Path, tiny_bert: Path, tmp_path: Path) -> None:
    printed = ran("hugging_face_trainer.py", cache, tiny_bert, tmp_path / "out", "3")
    assert "3 steps, mean loss" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_notebook(cache: Path) -> None:
    cells = json.loads((EXAMPLES / "explore_cache.ipynb").read_text())["cells"]
    code = "\n".join("".join(one["source"]) for one in cells if one["cell_type"] == "code")
    assert all(not one.get("outputs") for one in cells), "no figures of another machine"
    printed = ran("", code=code, CACHE=str(cache))
    assert "samples, teacher sure to" in printed and "documents, right" in printed
    assert "label " in printed
