"""How large the house is, and how many files one logit enters on its way to the loss.

    python -m benchmarks.rooms

A tiny classifier and a tiny language model are cached and a student of each trains for two steps,
as `pipe` does it, under `sys.setprofile`: a file counts where one of its functions is called while
a shard is captured or committed, a sample is read and collated, or a micro-batch's loss computed.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from teacher_cache.cache.writer import CacheWriter
from teacher_cache.pipeline.cli import app
from teacher_cache.stages.teacher.task import Task
from teacher_cache.stages.training.batches import CachedSamples, Collator
from teacher_cache.stages.training.trainer import StudentTrainer

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "stages", "pipeline")
PACKAGE = "teacher_cache"
NUM_WORDS = 60
WAY: dict[str, list[tuple[Any, str]]] = {
    "capture": [(Task, "capture")],
    "commit": [(CacheWriter, "commit")],
    "read": [(CachedSamples, "__getitem__"), (Collator, "__call__")],
    "train": [(StudentTrainer, "compute_loss")],
}
SHAPE = ("--d-model=16", "--num-layers=1", "--expand=2", "--d-state=8", "--head-dim=8")
FEW_STEPS = ("--max-steps=2", "--batch-size=4", "--device=cpu")


class Visitors:
    """The files that were entered, by part of the way."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {part: set() for part in WAY}

    def entered_in(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, under the profiler."""

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(lambda frame, event, _: self._enter(part, frame, event))
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(before)

        return watched

    def _enter(self, part: str, frame: Any, event: str) -> None:
        if event != "call":
            return
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS:
            self.found[part].add(path.relative_to(ROOT).as_posix())

    def table(self, name: str) -> str:
        """A line for a task."""
        every = set().union(*self.found.values())
        parts = ", ".join(f"{part} {len(files)}" for part, files in self.found.items())
        return f"{name}: {len(every)} files ({parts})"


@contextmanager
def watched() -> Iterator[Visitors]:
    """All parts of the way under the profiler in the body."""
    visitors, before = Visitors(), []
    for part, places in WAY.items():
        for owner, name in places:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, visitors.entered_in(part, getattr(owner, name)))
    try:
        yield visitors
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def save_tokenizer(folder: Path) -> None:
    """A word an id."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(NUM_WORDS - 4))]
    own = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    own.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "eos": "[SEP]", "unk": "[UNK]"}
    tokens = {f"{name}_token": token for name, token in named.items()}
    PreTrainedTokenizerFast(tokenizer_object=own, **tokens).save_pretrained(folder)


def save_teachers(folder: Path) -> tuple[Path, Path]:
    """A classifier and a language model, random and tiny."""
    torch.manual_seed(0)
    classifier, language_model = folder / "classifier", folder / "language-model"
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels: Any = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    bert = BertConfig(vocab_size=NUM_WORDS, intermediate_size=16, **size, **labels)
    BertForSequenceClassification(bert).save_pretrained(classifier)
    gpt2 = GPT2Config(vocab_size=NUM_WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(language_model)
    for one in (classifier, language_model):
        save_tokenizer(one)
    return classifier, language_model


def save_texts(folder: Path) -> None:
    """Forty documents, with labels and without."""
    texts = [" ".join(f"w{(7 * i + j) % 50}" for j in range(9)) for i in range(40)]
    labels = [("neg", "pos")[i % 2] for i in range(len(texts))]
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    (folder / "data.csv").write_text("\n".join(["text,label", *rows]))
    (folder / "data.txt").write_text("\n".join(texts))


def size_of_the_house() -> str:
    """Modules, lines, and how many of our own modules each imports in the mean."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    modules = {
        ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)): path.read_text()
        for path in paths
        if path.name != "__init__.py"
    }
    num_imports = 0
    for text in modules.values():
        statements = [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.ImportFrom)]
        named = {one.module for one in statements}
        named |= {f"{one.module}.{name.name}" for one in statements for name in one.names}
        num_imports += len(named & modules.keys())
    num_lines = sum(len(text.splitlines()) for text in modules.values())
    mean = num_imports / len(modules)
    return f"{len(modules)} modules, {num_lines:,} lines, {mean:.1f} own imports a module"


def visit(name: str, folder: Path, *options: str) -> str:
    """Cache and train under the profiler.

    Args:
        name: of the task.
        folder: for cache and run.
        *options: of `pipe cache-teacher`.
    """
    cache, run = folder / name / "cache", folder / name / "run"
    commands = (
        ["cache-teacher", "--device=cpu", f"--out={cache}", *options],
        ["train-student", f"--cache={cache}", f"--out={run}", *SHAPE, *FEW_STEPS],
    )
    with watched() as visitors:
        for command in commands:
            app(command, standalone_mode=False)
    return visitors.table(name)


def main() -> None:
    """Print a line a task."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        classifier, language_model = save_teachers(folder)
        save_texts(folder)
        of_classes = (f"--data={folder}/data.csv", f"--teacher={classifier}")
        of_words = (f"--data={folder}/data.txt", f"--teacher={language_model}", "--top-k=8")
        tables = [
            visit("classifier", folder, *of_classes),
            visit("language model", folder, "--task=lm", *of_words),
        ]
    print("\n".join([size_of_the_house(), *tables]))


if __name__ == "__main__":
    main()
