"""Real reviews with labels of each kind of head, and small teachers of that kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from tests.tiny_models import write_tiny_bert

LENGTH = 24
NAMES = {
    "multi_label_classification": ("fresh", "funny", "long"),
    "regression": ("LABEL_0",),
}
Label = list[str] | float


def label_of(text: str, is_fresh: bool, head: str) -> Label:
    """What the text and its review say: the labels that it has, or tenths of its words."""
    num_words = len(text.split())
    if head == "regression":
        return num_words / 10
    has = {"fresh": is_fresh, "funny": "fun" in text.lower(), "long": num_words > 18}
    return [name for name, there in has.items() if there]


def write_labeled(
    file: Path, head: str, *, num: int = 120, second: str | None = None, split: str = "train"
) -> Path:
    """Write reviews with labels as jsonl; `second` names a column of a second text. Returns it."""
    config = CorpusConfig(source="reviews", split=split, max_samples=2 * num)
    documents = load_corpus(config).documents(0, 2 * num)
    rows = []
    for one, other in zip(documents[:num], documents[num:], strict=True):
        row: dict[str, Any] = {"text": one.text}
        if second is not None:
            row[second] = other.text
        rows.append(row | {"label": label_of(one.text, bool(one.label), head)})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def write_headed_bert(folder: Path, tokenizer: PreTrainedTokenizerBase, head: str) -> Path:
    """A tiny random BERT with a head of that kind, whose configuration says so."""
    classes = dict(enumerate(NAMES[head]))
    return write_tiny_bert(folder, tokenizer, classes=classes, problem_type=head)


def cache_labeled(
    out: Path, teacher: Path, data: Path, *, text_column: str | None = None, **changes: Any
) -> Path:
    """Stage one over such a file; returns the cache's folder."""
    labeled = CorpusConfig(source=str(data), text_column=text_column, pairs=True)
    config = CacheTeacherConfig.of(
        name="headed", teacher=str(teacher), device="cpu", max_length=LENGTH, labeled=labeled,
        out=out, **changes,
    )  # fmt: skip
    return cache_teacher.run(config).cache
