"""Pictures of a student's mixing matrices beside its teacher's attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.pictures.attention_maps import (
    NamedMap,
    Panels,
    codec_of,
    readable_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.stages.evaluation.matched_maps import MatchedMaps

PAIRS = 2  # columns: the teacher's panel and the student's


def both_sides(
    reader: CacheReader, sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase, run: Path
) -> Panels:
    """Each matched layer's two maps of a sample, the tokens in the student's order.

    Args:
        reader: of the cache.
        sample: as it gives it.
        tokenizer: of the cache.
        run: a finished student's.

    Raises:
        UserError: as `InsideOfRun.of`.
    """
    from teacher_cache.stages.evaluation.matched_maps import InsideOfRun  # imports torch

    codec_of(reader.manifest)  # refuses a cache without maps
    maps = InsideOfRun.of(run, reader).matched_maps(sample)
    appended = -1 if maps.appended_id is None else maps.appended_id  # none has no such source
    ids = [appended if source < 0 else int(sample["input_ids"][source]) for source in maps.sources]
    tokens = readable_tokens(tokenizer, ids)
    return Panels(maps=both_maps(maps, tokens), tokens=tokens, most_columns=PAIRS)


def both_maps(maps: MatchedMaps, tokens: Sequence[str]) -> list[NamedMap]:
    """A panel of the teacher and one of the student for each matched layer.

    Of caches that hold the pooled position's row alone there are two panels, a row a layer.

    Args:
        maps: of a sample.
        tokens: at the student's positions, as they are to be read.
    """
    if maps.teacher_row is not None:
        places = {"teacher": int(np.flatnonzero(maps.sources == maps.teacher_row)[0])}
        places["student"] = int(maps.rows[0])
        return [
            NamedMap(
                title=f"{side}, what {tokens[places[side]]} looks at",
                values=np.concatenate([getattr(one, side) for one in maps.layers]),
                row_labels=[f"layer {getattr(one.pair, side)}" for one in maps.layers],
            )
            for side in ("teacher", "student")
        ]
    row_labels = [tokens[int(row)] for row in maps.rows]
    return [
        NamedMap(
            title=f"{side}, layer {getattr(one.pair, side)}",
            values=getattr(one, side),
            row_labels=row_labels,
        )
        for one in maps.layers
        for side in ("teacher", "student")
    ]
