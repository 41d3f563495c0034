"""Tables of one row a token id in a cache's `teacher` folder, for a student to start from.

Written by stage one, once, beside the tokenizer's files; the manifest has their SHA-256. No cached
value depends on them, so caches with and without one have one fingerprint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_teacher_file
from teacher_cache.cache.schema import POOLED
from teacher_cache.stages.models.device import dtype_name
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.load import ClassificationTeacher
from teacher_cache.stages.tokens.frame import surroundings
from teacher_cache.stages.tokens.tokenizers import special_ids

MAX_RELATIVE_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """The rows of the tokenizer's ids.

    Attributes:
        name: of the tensor in its file; the file is called after it.
        rows: [R, D], as they are stored: float16, or float32 where float16 loses too much.
        relative_error: of storing them, Frobenius norm of the difference over that of the table.
    """

    name: str
    rows: Tensor
    relative_error: float

    @classmethod
    def of(cls, name: str, exact: Tensor) -> StoredTable:
        """A table in the narrower format that holds it.

        Args:
            name: of the tensor.
            exact: [R, D] float32, on the CPU.
        """
        halved = exact.half()
        error = float((halved - exact).norm() / exact.norm())
        if not error <= MAX_RELATIVE_ERROR:  # beyond float16's range it is infinite
            return cls(name=name, rows=exact, relative_error=0.0)
        return cls(name=name, rows=halved, relative_error=float(f"{error:.1e}"))

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        num_rows, width = self.rows.shape
        return {
            "num_rows": num_rows,
            "width": width,
            "dtype": dtype_name(self.rows.dtype),
            "relative_error": self.relative_error,
        }

    def write(self, folder: Path) -> None:
        """Commit it; equal tables give equal bytes.

        Raises:
            UserError: where the file system refuses.
        """
        data = save({self.name: self.rows.contiguous()})
        write_bytes_atomically(folder / file_of(self.name), data)


def file_of(name: str) -> str:
    """The file of a table in the `teacher` folder."""
    return f"{name}.safetensors"


def read_table(cache: Path, manifest: Manifest, name: str) -> Tensor:
    """A table [R, D] that the manifest lists, row i of token id i, in the file's number format.

    Raises:
        CheckFailed: if the file is damaged or missing.
    """
    return load(read_teacher_file(cache, manifest, file_of(name)))[name]


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


STATES = "token_states"
"""The table's name, and key of the manifest's `about` that says how large it is, or None."""
STATES_FILE = file_of(STATES)


def token_states(
    teacher: ClassificationTeacher, *, num_ids: int, pooled_width: int, batch_tokens: int
) -> StoredTable:
    """Run the teacher over each token by itself, between the special tokens of any text.

    Special tokens, and ids without a token, are no text: their rows are 0. So are those of tokens
    at which the teacher's number format overflows; the log says how many.

    Args:
        teacher: on its device.
        num_ids: R; tokens from there on are left out, the teacher has no embeddings of them.
        pooled_width: D.
        batch_tokens: positions in a forward batch.

    Raises:
        UserError: if not even one such text fits into memory.
    """
    around = surroundings(teacher.tokenizer)
    special = special_ids(teacher.tokenizer)
    ids = sorted(teacher.tokenizer.get_vocab().values())
    known = [token_id for token_id in ids if token_id < num_ids and token_id not in special]
    logger.info("the teacher reads each of %s tokens by itself", f"{len(known):,}")
    texts = [np.array([*around.before, one, *around.after], np.uint32) for one in known]
    outputs = run_teacher(
        teacher, texts, batch_tokens=batch_tokens, pooled_width=pooled_width, on_batch=None
    )
    states = torch.from_numpy(outputs.vectors[POOLED])
    is_finite = states.isfinite().all(dim=1)
    if not is_finite.all():
        logger.warning(
            "the teacher's states of %d tokens are not finite in its number format: these tokens "
            "are left out of its table of states",
            int((~is_finite).sum()),
        )
        states[~is_finite] = 0.0
    rows = torch.zeros(num_ids, pooled_width)
    rows[known] = states
    return StoredTable.of(STATES, rows)


def read_token_states(cache: Path, manifest: Manifest) -> Tensor:
    """The table [R, D], row i of token id i, in the number format of the file.

    Raises:
        UserError: if the cache has none.
        CheckFailed: if the file is damaged or missing.
    """
    if STATES_FILE not in manifest.teacher_files:
        asked = POOLED in manifest.settings.get("hidden", "").split(",")
        remedy = (
            "run the same `pipe cache-teacher` again, it adds them and computes no shard again"
            if asked
            else "make a cache with `pipe cache-teacher --hidden pooled`"
        )
        raise UserError(
            "--embeddings teacher-states needs the teacher's pooled state of each token, which "
            f"{cache} was made without: {remedy}"
        )
    return read_table(cache, manifest, STATES)
