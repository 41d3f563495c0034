"""Tiny random language models and what `--task lm` caches of them, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.schema import Fields, Ragged, language_model_schema
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import PackedSample, pack
from teacher_cache.stages.join.teacher_folder import write_tokenization
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.tokens.support import Support
from tests.small_caches import make_manifest, make_plans
from tests.tiny_models import tiny_language_model

MAX_LENGTH = 24
WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class TinyTeacher:
    """A random GPT-2 of one layer, in float32.

    Attributes:
        model: whose distributions differ from position to position.
        support: the ids that it uses.
    """

    model: PreTrainedModel
    support: Support

    def said(self, sample: PackedSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Final states [S, D] and logits [S, V] of a sample, one document at a time."""
        states, logits = [], []
        with torch.inference_mode():
            for piece in range(int(sample.segment[-1]) + 1):
                ids = torch.from_numpy(sample.input_ids[sample.segment == piece].astype(np.int64))
                found = self.model(input_ids=ids[None], output_hidden_states=True)
                states.append(found.hidden_states[-1][0])
                logits.append(found.logits[0])
        return torch.cat(states), torch.cat(logits)


def tiny_teacher(num_ids: int, *, unused: Sequence[int] = ()) -> TinyTeacher:
    """A teacher of so many ids, of which some stand for no token."""
    config = GPT2Config(
        vocab_size=num_ids, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=MAX_LENGTH
    )
    model = tiny_language_model(config)
    table: Any = model.get_input_embeddings()
    table.weight.data *= 10  # the head's as well
    return TinyTeacher(model=model, support=Support.of(set(range(num_ids)) - {*unused}, num_ids))


def cached(teacher: TinyTeacher, codec: Codec, sample: PackedSample) -> dict[str, np.ndarray]:
    """A sample as a cache holds it."""
    states, logits = teacher.said(sample)
    following = np.where(sample.loss_mask, np.append(sample.input_ids[1:], 0).astype(np.int64), -1)
    reduced, _ = reduce_positions(
        codec,
        teacher.support,
        logits,
        torch.from_numpy(following),
        states=states,
        drawn_at=room_of(codec).draws(codec, sample.sample_id, len(logits)),
    )
    stored: Any = codec
    return {
        "input_ids": sample.input_ids,
        "segment": sample.segment,
        "loss_mask": sample.loss_mask,
        **stored.encode(reduced),
    }


def write_cache(
    folder: Path,
    codec: Codec,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    teacher: TinyTeacher,
) -> Path:
    """A complete cache of some texts; returns its folder."""
    documents = [
        Document(text=text, source="tiny", split="labeled", position=position)
        for position, text in enumerate(texts)
    ]
    plans = make_plans(len(documents))
    manifest = _manifest(teacher, codec, plans)
    with CacheWriter(folder, manifest, plans, overwrite=False) as to:
        for split, shard_idx in to.begin(_teacher_files(teacher, tokenizer)):
            start, stop = plans[split].documents(shard_idx)
            samples = pack(documents[start:stop], tokenizer, max_length=MAX_LENGTH).samples
            fields = _fields(manifest, [cached(teacher, codec, one) for one in samples], samples)
            to.commit(split, shard_idx, fields, num_truncated=0, environment={})
        to.finish()
    return folder


def _manifest(teacher: TinyTeacher, codec: Codec, plans: dict[str, ShardPlan]) -> Manifest:
    settings: dict[str, Any] = {
        "task": "lm",
        "codec": codec.settings,
        "support": teacher.support.settings,
        "max_length": MAX_LENGTH,
        "teacher": {"dtype": "float32", "weights_sha256": "0a"},
    }
    schema = language_model_schema(codec.fields, is_packed=True)
    return replace(make_manifest(plans, settings), schema=schema, about={"teacher": "tiny"})


def _teacher_files(
    teacher: TinyTeacher, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_tokenization(folder, tokenizer, max_length=MAX_LENGTH, probe=[])
        LanguageModelHead.of(teacher.model).of_support(teacher.support).write(folder)

    return write


def _fields(
    manifest: Manifest, rows: Sequence[dict[str, np.ndarray]], samples: Sequence[PackedSample]
) -> Fields:
    ids = b"".join(sample.sample_id for sample in samples)
    return {"sample_id": np.frombuffer(ids, "V16")} | {
        spec.name: Ragged.from_arrays(
            [row[spec.name] for row in rows], spec.dtype, spec.inner_shape
        )
        for spec in manifest.schema
        if spec.is_ragged
    }
