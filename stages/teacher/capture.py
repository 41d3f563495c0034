"""What of the teacher's output is kept: from samples to the fields of a shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL, POOLED, SAMPLE_ID_BYTES, Ragged
from teacher_cache.stages.data.tokenization import Sample
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.layer_plan import NO_LAYERS, LayerPlan, half
from teacher_cache.stages.teacher.layer_tap import KeptLayers, LayerTap
from teacher_cache.stages.teacher.load import ClassificationTeacher
from teacher_cache.stages.teacher.task import Captured, recorded_environment


def capture(
    teacher: ClassificationTeacher,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    on_batch: OnBatch,
    layers: LayerPlan = NO_LAYERS,
    pooled_width: int | None = None,
) -> Captured:
    """Run the teacher over a shard's samples and keep its class logits, exactly.

    Its pooled states too, in float16, and what is asked for of its layers.

    Args:
        teacher: on its device.
        samples: of one shard.
        batch_tokens: padded tokens in a forward batch.
        on_batch: called with samples and tokens after each batch.
        layers: which maps and states to keep.
        pooled_width: D of the pooled states; None leaves them out.

    Raises:
        UserError: if a single sample does not fit into memory, a logit is not finite, or a state
            has a value that float16 does not hold.
    """
    kept = KeptLayers(layers)
    outputs = run_teacher(
        teacher,
        [sample.input_ids for sample in samples],
        batch_tokens=batch_tokens,
        pooled_width=pooled_width,
        tap=LayerTap(teacher.model, layers, kept),
        on_batch=on_batch,
    )
    logits = outputs.vectors["class_logits"]
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        first = samples[int(np.argmin(finite))].sample_id.hex()
        raise UserError(
            f"the teacher's logits of {int((~finite).sum())} samples are not finite (the first has "
            f"the id {first}): give --dtype float32, or bfloat16 where the device has it"
        )
    ids = b"".join(sample.sample_id for sample in samples)
    labels = [NO_LABEL if sample.label is None else sample.label for sample in samples]
    return Captured(
        fields={
            "sample_id": np.frombuffer(ids, f"V{SAMPLE_ID_BYTES}"),
            "input_ids": Ragged.from_arrays([sample.input_ids for sample in samples], "uint32"),
            "label": np.array(labels, np.int32),
            "class_logits": logits,
            **({} if pooled_width is None else {POOLED: _half(outputs.vectors[POOLED])}),
            **kept.fields(len(samples)),
        },
        num_truncated=sum(sample.was_truncated for sample in samples),
        environment=recorded_environment(
            teacher, batch_tokens=batch_tokens, num_halvings=outputs.num_halvings
        ),
    )


def _half(pooled: np.ndarray) -> np.ndarray:
    return half(pooled, what="pooled states", option="--hidden pooled")
