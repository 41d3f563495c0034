"""What a classifier says of labelled documents against their labels, as a cache holds both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.schema import ABSENT_LABEL, CLASS_LABEL, Fields

ON_LABELS = "teacher_on_labels"  # of a manifest's `about`
NUM_SIGMAS = 4.0  # beyond which a difference of two shares is no accident


@dataclass
class Confusion:
    """Counts of documents by label and by the class that the teacher gives them.

    Attributes:
        num_classes: C.
        counts: int64 [C, C], labels by row.
    """

    num_classes: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def __post_init__(self) -> None:
        if not self.counts.size:
            self.counts = np.zeros((self.num_classes, self.num_classes), np.int64)

    def add(self, fields: Fields | Mapping[str, Any]) -> None:
        """Count samples with a label, of `label` [N] and `class_logits` [N, C]."""
        labels, logits = np.asarray(fields["label"]), np.asarray(fields["class_logits"])
        is_labeled = labels != ABSENT_LABEL
        if is_labeled.any():
            chosen = (labels[is_labeled], logits[is_labeled].argmax(axis=1))
            np.add.at(self.counts, chosen, 1)

    @classmethod
    def recorded(cls, manifest: Manifest) -> Confusion | None:
        """As stage one wrote it; None where it did not, or no document has a label."""
        found = manifest.about.get(ON_LABELS)
        if not found or "confusion" not in found:
            return None
        confusion = cls(len(manifest.about["id2label"]))
        for label, given, num in found["confusion"]:
            confusion.counts[label, given] = num
        return confusion

    @classmethod
    def counted(cls, manifest: Manifest, batches: Iterable[Fields]) -> Confusion | None:
        """Of a cache that an older release made; None where no document has a label.

        Args:
            manifest: of the cache.
            batches: of its labelled split.
        """
        if CLASS_LABEL not in manifest.schema:
            return None
        confusion = cls(len(manifest.about["id2label"]))
        for fields in batches:
            confusion.add(fields)
        return confusion if confusion.num else None

    def to_json(self) -> dict[str, Any]:
        """For the manifest: only pairs that occur."""
        pairs = [[int(i), int(j), int(self.counts[i, j])] for i, j in np.argwhere(self.counts)]
        return {"num_labeled": self.num, "accuracy": self.accuracy, "confusion": pairs}

    @property
    def num(self) -> int:
        """Documents with a label."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of the documents whose label is the teacher's class."""
        return float(self.counts.trace() / max(1, self.num))

    @property
    def chance(self) -> float:
        """The accuracy of classes as frequent as the teacher's, without regard to the document."""
        labels, given = self.counts.sum(axis=1), self.counts.sum(axis=0)
        return float((labels * given).sum() / max(1, self.num) ** 2)

    @property
    def is_under_chance(self) -> bool:
        """Whether it is worse than that by more than accident."""
        sigma = math.sqrt(self.chance * (1 - self.chance) / max(1, self.num))
        return self.accuracy < self.chance - NUM_SIGMAS * sigma

    def fitting(self) -> dict[int, int] | None:
        """The class of each label by which the teacher would be right far more often.

        A label's is the one that the teacher gives its documents most often.

        Returns:
            By label, labels of no document left out; None if two labels would share a class, half
            of the documents would still be wrong, or the classes as they are do as well but for
            accident.
        """
        labels = np.flatnonzero(self.counts.sum(axis=1))
        fits = {int(label): int(self.counts[label].argmax()) for label in labels}
        moved = [label for label, given in fits.items() if label != given]
        won = sum(int(self.counts[label, fits[label]]) for label in moved)
        lost = sum(int(self.counts[label, label]) for label in moved)
        right = self.counts.trace() + won - lost
        # A document counts where one of the two readings alone is right.
        is_certain = won - lost > NUM_SIGMAS * math.sqrt(won + lost) and 2 * right >= self.num
        return fits if is_certain and len(set(fits.values())) == len(fits) else None
