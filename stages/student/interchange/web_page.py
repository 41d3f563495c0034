"""A classifier as one HTML page that reads typed text in the browser, without a network.

The page holds the student as ONNX, its tokenizer, onnxruntime-web and tokenizers.js. It also holds
what Python said of some texts: a browser that reads or computes otherwise refuses to answer.
"""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged.packages import PackagedAsset, fetch
from teacher_cache.stages.heads import SINGLE, head_of_model
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.interchange.onnx import write_onnx
from teacher_cache.stages.tokens.frame import surroundings

TEMPLATE = "web_page.html.jinja"
RUNTIME, TOKENIZERS = "onnxruntime-web", "tokenizers-js"
PROGRAMS = (
    PackagedAsset(
        name=RUNTIME,
        manager="npm",
        requirement="onnxruntime-web@1.30.0",
        archive="onnxruntime-web-1.30.0.tgz",
        sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
        files={
            "package/dist/ort.wasm.bundle.min.mjs": "onnxruntime.mjs",
            "package/dist/ort-wasm-simd-threaded.wasm": "onnxruntime.wasm",
        },
    ),
    PackagedAsset(
        name=TOKENIZERS,
        manager="npm",
        requirement="@huggingface/tokenizers@0.2.0",
        archive="huggingface-tokenizers-0.2.0.tgz",
        sha256="2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
        files={"package/dist/tokenizers.min.mjs": "tokenizers.mjs"},
    ),
)
# What the page is to read as Python does before it answers; the long one is cut.
CHECKED_TEXTS = (
    "A warm, funny film that never drags.",
    "It's 90 minutes too long; I'd give it 2/10 (at best)!",
    "Ein schönes, kluges Märchen. ÉCOLE, naïve, Ångström",
    "  spaces   and\n\nlines\tand tabs ",
    "素晴らしい映画でした。 Отличный фильм, फ़िल्म अच्छी है",
    "😀👍🏽 e\u0301 …“quotes” — <br /> and HTML &amp; https://example.org/?q=1",
    "long " * 5000,
)
TOLERANCE = 1e-3


def write_page(
    model: PreTrainedModel, tokenizer: Tokenizer | None, out: Path, *, source: str
) -> None:
    """Write a classifier as one HTML page.

    Args:
        model: a Mamba student in evaluation mode, a classifier.
        tokenizer: its own; texts are cut to its `model_max_length`.
        out: the file.
        source: what is written, as a sentence begins.

    Raises:
        UserError: if the model is no such student, its tokenizer is not of the Rust library, the
            programs of the page cannot be fetched, or `write_onnx` refuses.
    """
    if not isinstance(model, MambaStudentForSequenceClassification):
        raise UserError(f"{source} is no Mamba classifier, and the page classifies: give one")
    num_outputs = len(model.config.id2label or {})
    head = head_of_model(source, model.config.problem_type, num_outputs)
    if head is not SINGLE:
        raise UserError(
            f"{source} is {head.kind}, and the page says which one of several classes it is: give "
            "a student of such a teacher, or --to onnx"
        )
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise UserError(
            f"the tokenizer of {source} is a {type(tokenizer).__name__}, which no browser reads: "
            "give a student whose tokenizer has a tokenizer.json"
        )
    runtime, reader = fetch(RUNTIME, PROGRAMS), fetch(TOKENIZERS, PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.onnx"
        write_onnx(model, None, file, source=source)
        content = file.read_bytes()
    parts = {
        "onnxruntime": (runtime / "onnxruntime.mjs").read_bytes(),
        "wasm": (runtime / "onnxruntime.wasm").read_bytes(),
        "tokenizers": (reader / "tokenizers.mjs").read_bytes(),
        "tokenizer": backend.to_str().encode(),
        "model": content,
    }
    name = Path(source).name
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    page = environment.from_string(_template()).render(
        title=f"{name}: what does it say?",
        about=f"A student of {model.num_parameters() / 1e6:.1f} million parameters.",
        parts={part: base64.b64encode(gzip.compress(one)).decode() for part, one in parts.items()},
        student=_for_script(_facts(model, tokenizer)),
    )
    write_bytes_atomically(out, page.encode())


def _template() -> str:
    return (files("teacher_cache.stages.student.interchange") / TEMPLATE).read_text("utf-8")


def _for_script(value: Any) -> str:
    """JSON inside a script element, which no text in it can end."""
    return json.dumps(value).replace("<", "\\u003c")


def _facts(model: MambaStudentForSequenceClassification, tokenizer: Tokenizer) -> dict[str, Any]:
    around = surroundings(tokenizer)
    limit = tokenizer.model_max_length
    labels = model.config.id2label
    assert labels is not None, "a classifier has classes"
    return {
        "labels": [labels[index] for index in range(len(labels))],
        "tokenizer_config": {"tokenizer_class": type(tokenizer).__name__},
        "max_length": limit if limit < torch.iinfo(torch.int32).max else None,
        "num_before": len(around.before),
        "num_after": len(around.after),
        "cuts_left": tokenizer.truncation_side == "left",
        "tolerance": TOLERANCE,
        "checks": _checks(model, tokenizer, CHECKED_TEXTS),
    }


def _checks(
    model: MambaStudentForSequenceClassification, tokenizer: Tokenizer, texts: Sequence[str]
) -> list[dict[str, Any]]:
    checks = []
    for text in texts:
        ids = tokenizer(text, truncation=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        checks.append({"text": text, "ids": ids, "logits": logits.tolist()})
    return checks
