"""Tables of one row a token id in a cache's `teacher` folder, for a student to start from.

Written by stage one, once, beside the tokenizer's files; the manifest has their SHA-256. No cached
value depends on them, so caches with and without one have one fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.teacher_files import read_teacher_file
from teacher_cache.stages.models.device import dtype_name

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
