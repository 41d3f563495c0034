"""The recipe: what is trained, as plain data. This is the one place to change settings in.

A row's students differ from `STUDENT` by the row's `overrides` and by the trial that tuning chose;
both are fields of `TrainStudentConfig`, so a row is what `pipe train-student` would be given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Block = Literal["main", "scarce", "long"]
Settings = dict[str, Any]

BLOCKS: dict[Block, str] = {
    "main": "all labels",
    "scarce": "few labels",
    "long": "all labels, trained long",
}
# What a run takes that is not told otherwise.
USUAL_BLOCKS: tuple[Block, ...] = ("main", "scarce")

MAX_LENGTH = 128  # tokens, of teacher and students

# Of `FinetuneTeacherConfig`: as many epochs as 10,260 or 1,000 labels take to be learned.
TEACHERS: dict[Block, Settings] = {
    "main": {"epochs": 2, "eval_fraction": 0},
    "scarce": {"epochs": 8, "eval_fraction": 0},
}
TEACHERS["long"] = TEACHERS["main"]

# Of `TrainStudentConfig`: architecture and optimizer steps of every student.
STUDENT: Settings = {
    "d_model": 128,
    "num_layers": 2,
    "expand": 2,
    "d_state": 16,
    "head_dim": 64,
    "batch_size": 64,
    "checkpoint_steps": 600,
    "log_steps": 50,
    "eval_fraction": 0,
}
NUM_STEPS: dict[Block, int] = {"main": 1200, "scarce": 800, "long": 9600}
# Of `CacheTeacherConfig`: what is kept beside the logits.
CAPTURED: Settings = {"hidden": "pooled"}
# Perturbed copies of each document in the caches; the scarce block has as many documents as the
# main one, and fewer steps to learn from them.
NUM_VIEWS: dict[Block, int] = {"main": 6, "scarce": 2, "long": 6}
# Of each trial, whatever the row: enough to tell the rates apart.
TUNING_STEPS, TUNING_VIEWS = 500, 2

# Rows that train longer or shorter than the others of their block say so in their title.
LONG = 4
SHORT = 0.4  # of the main block: three passes over its labels

# What tuning chooses from; every row has as many trials.
LEARNING_RATES: tuple[Settings, ...] = ({"lr": 1e-3}, {"lr": 2e-3})
REGULARISATIONS: tuple[Settings, ...] = ({"C": 8.0}, {"C": 32.0})

LABELS_ONLY: Settings = {"alpha": 0.0}
# Hard labels are learned by heart after a few passes, so with as many steps as the others these
# students keep a tenth of the labels apart, and the checkpoint that does best on it; the last
# step's would make too weak a baseline.
STOPPED_EARLY: Settings = {"eval_fraction": 0.1, "checkpoint_steps": 80, "early_stopping": 6}
FROM_TEACHER: Settings = {"embeddings": "teacher", "embedding_lr_scale": 0.1}
LOGITS: Settings = {"alpha": 0.9, "temperature": 2.0} | FROM_TEACHER
# Batches in proportion to the texts: a thousand plots, or six views of ten thousand reviews.
PLOTS: Settings = LOGITS | {
    "unlabeled_alpha": 1.0,
    "unlabeled_from": "corpus",
    "unlabeled_ratio": 0.1,
}
# Without the plots, which the validation movies found to help nothing.
VIEWS: Settings = LOGITS | {
    "unlabeled_alpha": 1.0,
    "unlabeled_from": "labeled-views",
    "unlabeled_ratio": 6.0,
}
STATES: Settings = {"embeddings": "teacher-states"}
ALL: Settings = VIEWS | STATES | {"pooled_weight": 1.0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: what `--rows` calls it; unique within its block.
        title: what a table calls it.
        block: whose corpora it learns from and is tested on.
        kind: what is fitted.
        overrides: of a student's settings.
        trials: what tuning chooses from, overrides too (of TF-IDF's logistic regression its `C`).
        tuned_as: key of the row whose choice it takes instead of one of its own.
        teacher: whose logits a student is taught with: the block's own, or one fine-tuned on all
            labels.
        times_steps: optimizer steps, as a multiple of those of its block's other students.
        is_baseline: whether the best of its block's such rows is what the others have to beat.
    """

    name: str
    title: str
    block: Block
    kind: Literal["majority", "tfidf", "teacher", "student"] = "student"
    overrides: Settings = field(default_factory=dict)
    trials: tuple[Settings, ...] = LEARNING_RATES
    tuned_as: str | None = None
    teacher: Literal["own", "full"] = "own"
    times_steps: float = 1
    is_baseline: bool = False

    @property
    def key(self) -> str:
        """Its name among the rows of all blocks."""
        return f"{self.block}/{self.name}"


