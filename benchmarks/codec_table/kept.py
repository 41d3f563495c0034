"""What each codec keeps of some text: its size, what it loses, and where its gradient points.

The teacher reads each step's sequences once; every codec then reduces, encodes and decodes the very
same logits, as stage one and stage two do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import teacher_cache.stages.student  # noqa: F401  (makes the student known to transformers)
from benchmarks.codec_table.gradients import Angles, GradientSums, step_gradient
from benchmarks.codec_table.renormalised import without_tail
from benchmarks.codec_table.rows import BEST, DISTILLED, MAX_LENGTH, NONE, ON_CPU, TEMPERATURE, Row
from benchmarks.codec_table.teacher import novels
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.topk import TAIL_M, TAIL_R
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.schema import bytes_per_position
from teacher_cache.stages.codecs.capture import draws_of, reduce_positions
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.measure import kl_to_decoded
from teacher_cache.stages.codecs.named import codec_of, room_of
from teacher_cache.stages.data.corpus import Document, load_corpus
from teacher_cache.stages.data.packing import PackedSample, next_ids, pack
from teacher_cache.stages.models.causal import final_states, head_logits
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.language_modeling import bytes_per_token
from teacher_cache.stages.teacher.load import LanguageModelTeacher, load_language_model
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.training.batches import PackedCollator


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Of one row, means over the positions that count.

    Attributes:
        bytes_per_token: stored, the token itself, its segment and its mask included.
        num_ids: stored, of a position.
        kl: nats, from the teacher to what is decoded: over the stored ids and the ghost; infinite
            where mass is given up that the teacher has.
        mass_outside: the teacher's, of what is not stored id by id.
        angles: of its gradient to the dense one.
    """

    bytes_per_token: float
    num_ids: float
    kl: float
    mass_outside: float
    angles: Angles

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Kept:
        """The one of which `asdict` made this."""
        return cls(**{**found, "angles": Angles(**found["angles"])})


@dataclass(frozen=True, kw_only=True)
class Read:
    """One step's sequences, as the teacher sees them.

    Attributes:
        samples: the sequences.
        states: [N, D], of all their positions, end to end.
        logits: [N, R].
        log_probs: [N, V] float64 nats, of the support.
        unmatched: [N] of `Support.log_probs`.
        counts: [N] bool, the positions that count.
    """

    samples: Sequence[PackedSample]
    states: Tensor
    logits: Tensor
    log_probs: Tensor
    unmatched: Tensor
    counts: np.ndarray


@dataclass
class _Sums:
    """Of one row, over the steps."""

    gradients: GradientSums
    num: int = 0
    kl: float = 0.0
    mass_outside: float = 0.0
    num_ids: float = 0.0


def compared(folder: Path, student: Path, *, batch_size: int, steps: int) -> dict[str, Kept]:
    """What each row keeps of a teacher's view of the validation novel.

    Kept beside the student, by whose parameters the gradients are taken, so that it is measured
    once.

    Args:
        folder: of the teacher.
        student: its run.
        batch_size: sequences of a step.
        steps: that are compared.
    """
    path = student / f"kept-{batch_size}-{steps}.json"
    if not path.is_file():
        model: Any = AutoModelForCausalLM.from_pretrained(student)
        loaded = load_language_model(TeacherConfig(teacher=str(folder), **ON_CPU))
        corpus = load_corpus(novels("validation", None))
        comparison = Comparison(loaded, model, (NONE, *DISTILLED))
        documents = corpus.documents(0, len(corpus))
        found = comparison.over(documents, batch_size=batch_size, steps=steps)
        # An infinite KL is written as Python's json reads it.
        text = json.dumps({name: asdict(one) for name, one in found.items()})
        write_bytes_atomically(path, text.encode())
    return {name: Kept.from_json(one) for name, one in json.loads(path.read_text()).items()}


