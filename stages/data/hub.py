"""Data sets of the hub, read through `datasets`; no code of theirs is ever run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] -- httpx's or httpx2's, as the hub uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from teacher_cache.stages.data.opening import (
    SourceUnavailable,
    choose_split,
    quiet_datasets,
    root_cause,
)

PROBE_TIMEOUT_S = 10.0
# Where the hub keeps parquet files of a data set that is otherwise read by code of its own.
CONVERTED = "refs/convert/parquet"
_SHARD_ROWS = 1000  # of a streamed split, written to the disk at a time
_NEEDS_CODE = "Dataset scripts are no longer supported"


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A part of a split: its first rows, in its own order.

    Attributes:
        num_rows: so many; None for all.
    """

    num_rows: int | None


def read_hub(
    name: str, split: str | None, beginning: Beginning | None = None
) -> tuple[datasets.Dataset, str, str]:
    """Read one split of a hub data set, from the `datasets` cache where there is no network.

    Args:
        name: the data set's id, with its owner; `id:subset` where it has several, `id@revision`
            for a commit, branch or tag of it.
        split: the split, None for `train` or the only one.
        beginning: stream only this part of it; None fetches it whole.

    Returns:
        The table, the name of its split and the revision that it is of.

    Raises:
        SourceUnavailable: if the hub cannot be reached, or has no such data set.
        UserError: if there is no such split, or `datasets` cannot read it.
    """
    with quiet_datasets():
        try:
            builder = _builder(name, is_streamed=beginning is not None)
            if beginning is not None:
                table, chosen = _read_beginning(builder, name, split, beginning.num_rows)
                return table, chosen, str(builder.hash)
            chosen = split
            if builder.info.splits:
                chosen = choose_split(list(builder.info.splits), split, name)
            builder.download_and_prepare()
            chosen = choose_split(list(builder.info.splits or ()), chosen, name)
            table = cast(datasets.Dataset, builder.as_dataset(split=chosen))
        except _Unreachable as error:
            kept = beginning and _kept_beginning(name, split, beginning.num_rows)
            if not kept:
                raise SourceUnavailable(str(error)) from error
            return kept
        except (
            HTTPError,
            OSError,
            ValueError,
            RuntimeError,
            DatasetsError,
            pa.ArrowException,
        ) as error:
            raise SourceUnavailable(
                f"{name!r} could not be loaded from the hub ({root_cause(error)}): "
                f"{local_alternative()}"
            ) from error
    return table, chosen, str(builder.hash)


def local_alternative() -> str:
    """The way out where there is no hub."""
    return "give a local folder or file instead, for example --data /path/to/aclImdb"


class _Unreachable(Exception):
    """There is no hub, and a streamed data set has no builder in the cache."""


def _builder(source: str, *, is_streamed: bool) -> datasets.DatasetBuilder:
    """The data set's builder: the hub's, or where it cannot be reached the one cached last.

    One question with one time limit decides whether there is a hub; asking `datasets` first would
    retry with growing pauses before it says that there is none.
    """
    name, subset, revision = _parts(source)
    pinned: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if datasets_config.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        HfApi().dataset_info(name, timeout=PROBE_TIMEOUT_S, **pinned)
    except RevisionNotFoundError as error:
        raise SourceUnavailable(
            f"the hub's data set {name!r} has no revision {revision!r}: check it, or leave it out"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnavailable(
            f"the hub has no data set {name!r} that can be read without signing in, and there is "
            f"no such file or folder: check the name, or {local_alternative()}"
        ) from error
    except (HTTPError, OSError) as error:
        if is_streamed:
            raise _Unreachable(_not_here(source, error)) from error
        return _cached_builder(name, subset, revision, error)
    identity: tuple[Any, ...] = (name, subset) if subset else (name,)
    try:
        return datasets.load_dataset_builder(*identity, **pinned)
    except RuntimeError as error:
        if _NEEDS_CODE not in str(error) or revision:
            raise
        return datasets.load_dataset_builder(*identity, revision=CONVERTED)


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Id, subset and revision of `id:subset@revision`."""
    named, _, revision = source.partition("@")
    name, _, subset = named.partition(":")
    return name, subset or None, revision or None


def _cached_builder(
    name: str, subset: str | None, revision: str | None, reason: Exception
) -> datasets.DatasetBuilder:
    """The builder of what was fetched last, or of one commit: nothing here tells a branch's."""
    own: dict[str, Any] = {"dataset_name": name.split("/")[-1], "repo_id": name}
    try:
        newest = Cache(**own, config_name=subset, version="auto", hash="auto")
        if revision is None:
            return newest
        fetched = Path(newest.cache_dir).parents[2].glob(f"{subset or '*'}/*/{revision}")
        found = next(fetched, None)
    except ValueError as error:
        raise SourceUnavailable(_not_here(name, reason)) from error
    if found is None:
        raise SourceUnavailable(
            f"{_not_here(name, reason)}; what was fetched before is found by its whole commit "
            f"alone, and it is not {revision}"
        )
    *_, config_name, version, commit = found.parts
    return Cache(**own, config_name=config_name, version=version, hash=commit)


def _not_here(name: str, reason: Exception) -> str:
    return (
        f"{name!r} is no file or folder here, and the hub could not be reached "
        f"({root_cause(reason)}): {local_alternative()}"
    )


def _read_beginning(
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


def _kept_beginning(
    name: str, split: str | None, num_rows: int | None
) -> tuple[datasets.Dataset, str, str] | None:
    """What `_read_beginning` kept last: table, split and revision; None if nothing."""
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
