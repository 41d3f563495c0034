"""The recipe: what is trained, as plain data. This is the one place to change settings in.

Every row's students have the same weights to begin with, read the same text in the same order and
take as many steps; they differ in what the cache kept of the teacher, and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]

TEMPERATURE = 1.0  # as published, and where the teacher's distribution is its own
ON_CPU: Settings = {"device": "cpu", "dtype": "float32"}
MAX_LENGTH = 128  # tokens, of teachers and students


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: what `--rows` calls it.
        title: what the table calls it.
        codec: of `CacheTeacherConfig`: what is kept of the teacher.
        alpha: share of the distillation term; the next tokens get the rest.
        is_renormalised: whether the tail's mass is thrown away, so that the head claims it.
    """

    name: str
    title: str
    codec: tuple[tuple[str, Any], ...]
    alpha: float = 1.0
    is_renormalised: bool = False

    @property
    def kept(self) -> tuple[tuple[tuple[str, Any], ...], bool]:
        """What decides the bytes that it learns from, whatever the weights of its terms."""
        return self.codec, self.is_renormalised


def _topk(top_k: int) -> tuple[tuple[str, Any], ...]:
    return (("codec", "topk"), ("top_k", top_k))


def _distinct(num_ids: int) -> tuple[tuple[str, Any], ...]:
    return (("codec", "sampled"), ("num_ids", num_ids))


DENSE = (("codec", "dense"),)
HIDDEN = (("codec", "hidden"),)
SAMPLED = (("codec", "sampled"), ("num_draws", 50))

NONE = Row(name="none", title="none: next tokens alone", codec=_topk(12), alpha=0.0)
DISTILLED: tuple[Row, ...] = (
    Row(name="dense", title="dense", codec=DENSE),
    Row(name="hidden", title="hidden", codec=HIDDEN),
    Row(name="naive-12", title="top-12, renormalised", codec=_topk(12), is_renormalised=True),
    Row(name="naive-50", title="top-50, renormalised", codec=_topk(50), is_renormalised=True),
    Row(name="ghost-12", title="top-12 and ghost", codec=_topk(12)),
    Row(name="ghost-50", title="top-50 and ghost", codec=_topk(50)),
    Row(name="ghost-64", title="top-64 and ghost", codec=_topk(64)),
    Row(name="sampled-50", title="50 draws", codec=SAMPLED),
    Row(name="distinct-18", title="18 distinct ids", codec=_distinct(18)),
    Row(name="distinct-32", title="32 distinct ids", codec=_distinct(32)),
    Row(name="distinct-45", title="45 distinct ids", codec=_distinct(45)),
)
HALF = 0.5  # the product's default
MIXED = "-half"  # ends the name of a row whose terms weigh the same
WITH_LABELS: tuple[Row, ...] = tuple(
    Row(
        name=f"{row.name}{MIXED}",
        title=f"{row.title}, half next tokens",
        codec=row.codec,
        alpha=HALF,
        is_renormalised=row.is_renormalised,
    )
    for row in DISTILLED
    if row.name in ("dense", "naive-12", "ghost-12", "ghost-50", "sampled-50")
)
ROWS: tuple[Row, ...] = (NONE, *DISTILLED, *WITH_LABELS)
BASELINE, BEST = "none", "dense"  # what every row is compared with

TEACHER: Settings = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
# Of `TrainStudentConfig`.
STUDENT: Settings = {
    "d_model": 128,
    "num_layers": 2,
    "expand": 2,
    "d_state": 32,
    "head_dim": 32,
    "batch_size": 4,
    "lr": 3e-3,
    "temperature": TEMPERATURE,
    "eval_fraction": 0,
    "log_steps": 50,
}


@dataclass(frozen=True, kw_only=True)
class SmolLM2Scale:
    """How much of SmolLM2, which takes seconds a sequence.

    Attributes:
        batch_size: of the student whose gradients are compared.
        num_steps: of that student, all over one chapter.
        gradient_batch: sequences of a step that is compared.
        gradient_steps: steps that are compared.
    """

    batch_size: int
    num_steps: int
    gradient_batch: int
    gradient_steps: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything.

    Attributes:
        num_ids: of the tokenizer.
        teacher: of `LlamaConfig`.
        teacher_chapters: that the teacher learns from, at most.
        teacher_epochs: passes over them; the pass that does best on the validation novel is kept.
        teacher_batch: sequences in a step.
        teacher_lr: peak learning rate.
        student: of `TrainStudentConfig`.
        num_chapters: that are cached, and students learn from.
        num_steps: of each student.
        held_out_chapters: that judge, of the test novel.
        seeds: of each row's students.
        gradient_steps: steps whose gradients are compared.
        smollm2: what differs for SmolLM2; None leaves it out.
    """

    num_ids: int
    teacher: Settings
    teacher_chapters: int | None
    teacher_epochs: int
    teacher_batch: int
    teacher_lr: float
    student: Settings
    num_chapters: int
    num_steps: int
    held_out_chapters: int
    seeds: tuple[int, ...]
    gradient_steps: int
    smollm2: SmolLM2Scale | None


FULL = Scale(
    num_ids=2048,
    teacher=TEACHER,
    teacher_chapters=None,
    teacher_epochs=2,
    teacher_batch=8,
    teacher_lr=2e-3,
    student=STUDENT,
    num_chapters=50,
    num_steps=400,
    held_out_chapters=4,
    seeds=(0, 1, 2),
    gradient_steps=32,
    smollm2=SmolLM2Scale(batch_size=2, num_steps=60, gradient_batch=4, gradient_steps=2),
)
# Seconds, to try it; the figures mean nothing.
TINY = Scale(
    num_ids=400,
    teacher=TEACHER
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    teacher_chapters=3,
    teacher_epochs=1,
    teacher_batch=16,
    teacher_lr=2e-3,
    student=STUDENT | {"d_model": 32, "num_layers": 1, "head_dim": 16, "d_state": 8},
    num_chapters=1,
    num_steps=2,
    held_out_chapters=1,
    seeds=(0, 1),
    gradient_steps=2,
    smollm2=None,
)
