"""The beginning of a hub data set that is too large to be fetched whole.

Its rows come in the data set's own order, so a longer beginning only appends. What was read once is
kept beside the other Arrow copies, by revision, and serves where there is no hub.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import config as datasets_config

from teacher_cache.stages.data.splits import choose_split

_SHARD_ROWS = 1000  # written to the disk at a time


def read_beginning(
    builder: datasets.DatasetBuilder, name: str, split: str | None, num_rows: int | None
) -> tuple[datasets.Dataset, str]:
    """Read the first rows of a split, and no more of its files than they take.

    Args:
        builder: of the data set.
        name: its id.
        split: None for `train` or the only one.
        num_rows: so many, or all.

    Returns:
        The table and the name of its split.

    Raises:
        UserError: if there is no such split.
    """
    streams = cast(dict[str, datasets.IterableDataset], builder.as_streaming_dataset())
    chosen = choose_split(list(streams), split, name)
    folder = _folder(name, chosen, num_rows) / str(builder.hash)
    if not folder.is_dir():
        _write(streams[chosen], folder, num_rows)
    return datasets.Dataset.load_from_disk(str(folder)), chosen


def kept_beginning(
    name: str, split: str | None, num_rows: int | None
) -> tuple[datasets.Dataset, str, str] | None:
    """What `read_beginning` kept last: table, split and revision; None if nothing."""
    wanted = split or "train"
    kept = [one for one in _folder(name, wanted, num_rows).glob("*") if one.suffix != ".part"]
    if not kept:
        return None
    newest = max(kept, key=lambda one: one.stat().st_mtime)
    return datasets.Dataset.load_from_disk(str(newest)), wanted, newest.name


def _folder(name: str, split: str, num_rows: int | None) -> Path:
    base = Path(datasets_config.HF_DATASETS_CACHE) / "teacher_cache" / "streamed"
    return base / name.replace("/", "___").replace(":", "__") / f"{split}-{num_rows or 'all'}"


def _write(stream: datasets.IterableDataset, folder: Path, num_rows: int | None) -> None:
    """Through a folder that is renamed once it is whole."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)

    def rows() -> Iterator[dict[str, Any]]:
        yield from itertools.islice(cast(Any, stream), num_rows)

    table = datasets.Dataset.from_generator(
        rows,
        features=stream.features,
        cache_dir=str(part / "rows"),
        fingerprint=folder.name[:16].ljust(16, "0"),
        writer_batch_size=_SHARD_ROWS,
    )
    cast(datasets.Dataset, table).save_to_disk(str(part / "table"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    (part / "table").rename(folder)
    shutil.rmtree(part, ignore_errors=True)
