"""The teacher's input embedding table in a cache's `teacher` folder: a student may start from it.

Written by stage one, once, beside the tokenizer's files; the manifest has its SHA-256 and says how
it is stored. No cached value depends on it, so caches with and without one have one fingerprint.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.stages.device import dtype_name

TABLE_FILE = "embeddings.safetensors"
TABLE_FACTS = "embeddings"
"""Key of the manifest's `about` that says how the table is stored, or None: there is none."""
MAX_RELATIVE_ERROR = 1e-3

_TENSOR = "embeddings"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """The rows of the tokenizer's ids.

    Attributes:
        rows: [R, D], as they are stored: float16, or float32 where float16 loses too much.
        relative_error: of storing them, Frobenius norm of the difference over that of the table.
    """

    rows: Tensor
    relative_error: float

    @classmethod
    def of(cls, model: PreTrainedModel, *, num_ids: int) -> EmbeddingTable | None:
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
        exact = weight.detach()[:num_ids].float().cpu()
        halved = exact.half()
        error = float((halved - exact).norm() / exact.norm())
        if not error <= MAX_RELATIVE_ERROR:  # beyond float16's range it is infinite
            return cls(rows=exact, relative_error=0.0)
        return cls(rows=halved, relative_error=float(f"{error:.1e}"))

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
        write_bytes_atomically(folder / TABLE_FILE, save({_TENSOR: self.rows.contiguous()}))


def read_embedding_table(cache: Path, manifest: Manifest) -> Tensor:
    """The teacher's table [R, D], row i of token id i, in the number format of the file.

    Raises:
        UserError: if the cache has none.
        CheckFailed: if the file is damaged or missing.
    """
    if TABLE_FILE not in manifest.teacher_files:
        if TABLE_FACTS in manifest.about:
            raise UserError(
                f"--embeddings teacher needs the teacher's input embedding table, and the teacher "
                f"of {cache} has none: leave the option out"
            )
        raise UserError(
            f"--embeddings teacher needs the teacher's input embedding table, which {cache} was "
            "made without: run the same `pipe cache-teacher` again, it adds the table and "
            "computes no shard again"
        )
    path = cache / TEACHER_FOLDER / TABLE_FILE
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest.teacher_files[TABLE_FILE]:
        raise CheckFailed(
            f"{path} is missing or differs from its SHA-256: run the same `pipe cache-teacher` "
            "again, it writes the table anew and computes no shard again"
        )
    return load(data)[_TENSOR]