class Comparison:
    """Rows side by side on a teacher's view of some text.

    Args:
        teacher: on the CPU.
        student: by whose parameters the gradients are taken.
        rows: with the dense one among them.
    """

    def __init__(
        self, teacher: LanguageModelTeacher, student: MambaStudentForCausalLM, rows: Sequence[Row]
    ):
        self._teacher = teacher
        self._student = student.eval()
        self._rows = rows
        self._support = Support.of_tokenizer(teacher.tokenizer, teacher.num_logits)
        head = LanguageModelHead.of(teacher.model)
        self._codecs = {row.name: self._codec(row, head) for row in rows}

    def over(
        self, documents: Sequence[Document], *, batch_size: int, steps: int
    ) -> dict[str, Kept]:
        """What each row keeps, by its name.

        Args:
            documents: with as many sequences as the steps take, of which the first are read.
            batch_size: sequences of a step.
            steps: how many.
        """
        samples = pack(documents, self._teacher.tokenizer, max_length=MAX_LENGTH).samples
        sums = {row.name: _Sums(gradients=GradientSums()) for row in self._rows}
        positions: list[int] = []
        for start in range(0, steps * batch_size, batch_size):
            read = self._read(samples[start : start + batch_size])
            positions.append(int(read.counts.sum()))
            gradients = {row.name: self._add(row, read, sums[row.name]) for row in self._rows}
            for name, gradient in gradients.items():
                sums[name].gradients.add(gradient, gradients[BEST])
        dense = sums[BEST].gradients.total
        assert dense is not None
        dense = dense.clone()
        return {row.name: self._kept(row, sums[row.name], dense, positions) for row in self._rows}

    def _codec(self, row: Row, head: LanguageModelHead) -> Codec:
        config = CodecConfig(**dict(row.codec))
        width = head.weight.shape[1]
        codec = codec_of(config, support_size=self._support.size, width=width)
        return room_of(codec).with_head(codec, head.of_support(self._support))

    def _read(self, samples: Sequence[PackedSample]) -> Read:
        with torch.inference_mode():
            states = final_states(
                self._teacher.model,
                [one.input_ids for one in samples],
                [[piece.num_tokens for piece in one.pieces] for one in samples],
                batching=self._teacher.batching,
            )
            logits = head_logits(self._teacher.model, states)
            log_probs, unmatched = self._support.log_probs(logits, TEMPERATURE)
        return Read(
            samples=samples,
            states=states,
            logits=logits,
            log_probs=log_probs,
            unmatched=unmatched,
            counts=np.concatenate([one.loss_mask for one in samples]),
        )

    def _add(self, row: Row, read: Read, sums: _Sums) -> Tensor:
        """Add a step's figures; returns the row's gradient of it."""
        codec = self._codecs[row.name]
        coded = self._coded(row, codec, read)
        batch = PackedCollator(0, codec)(coded)
        mask = batch["loss_mask"]
        with torch.inference_mode():
            stored = {spec.name: batch[spec.name][mask] for spec in codec.fields}
            decoded = codec.decode(stored, TEMPERATURE)
            counts = torch.from_numpy(read.counts)
            kl, outside = kl_to_decoded(read.log_probs[counts], read.unmatched[counts], decoded)
        sums.num += len(kl)
        sums.kl += float(kl.sum())
        sums.mass_outside += float(outside.sum())
        ids = decoded.ids
        size = float(codec.support_size * len(kl)) if ids is None else float((ids >= 0).sum())
        sums.num_ids += size
        return step_gradient(self._student, batch, codec, alpha=row.alpha, support=self._mask())

    def _coded(self, row: Row, codec: Codec, read: Read) -> list[dict[str, np.ndarray]]:
        """The step's samples as a cache holds them."""
        # Exact ids of next tokens only reach a field that no row of this table reads.
        nothing_follows = torch.full((len(read.logits),), -1)
        reduced, _ = reduce_positions(
            codec,
            self._support,
            read.logits,
            nothing_follows,
            states=read.states,
            drawn_at=draws_of(codec, read.samples),
        )
        coded: list[dict[str, np.ndarray]] = []
        start = 0
        for sample in read.samples:
            stop = start + len(sample.input_ids)
            one: Any = codec
            fields = {
                "input_ids": sample.input_ids,
                "segment": sample.segment,
                "loss_mask": sample.loss_mask,
                **one.encode(reduced[start:stop]),
            }
            fields["next_ids"] = next_ids(fields["input_ids"], fields["segment"])
            coded.append(without_tail(fields) if row.is_renormalised else fields)
            start = stop
        return coded

    def _mask(self) -> Tensor | None:
        """[V] bool of the student's table; None where all of it counts."""
        if not self._support.unused:
            return None
        mask = torch.ones(self._support.size, dtype=torch.bool)
        mask[list(self._support.unused)] = False
        return mask

    def _kept(self, row: Row, sums: _Sums, dense: Tensor, positions: Sequence[int]) -> Kept:
        codec, num_ids = self._codecs[row.name], sums.num_ids / sums.num
        size = bytes_per_token(codec, num_ids)
        if row.is_renormalised:
            tails = tuple(spec for spec in codec.fields if spec.name in (TAIL_R, TAIL_M))
            size -= bytes_per_position(tails)
        return Kept(
            bytes_per_token=size,
            num_ids=num_ids,
            kl=sums.kl / sums.num,
            mass_outside=sums.mass_outside / sums.num,
            angles=sums.gradients.against(dense, positions),
        )
