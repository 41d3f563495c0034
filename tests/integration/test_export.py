"""A trained run becomes a file of another program, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.browser import open_browser
from tests.command_line import TINY_STUDENT, done, refused
from tests.ready_made import ReadyMade


@pytest.fixture(scope="module")
def run(ready_made: ReadyMade, small_language_model: Path, tmp_path_factory) -> Path:
    """A language model that was trained on three paragraphs; only to be read."""

    def make(folder: Path) -> None:
        text, cache = (tmp_path_factory.mktemp("export") / one for one in ("t.txt", "cache"))
        text.write_text("Emma Woodhouse, handsome, clever, and rich.\n\n" * 3)
        named = ("--data", text, "--txt-unit", "paragraph", "--max-length", "24")
        done(
            *("cache-teacher", "--task", "lm", "--teacher", small_language_model, "--out", cache),
            *named,
        )
        done("train-student", "--cache", cache, "--out", folder, *TINY_STUDENT)

    return ready_made.folder("runs/to-export", make)


def test_a_language_model_becomes_a_gguf(run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    out = tmp_path / "new" / "student.gguf"
    assert "student.gguf" in done("export", run, out, "--to", "gguf")
    read = gguf.GGUFReader(out)
    num_rows = json.loads((run / "config.json").read_text())["vocab_size"]
    assert len(read.get_field("tokenizer.ggml.tokens").contents()) == num_rows
    done("export", run, out, "--to", "gguf", "--ids-only")  # in its place
    assert gguf.GGUFReader(out).get_field("tokenizer.ggml.model").contents() == "none"


def test_what_cannot_be_written_is_refused(run: Path, bert_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.gguf"
    refused("export", run, out, "--to", "ggfu", saying="no format --to ggfu: did you mean 'gguf'")
    refused("export", bert_run, out, "--to", "gguf", saying="from a cache of --task lm")
    refused("export", tmp_path, out, "--to", "gguf", saying="is no run")
    refused("export", run, out, "--to", "onnx", "--ids-only", saying="--ids-only is for --to gguf")
    assert not out.exists()


def test_a_classifier_becomes_onnx(bert_run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="comes with the development tools")
    out = tmp_path / "student.onnx"
    done("export", bert_run, out, "--to", "onnx")
    labels = json.loads((bert_run / "config.json").read_text())["id2label"]
    text = "One of these films never drags."
    batch = AutoTokenizer.from_pretrained(bert_run)([text], return_tensors="np")
    session = onnxruntime.InferenceSession(out)
    (logits,) = session.run(
        ["logits"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    )
    shares = np.exp(logits[0]) / np.exp(logits[0]).sum()
    said = f"{labels[str(shares.argmax())]}\t{shares.max():.3f}\t{text}\n"
    assert done("predict", bert_run, text) == said


@pytest.mark.slow
def test_a_classifier_becomes_a_page(bert_run: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.html"
    refused("export", run, out, "--to", "html", saying="is no Mamba classifier, and the page")
    assert not out.exists()
    done("export", bert_run, out, "--to", "html")
    done("export", bert_run, out, "--to", "html")  # in its place
    text = "One of these films never drags."
    label, share, _ = done("predict", bert_run, text).split("\t")
    num = len(AutoTokenizer.from_pretrained(bert_run)(text)["input_ids"])
    with open_browser() as browser:
        browser.open(out)
        browser.wait_for("document.documentElement.dataset.ready")
        browser.type("#text", text)
        browser.wait_for(f"document.getElementById('state').innerText.startsWith('{num} ')")
        cells = browser.run(
            "return [...document.querySelector('tr.first').cells].map(c => c.innerText)"
        )
    assert cells[0] == label and float(cells[2].split()[0]) == pytest.approx(
        100 * float(share), abs=0.1
    )