LABELS_ROWS: tuple[Row, ...] = (
    Row(
        name="labels",
        title="student, labels only",
        block="main",
        overrides=LABELS_ONLY | STOPPED_EARLY,
        is_baseline=True,
    ),
    Row(
        name="labels-embeddings",
        title="student, labels only, teacher's embeddings",
        block="main",
        overrides=LABELS_ONLY | FROM_TEACHER | STOPPED_EARLY,
        is_baseline=True,
    ),
)
SHORT_LABELS_ROWS: tuple[Row, ...] = tuple(
    replace(
        row,
        name=f"{row.name}-short",
        title=f"{row.title}, three passes",
        overrides={k: v for k, v in row.overrides.items() if k not in STOPPED_EARLY},
        tuned_as=row.key,
        times_steps=SHORT,
    )
    for row in LABELS_ROWS
)
VIEWS_ROW = Row(name="views", title="+ logits + views", block="main", overrides=VIEWS)
LOGITS_ROW = Row(name="logits", title="+ logits", block="main", overrides=LOGITS)
ALL_ROW = Row(
    name="all",
    title="+ logits + views + pooled state + token states",
    block="main",
    overrides=ALL,
)


def _scarce(row: Row) -> Row:
    """The same row in the label-scarce block, with the trial that was chosen in the main one.

    Here the unlabelled texts are reviews too, most of all there are, so all of them take part.
    """
    part = {"unlabeled_from": "all"} if row.overrides.get("unlabeled_alpha") else {}
    return replace(row, block="scarce", overrides=row.overrides | part, tuned_as=row.key)


def _long(row: Row) -> Row:
    """The same row in the block that trains long, with the trial chosen in the main one."""
    return replace(row, block="long", tuned_as=row.key)


TEACHER_ROW = Row(name="teacher", title="teacher (MiniLM)", block="main", kind="teacher", trials=())

ROWS: tuple[Row, ...] = (
    Row(name="majority", title="majority", block="main", kind="majority", trials=()),
    Row(
        name="tfidf",
        title="TF-IDF + logistic regression",
        block="main",
        kind="tfidf",
        trials=REGULARISATIONS,
    ),
    TEACHER_ROW,
    *LABELS_ROWS,
    *SHORT_LABELS_ROWS,
    LOGITS_ROW,
    Row(
        name="confidence",
        title="+ logits + confidence weighting",
        block="main",
        overrides=LOGITS | {"conf_power": 1.0},
    ),
    Row(
        name="pooled",
        title="+ logits + pooled state",
        block="main",
        overrides=LOGITS | {"pooled_weight": 1.0},
    ),
    Row(
        name="token-states",
        title="+ logits + token states",
        block="main",
        overrides=LOGITS | STATES,
    ),
    Row(name="unlabelled", title="+ logits + unlabelled text", block="main", overrides=PLOTS),
    VIEWS_ROW,
    ALL_ROW,
    replace(
        ALL_ROW,
        name="long",
        title=f"the same, {LONG} times the steps",
        tuned_as=ALL_ROW.key,
        times_steps=LONG,
    ),
    Row(
        name="tfidf",
        title="TF-IDF + logistic regression",
        block="scarce",
        kind="tfidf",
        trials=REGULARISATIONS,
        tuned_as="main/tfidf",
    ),
    replace(TEACHER_ROW, block="scarce"),
    *(_scarce(row) for row in (*LABELS_ROWS, LOGITS_ROW, ALL_ROW)),
    replace(
        _scarce(ALL_ROW),
        name="all-by-full",
        title="the same, taught by the teacher of all labels",
        teacher="full",
    ),
    Row(
        name="teacher-of-all-labels",
        title="teacher (MiniLM) of all labels",
        block="scarce",
        kind="teacher",
        trials=(),
        teacher="full",
    ),
    replace(TEACHER_ROW, block="long"),
    *(_long(row) for row in (LABELS_ROWS[-1], VIEWS_ROW)),
    replace(
        _long(SHORT_LABELS_ROWS[-1]),
        tuned_as=LABELS_ROWS[-1].key,
        times_steps=SHORT * NUM_STEPS["main"] / NUM_STEPS["long"],
    ),
)
