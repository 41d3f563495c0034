"""How a student does on a novel that nobody learned from, beside its teacher's whole distribution.

What the teacher says there lies in a cache of its own, `dense`, whichever codec taught the student.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import teacher_cache.stages.student  # noqa: F401  (makes the student known to transformers)
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.losses.divergences import kl
from teacher_cache.stages.training.batches import Batch, PackedCollator, PackedSamples
from teacher_cache.stages.training.measures import expected_calibration_error

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means over held-out positions.

    Attributes:
        ce: nats of the real next tokens.
        kl: nats, from the teacher to the student, over the whole support.
        ece: calibration error of the most probable next token.
        accuracy: share of positions at which that is the real one.
    """

    ce: float
    kl: float
    ece: float
    accuracy: float


class HeldOut:
    """A `dense` cache of held-out text.

    Args:
        cache: its folder.
    """

    def __init__(self, cache: Path):
        self._reader = CacheReader(cache)
        self._codec = codec_from(self._reader.manifest.settings["codec"])
        self._samples = PackedSamples(self._reader, np.arange(len(self._reader)), labeled=True)

    @cached_property
    def key(self) -> str:
        """Of what it holds."""
        return self._reader.manifest.fingerprint[:8]

    @property
    def num_samples(self) -> int:
        """Sequences."""
        return len(self._samples)

    def of_run(self, run: Path) -> Figures:
        """What a finished student comes to; kept beside it, so that it is asked once."""
        path = run / f"held-out-{self.key}-{self.num_samples}.json"
        if not path.is_file():
            student: Any = AutoModelForCausalLM.from_pretrained(run)
            write_json_atomically(path, asdict(self.of_student(student.eval())))
        return Figures(**json.loads(path.read_text()))

    @torch.no_grad()
    def of_student(self, student: Any) -> Figures:
        """What a student comes to."""
        sums = _Sums()
        for batch, log_p in self._batches():
            mask = batch["loss_mask"]
            states = student(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                seq_idx=batch["seq_idx"],
                use_cache=False,
                states_only=True,
            ).final_states[mask]
            # All ids of the table: rows outside the support count as the student's own mistake.
            log_q = torch.log_softmax(student.lm_head(states).float(), dim=-1)
            sums.add(log_p, log_q[:, : log_p.shape[1]], batch["next_ids"][mask])
        return sums.figures()

    @torch.no_grad()
    def of_teacher(self) -> Figures:
        """What the teacher itself comes to."""
        sums = _Sums()
        for batch, log_p in self._batches():
            sums.add(log_p, log_p, batch["next_ids"][batch["loss_mask"]])
        return sums.figures()

    def _batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, each with the teacher's log-probs [N, V] at the positions that count."""
        collate = PackedCollator(0, self._codec)
        for start in range(0, len(self._samples), BATCH_SIZE):
            stop = min(start + BATCH_SIZE, len(self._samples))
            batch = collate([self._samples[idx] for idx in range(start, stop)])
            mask = batch["loss_mask"]
            stored = {spec.name: batch[spec.name][mask] for spec in self._codec.fields}
            yield batch, self._codec.decode(stored, 1.0).log_probs


class _Sums:
    def __init__(self) -> None:
        self.ce = self.kl = 0.0
        self.confidence: list[np.ndarray] = []
        self.correct: list[np.ndarray] = []

    def add(self, log_p: Tensor, log_q: Tensor, next_ids: Tensor) -> None:
        """[N, V] of teacher and student, and [N] the real next tokens."""
        self.ce -= float(log_q.gather(1, next_ids[:, None]).double().sum())
        self.kl += float(kl(log_p, log_q).double().sum())
        top, ids = log_q.max(dim=1)
        self.confidence.append(top.double().exp().numpy())
        self.correct.append((ids == next_ids).numpy())

    def figures(self) -> Figures:
        confidence, correct = np.concatenate(self.confidence), np.concatenate(self.correct)
        num = len(correct)
        return Figures(
            ce=self.ce / num,
            kl=self.kl / num,
            ece=expected_calibration_error(confidence, correct),
            accuracy=float(correct.mean()),
        )
