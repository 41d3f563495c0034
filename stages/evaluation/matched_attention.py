"""A finished student's mixing matrices beside its teacher's cached attention maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.evaluation.runs import finished_student, known_task
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.join import TokenizationMismatch, join
from teacher_cache.stages.losses.layers import normalised_rows
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.scans.recorded import RecordedMixer
from teacher_cache.stages.training.batches import Batch, layer_fields, stacked
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.layers import LayerPair
from teacher_cache.stages.training.run_folder import RunRecord


@dataclass(frozen=True, kw_only=True)
class MatchedAttention:
    """One layer of the student and the one of the teacher that it is matched with.

    Attributes:
        pair: the layers, counted from 0.
        teacher: [R, S'] each row's shares; NaN where the student cannot look, and in a row that
            the teacher does not have.
        student: [R, S'] `|M|`, mean over heads or channels, each row divided by its sum; NaN as
            the teacher's, but in no whole row.
    """

    pair: LayerPair
    teacher: np.ndarray
    student: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttentionOfSample:
    """A sample's maps at the student's positions.

    Attributes:
        sources: [S'] which of the sample's positions each is; -1 for an appended token.
        rows: [R] whose rows the student's maps hold.
        teacher_row: the sample's position whose row the teacher's hold, where that is one alone.
        appended_id: token that the student appends, or none.
        layers: of each matched layer.
    """

    sources: np.ndarray
    rows: np.ndarray
    teacher_row: int | None
    appended_id: int | None
    layers: tuple[MatchedAttention, ...]


@dataclass(frozen=True, kw_only=True)
class InsideOfRun:
    """A finished student that reads a cache's samples and shows its inside.

    Attributes:
        model: in evaluation mode, on the CPU.
        pad_id: fills batches; masked.
        layers: what of the cache it is matched with.
    """

    model: PreTrainedModel
    pad_id: int
    layers: CachedLayers

    @classmethod
    def of(cls, run: Path, reader: CacheReader, *, hidden: bool = False) -> InsideOfRun:
        """Load a run's student.

        Args:
            run: matched with its own layers, if it was trained to match any, or else by
                proportion.
            reader: of a cache with maps; of the run's own, or one of the same tokens.
            hidden: whether hidden states are compared too, which the cache holds.

        Raises:
            UserError: if it is no finished run, its student no Mamba or of another task, the
                cache holds other tokens than it reads, or lacks maps or states.
        """
        record = finished_student(run)
        task = known_task([run])
        if reader.manifest.settings["task"] != task.name:
            raise UserError(
                f"{run} is a student of the task {task.name} and {reader.cache} is of "
                f"{reader.manifest.settings['task']}: give a run that this cache trained"
            )
        model = task.evaluation.student.of_run(run, DeviceConfig(device="cpu")).model
        if not isinstance(model.config, MambaStudentConfig):
            raise UserError(f"{run} is no Mamba student, and only these have mixing matrices")
        _require_same_tokens(run, record, reader)
        config = _config(record, model.config, hidden=hidden)
        layers = CachedLayers.of(config.transfer, config.student, reader)
        assert layers is not None, "a weight is not 0"
        return cls(model=model, pad_id=model.config.pad_token_id or 0, layers=layers)

    @property
    def position_map(self) -> PositionMap:
        """Of the student; a language model's changes nothing."""
        return PositionMap.from_dict(self.model.config.position_map or {})

    def batch(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Samples of the cache as a batch that the student reads, with what it is matched with."""
        input_ids, mask = pad_batch([sample["input_ids"] for sample in samples], self.pad_id)
        arrays = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
        if "segment" in samples[0]:
            segments = [sample["segment"].astype(np.int32) for sample in samples]
            arrays["seq_idx"] = stacked(segments, "edge")
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | layer_fields(self.layers, samples)

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """The student's outputs of a batch, `mixers` and `hidden_states` among them."""
        read = ("input_ids", "attention_mask", "seq_idx")
        inputs: Any = {name: batch[name] for name in read if name in batch}
        return self.model(**inputs, output_mixers=True, output_hidden_states=True)

    def matched_attention(self, sample: dict[str, Any]) -> AttentionOfSample:
        """Both sides' maps of one sample.

        Args:
            sample: as the reader gives it.
        """
        batch = self.batch([sample])
        mixers: Sequence[RecordedMixer] = self.outputs(batch).mixers
        transfer = self.layers.transfer(self.position_map)
        sources = self.position_map.sources(batch["attention_mask"].bool())
        found: list[MatchedAttention] = []
        with torch.no_grad():
            for one in transfer.attention_rows(mixers, batch):
                assert one.teacher is not None, "there is a sample"
                student = normalised_rows(one.student, one.allowed)[0].numpy()
                teacher, allowed = one.teacher[0].numpy(), one.allowed[0].numpy()
                has_row = teacher.any(axis=1, keepdims=True)
                found.append(
                    MatchedAttention(
                        pair=one.pair,
                        teacher=np.where(allowed & has_row, teacher, np.nan),
                        student=np.where(allowed, student, np.nan),
                    )
                )
        return AttentionOfSample(
            sources=sources[0].numpy(),
            rows=transfer.rows(sources)[0].numpy(),
            teacher_row=self._pooled_at(len(sample["input_ids"])),
            appended_id=self.position_map.token_id,
            layers=tuple(found),
        )

    def _pooled_at(self, num_tokens: int) -> int | None:
        codec = self.layers.codec
        if codec is None or codec.mode != "cls":
            return None
        return 0 if codec.pooled_at == "first" else num_tokens - 1


def _config(record: RunRecord, student: MambaStudentConfig, *, hidden: bool) -> TrainStudentConfig:
    """What the run would have been trained with to match its layers."""
    settings, names = record.settings, list[str]()
    if settings.get("attention_weight"):
        names.append("attention_layer_map")
        names += ["attention_channels"] if student.arch == "mamba" else []
    if settings.get("hidden_weight") and hidden:
        names.append("hidden_layer_map")
    # The width says how many channels a Mamba-1 has.
    shape = ("arch", "d_model", "expand", "num_layers", "bidirectional", "pooling")
    return TrainStudentConfig.of(
        **{name: getattr(student, name) for name in shape},
        **{name: settings[name] for name in names},
        attention_weight=1.0,
        hidden_weight=float(hidden),
    )


def _require_same_tokens(run: Path, record: RunRecord, reader: CacheReader) -> None:
    """Refuse a run whose student reads the cached ids as other tokens."""
    if record.settings.get("alignment", {}).get("map_sha256"):
        raise UserError(
            f"{run} reads the text with its own tokenizer, and the teacher's maps are of other "
            "positions: give a run that reads the cached tokens"
        )
    if record.settings["cache_fingerprint"] == reader.manifest.fingerprint:
        return  # as its own join found, or was told to let pass
    config = JoinConfig(student_tokenizer=str(run.resolve()))
    try:
        join(reader.cache, config, longest_sample=int(reader.lengths().max()))
    except TokenizationMismatch as mismatch:
        raise UserError(
            f"{run} reads other tokens than {reader.cache} holds "
            f"({', '.join(one.name for one in mismatch.report.differences)}): give a run that was "
            "trained from this cache, or from another one of the same teacher"
        ) from mismatch
