"""The baseline without a network: word and word-pair counts, and a logistic regression."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from teacher_cache.stages.data.packaged.reviews import LABEL_NAMES, Row

MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What the fitted baseline says.

    Attributes:
        log_probs: [N, C] of the held-out texts; they serve as logits.
        num_parameters: weights and biases.
        seconds: of fitting, the vocabulary included.
    """

    log_probs: np.ndarray
    num_parameters: int
    seconds: float


def fit(train: Sequence[Row], texts: Sequence[str], settings: Mapping[str, Any]) -> Fitted:
    """Fit it on reviews and ask it about others.

    Args:
        train: reviews with their category.
        texts: [N] to classify.
        settings: of scikit-learn's logistic regression; `C` is the inverse strength of its penalty.
    """
    started = time.perf_counter()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    counts = vectorizer.fit_transform([row["text"] for row in train])
    labels = np.array([LABEL_NAMES.index(row["category"]) for row in train])
    classifier = LogisticRegression(max_iter=MAX_ITERATIONS, **settings).fit(counts, labels)
    seconds = time.perf_counter() - started
    return Fitted(
        log_probs=np.asarray(classifier.predict_log_proba(vectorizer.transform(texts))),
        num_parameters=classifier.coef_.size + classifier.intercept_.size,
        seconds=seconds,
    )
