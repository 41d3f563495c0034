"""The teacher's input embedding table: a student may start from it."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.teacher.stored_tables import StoredTable, file_of, read_table

TABLE = "embeddings"
"""The table's name, and key of the manifest's `about` that says how it is stored, or None."""
TABLE_FILE = file_of(TABLE)

logger = logging.getLogger(__name__)


def embedding_table(model: PreTrainedModel, *, num_ids: int) -> StoredTable | None:
    """The table of a model; None, and a line in the log, where it has none of real numbers.

    Args:
        model: in the number format in which it runs.
        num_ids: of the tokenizer; rows beyond them belong to no token.
    """
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers' answer for a model without one
        weight = None
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        logger.info(
            "%s has no table of input embeddings, so no student can start from it",
            type(model).__name__,
        )
        return None
    return StoredTable.of(TABLE, weight.detach()[:num_ids].float().cpu())


def read_embedding_table(cache: Path, manifest: Manifest, *, option: str = "teacher") -> Tensor:
    """The teacher's table [R, D], row i of token id i, in the number format of the file.

    Args:
        cache: folder of the cache.
        manifest: its manifest.
        option: value of --embeddings that asks for it.

    Raises:
        UserError: if the cache has none.
        CheckFailed: if the file is damaged or missing.
    """
    if TABLE_FILE not in manifest.teacher_files:
        if TABLE in manifest.about:
            raise UserError(
                f"--embeddings {option} needs the teacher's input embedding table, and the teacher "
                f"of {cache} has none: leave the option out"
            )
        raise UserError(
            f"--embeddings {option} needs the teacher's input embedding table, which {cache} was "
            "made without: run the same `pipe cache-teacher` again, it adds the table and "
            "computes no shard again"
        )
    return read_table(cache, manifest, TABLE)
