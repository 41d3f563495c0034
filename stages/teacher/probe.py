"""What a codec costs and loses, measured on a few positions before anything is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.models.head import LanguageModelHead, check_head
from teacher_cache.stages.teacher.draws import draws_of
from teacher_cache.stages.teacher.language_model import (
    LanguageModelTeacher,
    final_states,
    head_logits,
)
from teacher_cache.stages.teacher.reconstruction import ReconstructionError, reconstruction_error
from teacher_cache.stages.tokens.support import AnySupport, states_support

NUM_POSITIONS = 128
USUAL_TEMPERATURES = (1.0, 2.0)  # 1 is the teacher's own, 2 the default of a student's training


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Of a codec, on the first positions of a corpus that predict something.

    Attributes:
        errors: at each probed temperature, the first one 1 where the codec serves it.
        head_difference: of cached states' logits from the teacher's, the largest, nats; None where
            no states are cached.
    """

    errors: tuple[ReconstructionError, ...]
    head_difference: float | None

    @property
    def num_ids(self) -> float:
        """Mean stored ids of a position."""
        return self.errors[0].num_ids

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        head = {} if self.head_difference is None else {
            "head_difference": float(f"{self.head_difference:.4g}")
        }  # fmt: skip
        return {"reconstruction": [error.to_json() for error in self.errors], **head}


def probe_codec(
    teacher: LanguageModelTeacher,
    samples: Sequence[PackedSample],
    codec: AnyCodec,
    support: AnySupport,
    head: LanguageModelHead | None,
) -> Probe | None:
    """Run the teacher over the first samples and reconstruct some of its distributions.

    Args:
        teacher: on its device.
        samples: of which the first are read.
        codec: of the cache.
        support: ids that count.
        head: the teacher's whole one, for `hidden`.

    Returns:
        The measurement, or None where no position predicts anything.

    Raises:
        UserError: if logits are not finite, or states and head do not give the teacher's logits.
    """
    chosen, positions = _first_positions(samples)
    if not len(positions):
        return None
    with torch.inference_mode():
        states = final_states(
            teacher.model,
            [sample.input_ids for sample in chosen],
            [[piece.stop - piece.start for piece in sample.pieces] for sample in chosen],
            packs=teacher.packs,
        )[torch.from_numpy(positions).to(teacher.device)]
        logits = head_logits(teacher.model, states)
    difference = None
    if isinstance(codec, HiddenCodec):
        assert head is not None, "states are cached with their head"
        head = head.to(teacher.device)
        difference = check_head(head, states, logits)
        codec = replace(codec, head=head.of_support(states_support(support)))
    drawn_at = draws_of(codec, chosen)
    return Probe(
        errors=tuple(
            reconstruction_error(
                codec,
                support,
                logits,
                temperature=temperature,
                states=states,
                drawn_at=None if drawn_at is None else drawn_at[positions],
            )
            for temperature in probed_temperatures(codec)
        ),
        head_difference=difference,
    )


def probed_temperatures(codec: AnyCodec) -> tuple[float, ...]:
    """Two temperatures of the codec's grid, 1 and 2 where it has them; fewer if it has fewer."""
    grid = getattr(codec, "temperatures", USUAL_TEMPERATURES)
    by_preference = [*(one for one in USUAL_TEMPERATURES if one in grid), *grid]
    return tuple(dict.fromkeys(by_preference))[:2]


def _first_positions(samples: Sequence[PackedSample]) -> tuple[list[PackedSample], np.ndarray]:
    """The first samples, and the indices of the first positions that count among all of theirs."""
    chosen: list[PackedSample] = []
    counts = np.zeros(0, bool)
    for sample in samples:
        if counts.sum() >= NUM_POSITIONS:
            break
        chosen.append(sample)
        counts = np.concatenate([counts, sample.loss_mask])
    return chosen, np.flatnonzero(counts)[:NUM_POSITIONS]
