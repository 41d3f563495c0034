"""How good, how well calibrated and how close to its teacher a classifier is. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NUM_ECE_BINS = 15


def classification_metrics(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, macro F1, calibration error and negative log-likelihood on labelled samples.

    Args:
        logits: [N, C].
        labels: [N] integers in 0..C-1.

    Returns:
        `accuracy`; `f1`, the mean over the classes that occur among labels or predictions;
        `ece`, see `expected_calibration_error`; `nll`, mean nats.

    Raises:
        ValueError: if N is 0, the shapes disagree or a label is outside 0..C-1.
    """
    log_probs = log_softmax(logits)
    truth = np.asarray(labels)
    num, num_classes = log_probs.shape
    if truth.shape != (num,):
        raise ValueError(f"{num} samples with logits against labels of shape {truth.shape}")
    if truth.min() < 0 or truth.max() >= num_classes:
        raise ValueError(f"labels {truth.min()}..{truth.max()} for {num_classes} classes")
    predicted = log_probs.argmax(axis=1)
    return {
        "accuracy": float((truth == predicted).mean()),
        "f1": _macro_f1(truth, predicted),
        "ece": expected_calibration_error(np.exp(log_probs.max(axis=1)), predicted == truth),
        "nll": float(-log_probs[np.arange(num), truth].mean()),
    }


def _macro_f1(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> float:
    """Mean over the classes that occur of `2 TP / (2 TP + FP + FN)`."""
    num_true, num_predicted, num_right = (
        np.bincount(classes, minlength=1 + max(truth.max(), predicted.max()))
        for classes in (truth, predicted, truth[truth == predicted])
    )
    occurs = num_true + num_predicted > 0
    return float((2 * num_right / (num_true + num_predicted).clip(min=1))[occurs].mean())


def expected_calibration_error(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_]
) -> float:
    """How far confidence is from accuracy, averaged over 15 equally wide bins by their samples.

    Bins are half-open, (i/15, (i+1)/15], as in Guo et al. 2017, section 2 (arXiv:1706.04599).

    Args:
        confidence: [N] probability of the predicted class, in (0, 1].
        correct: [N] bool.

    Returns:
        In 0..1.
    """
    upper_edges = np.linspace(0, 1, NUM_ECE_BINS + 1)[1:]
    # `left` puts a value equal to an upper edge into that bin; rounding above 1 into the last.
    bin_idx = np.searchsorted(upper_edges[:-1], confidence, side="left")
    gaps = np.bincount(bin_idx, weights=correct.astype(np.float64) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def agreement_metrics(student_logits: ArrayLike, teacher_logits: ArrayLike) -> dict[str, float]:
    """How close the student came to the teacher, at temperature 1.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C].

    Returns:
        `agreement`, the share of samples with the same most probable class, and `kl`, the mean
        forward KL from teacher to student in nats.

    Raises:
        ValueError: if N is 0 or the shapes disagree.
    """
    log_q, log_p = log_softmax(student_logits), log_softmax(teacher_logits)
    if log_q.shape != log_p.shape:
        raise ValueError(f"student logits {log_q.shape} against teacher logits {log_p.shape}")
    possible = log_p != -np.inf  # a NaN stays one
    terms = np.exp(log_p[possible]) * (log_p[possible] - log_q[possible])
    return {
        "agreement": float((log_q.argmax(axis=1) == log_p.argmax(axis=1)).mean()),
        "kl": float(terms.sum() / len(log_p)),
    }


def kl_of_each(student_logits: ArrayLike, teacher_logits: ArrayLike) -> NDArray[np.float64]:
    """Forward KL from teacher to student of each sample at temperature 1, [N] nats.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C].
    """
    log_q, log_p = log_softmax(student_logits), log_softmax(teacher_logits)
    possible = log_p != -np.inf
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * np.where(possible, log_p - log_q, 0.0)
    return terms.sum(axis=1)


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """[N, C] log-probs in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    if wide.ndim != 2 or wide.shape[0] == 0:
        raise ValueError(f"logits must be [N, C] with N at least 1, not {wide.shape}")
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What tells the better of two evaluations.

    Attributes:
        name: of the held-out metric, without `eval_`.
        higher_is_better: whether more of it is better.
    """

    name: str
    higher_is_better: bool


ACCURACY = Measure(name="accuracy", higher_is_better=True)
AGREEMENT = Measure(name="agreement", higher_is_better=True)
OBJECTIVE = Measure(name="loss", higher_is_better=False)


class EarlyStopping(TrainerCallback):
    """Stop after so many evaluations without a better one.

    Counted from the log, which every checkpoint holds, so that a resumed training stops where an
    uninterrupted one does; transformers' own callback begins to count anew.

    Args:
        patience: evaluations.
        measure: of how good one is.
    """

    def __init__(self, patience: int, measure: Measure = ACCURACY):
        self._patience = patience
        self._name = f"eval_{measure.name}"
        self._sign = 1 if measure.higher_is_better else -1

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop if this evaluation was the last one to wait for."""
        control.should_training_stop |= self._is_spent(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop again where a killed run had stopped, whatever this step would bring."""
        if self._is_spent(state):
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    def _is_spent(self, state: TrainerState) -> bool:
        log = state.log_history
        found = [self._sign * one[self._name] for one in log if self._name in one]
        return bool(found) and len(found) - 1 - int(np.argmax(found)) >= self._patience
