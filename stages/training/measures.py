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


def multi_label_metrics(
    logits: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5
) -> dict[str, float]:
    """F1 and exact matches of labels of which a sample has any number.

    Args:
        logits: [N, C]; a label is given where its sigmoid is above the threshold.
        labels: [N, C], 1 where a sample has a label, 0 where not.
        threshold: 0 to 1.

    Returns:
        `micro_f1`, `2 TP / (2 TP + FP + FN)` of all labels of all samples; `macro_f1`, its mean
        over the labels that occur among labels or answers; both 1 where nothing is there and
        nothing was given; and `exact_match`, the share of samples whose labels are all right.

    Raises:
        ValueError: if N is 0 or the shapes disagree.
    """
    wide, truth = np.asarray(logits, np.float64), np.asarray(labels) == 1
    if wide.shape != truth.shape or wide.ndim != 2 or not len(wide):
        raise ValueError(f"logits {wide.shape} against labels {truth.shape}: expected [N, C]")
    with np.errstate(divide="ignore"):
        given = wide > np.log(threshold) - np.log1p(-threshold)
    right = (given & truth).sum(axis=0)
    num = given.sum(axis=0) + truth.sum(axis=0)  # 2 TP + FP + FN
    occurs = num > 0
    return {
        "micro_f1": float(2 * right.sum() / num.sum()) if num.sum() else 1.0,
        "macro_f1": float((2 * right[occurs] / num[occurs]).mean()) if occurs.any() else 1.0,
        "exact_match": float((given == truth).all(axis=1).mean()),
    }


def multi_label_likeness(student_logits: ArrayLike, teacher_logits: ArrayLike) -> dict[str, float]:
    """How close the student came to the teacher in each label, at temperature 1.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C].

    Returns:
        Means over samples and labels: `agreement`, the share of which both say the same at 1/2,
        and `kl`, the binary forward KL from teacher to student in nats.

    Raises:
        ValueError: if N is 0 or the shapes disagree.
    """
    s, t = np.asarray(student_logits, np.float64), np.asarray(teacher_logits, np.float64)
    if s.shape != t.shape or s.ndim != 2 or not len(s):
        raise ValueError(f"student logits {s.shape} against teacher logits {t.shape}")
    kl = np.zeros_like(s)
    for sign in (1.0, -1.0):
        log_p, log_q = -np.logaddexp(0.0, -sign * t), -np.logaddexp(0.0, -sign * s)
        kl += np.exp(log_p) * (log_p - log_q)
    return {"agreement": float(((s > 0) == (t > 0)).mean()), "kl": float(kl.mean())}


def regression_metrics(outputs: ArrayLike, numbers: ArrayLike) -> dict[str, float]:
    """How near numbers are to others.

    Args:
        outputs: [N, 1].
        numbers: [N].

    Returns:
        `mse`, the mean squared difference; `pearson`, the correlation; and `spearman`, that of the
        ranks, equal numbers sharing the mean of theirs. A correlation is NaN where either side is
        all one number.

    Raises:
        ValueError: if N is 0 or the shapes disagree.
    """
    found, wanted = np.asarray(outputs, np.float64), np.asarray(numbers, np.float64)
    if found.shape != (len(wanted), 1) or wanted.ndim != 1 or not len(wanted):
        raise ValueError(f"outputs {found.shape} against numbers {wanted.shape}: [N, 1] and [N]")
    found = found[:, 0]
    return {
        "mse": float(np.square(found - wanted).mean()),
        "pearson": _correlation(found, wanted),
        "spearman": _correlation(_ranks(found), _ranks(wanted)),
    }


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if not (np.ptp(one) and np.ptp(other)):
        return float("nan")
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / np.sqrt(np.square(one).sum() * np.square(other).sum()))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


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
MICRO_F1 = Measure(name="micro_f1", higher_is_better=True)
MSE = Measure(name="mse", higher_is_better=False)
MSE_TO_TEACHER = Measure(name="mse_to_teacher", higher_is_better=False)
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
