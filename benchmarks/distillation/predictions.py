"""What a model says of the held-out reviews, kept beside the model so that it is asked once."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig, Document, load_corpus
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.evaluation.models import (
    Classifier,
)
from teacher_cache.stages.teacher.config import TeacherConfig

BATCH_TOKENS = EvaluateOptions().batch_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Reviews that judge.

    Attributes:
        documents: in the corpus's order.
        key: of what they are, wherever they lie.
        labels: [N] class ids.
        movie_idx: [N] the movie of each, 0 to M - 1.
    """

    documents: list[Document]
    key: str
    labels: np.ndarray
    movie_idx: np.ndarray

    @classmethod
    def load(cls, config: CorpusConfig, movies: list[str]) -> HeldOut:
        """Read them.

        Args:
            config: of a labelled corpus.
            movies: the movie of each line of its file.
        """
        corpus = load_corpus(config)
        documents = corpus.documents(0, len(corpus))
        names = np.array([movies[document.position] for document in documents])
        return cls(
            documents=documents,
            key=fingerprint(corpus.identity)[:8],
            labels=np.array([document.label for document in documents], np.int64),
            movie_idx=np.unique(names, return_inverse=True)[1].reshape(-1),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """A model's view of the held-out reviews.

    Attributes:
        logits: [N, C] float32, in the reviews' order.
        num_parameters: embeddings included.
        num_outside: parameters outside the token embedding.
    """

    logits: np.ndarray
    num_parameters: int
    num_outside: int


def of_student(run: Path, held_out: HeldOut) -> Prediction:
    """What a finished student says."""
    return _kept(run, held_out, lambda: Classifier.of_run(run, DeviceConfig()))


def of_teacher(teacher: Path, max_length: int, held_out: HeldOut) -> Prediction:
    """What a teacher says of reviews cut at `max_length` tokens."""
    return _kept(teacher, held_out, lambda: load_teacher(teacher, max_length))


def load_teacher(teacher: Path, max_length: int) -> Classifier:
    """A fine-tuned teacher, ready to classify."""
    return Classifier.of_teacher(TeacherConfig(teacher=str(teacher), max_length=max_length))


def _kept(folder: Path, held_out: HeldOut, load: Callable[[], Classifier]) -> Prediction:
    path = folder / f"logits-{held_out.key}.npz"
    if path.is_file():
        with np.load(path) as found:
            return Prediction(
                logits=found["logits"],
                num_parameters=int(found["num_parameters"]),
                num_outside=int(found["num_outside"]),
            )
    classifier = load()
    samples = classifier.tokenize(held_out.documents)
    assert len(samples) == len(held_out.documents), "a review is never empty"
    prediction = Prediction(
        logits=classifier.logits(samples, batch_tokens=BATCH_TOKENS),
        num_parameters=classifier.num_parameters,
        num_outside=classifier.num_parameters - _embedding_size(classifier),
    )
    stream = io.BytesIO()
    np.savez(
        stream,
        logits=prediction.logits,
        num_parameters=prediction.num_parameters,
        num_outside=prediction.num_outside,
    )
    write_bytes_atomically(path, stream.getvalue())
    return prediction


def _embedding_size(classifier: Classifier) -> int:
    embedding = classifier.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.numel()
