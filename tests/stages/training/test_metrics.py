import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.stages.training.measures import (
    agreement_metrics,
    classification_metrics,
    expected_calibration_error,
)
from tests import reference_losses as reference


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 40),
    num_classes=st.integers(2, 5),
    scale=st.floats(0.1, 20),
)
def test_equals_slow_loops(seed: int, num: int, num_classes: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((num, num_classes))).astype(np.float32)
    labels = rng.integers(num_classes, size=num)
    metrics = classification_metrics(logits, labels)

    samples, truth = logits.astype(np.float64).tolist(), labels.tolist()
    predicted = [sample.index(max(sample)) for sample in samples]
    hits = [p == t for p, t in zip(predicted, truth, strict=True)]
    pairs = list(zip(samples, truth, strict=True))
    nll = [reference.cross_entropy(sample, label, 0.0) for sample, label in pairs]
    assert metrics == pytest.approx(
        {
            "accuracy": sum(hits) / num,
            "f1": reference.macro_f1(predicted, truth),
            "ece": reference.expected_calibration_error(samples, truth),
            "nll": sum(nll) / num,
        },
        rel=1e-9,
        abs=1e-9,
    )

    teacher = rng.standard_normal((num, num_classes))
    chosen = teacher.argmax(axis=1).tolist()
    kls = [reference.kl(t, s, 1.0) for t, s in zip(teacher.tolist(), samples, strict=True)]
    assert agreement_metrics(logits, teacher) == pytest.approx(
        {
            "agreement": sum(p == c for p, c in zip(predicted, chosen, strict=True)) / num,
            "kl": sum(kls) / num,
        },
        rel=1e-9,
        abs=1e-9,
    )


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    # 0.6 is 9/15 exactly as np.linspace has it: one bin with one right of two, not two bins.
    edge = np.linspace(0, 1, 16)[9]
    confidence, correct = np.array([edge, edge - 0.01]), np.array([True, False])
    expected = abs(0.5 - confidence.mean())
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_certain_and_right_is_perfect() -> None:
    metrics = classification_metrics([[99.0, 0.0], [0.0, 99.0]], [0, 1])
    assert metrics == pytest.approx({"accuracy": 1, "f1": 1, "ece": 0, "nll": 0})


def test_an_excluded_class_adds_nothing_to_the_kl() -> None:
    metrics = agreement_metrics([[1.0, 2.0, 3.0]], [[2.0, 1.0, -np.inf]])
    expected = reference.kl([2.0, 1.0, -np.inf], [1.0, 2.0, 3.0], 1.0)
    assert metrics["kl"] == pytest.approx(expected)


def test_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="N at least 1"):
        classification_metrics(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match="labels of shape"):
        classification_metrics(np.zeros((3, 2)), [0, 1])
    with pytest.raises(ValueError, match=r"labels 0\.\.2 for 2 classes"):
        classification_metrics(np.zeros((2, 2)), [0, 2])
    with pytest.raises(ValueError, match="against teacher logits"):
        agreement_metrics(np.zeros((2, 2)), np.zeros((2, 3)))
