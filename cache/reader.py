"""Read a cache at random or in order, checksums verified, without torch and the command line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from teacher_cache.cache.committed import what_is_missing
from teacher_cache.cache.errors import BadShardError, UserError, did_you_mean
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.schema import Fields, Ragged, joined_fields
from teacher_cache.cache.sidecar import Sidecar, read_segment
from teacher_cache.cache.stores.interface import Shard
from teacher_cache.cache.stores.named import store_named

MAX_OPEN_SHARDS = 256


class CacheReader:
    """One split of a complete cache.

    Args:
        cache: the cache's folder.
        split: `labeled`, `unlabeled` or views of one of them (`labeled_views_1`).

    Raises:
        UserError: if there is no cache, it is not complete, its format is newer than this
            release, or it has no such split.
        BadShardError: if an index segment is missing or damaged.
    """

    def __init__(self, cache: Path | str, split: str = "labeled"):
        self.cache = Path(cache)
        self.manifest = read_manifest(self.cache)
        if not self.manifest.complete:
            raise UserError(what_is_missing(self.cache, self.manifest))
        if split not in self.manifest.splits:
            raise UserError(
                f"{self.cache} has no split {split!r}: {did_you_mean(split, self.manifest.splits)}"
            )
        self.split = split
        self._store = store_named(self.manifest.store)
        self.sidecars = self._read_index()
        self._starts = np.cumsum([0, *(sidecar.num_samples for sidecar in self.sidecars)])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._starts[-1])

    def sample(self, sample_idx: int) -> dict[str, np.ndarray]:
        """One sample's fields, as views of the mapped shard.

        Args:
            sample_idx: 0 to len - 1, in cache order.

        Returns:
            What the schema lists: of a classifier `sample_id` V16, `input_ids` u32 [S], `label` i32
            (-1 for none), `class_logits` f32 [C], and `pooled` f16 [D] where it was cached; of a
            language model ids, `loss_mask` bool [S] and its codec's fields.

        Raises:
            IndexError: if there is no such sample.
            BadShardError: if its bytes are missing or differ from their checksum.
        """
        if not 0 <= sample_idx < len(self):
            raise IndexError(f"sample {sample_idx} of {len(self)}")
        shard_idx = int(np.searchsorted(self._starts, sample_idx, side="right")) - 1
        return self._shard(shard_idx).sample(sample_idx - int(self._starts[shard_idx]))

    def samples(self, sample_idxs: Sequence[int] | np.ndarray) -> Fields:
        """Several samples, in the order asked for: fixed-size fields stacked, others ragged."""
        found = [self.sample(int(sample_idx)) for sample_idx in sample_idxs]
        return {
            spec.name: Ragged.from_arrays(
                [one[spec.name] for one in found], spec.dtype, spec.inner_shape
            )
            if spec.is_ragged
            else np.array([one[spec.name] for one in found], dtype=spec.dtype).reshape(
                len(found), *spec.inner_shape
            )
            for spec in self.manifest.schema
        }

    def find(self, sample_id: str) -> list[int]:
        """Indices of the samples whose hex id starts with `sample_id`."""
        wanted = sample_id.lower()
        return [i for i, found in enumerate(self.sample_ids()) if found.hex().startswith(wanted)]

    def sample_ids(self) -> Iterator[bytes]:
        """Every sample's 16-byte id, in cache order."""
        for fields in self.batches():
            for sample_id in fields["sample_id"]:
                yield sample_id.tobytes()

    def batches(self) -> Iterator[Fields]:
        """All samples in cache order, some at a time: a fast pass over the whole split."""
        for shard_idx in range(len(self.sidecars)):
            yield from self._shard(shard_idx).batches()

    def shard(self, shard_idx: int) -> Fields:
        """All fields of one shard, checked.

        Raises:
            BadShardError: if its bytes are missing or differ from their checksum.
        """
        return joined_fields(self.manifest.schema, list(self._shard(shard_idx).batches()))

    def lengths(self) -> np.ndarray:
        """Positions of every sample, [N] int64."""
        shards = range(len(self.sidecars))
        return np.concatenate([np.empty(0, np.int64), *(self._shard(i).lengths() for i in shards)])

    def column(self, name: str) -> np.ndarray:
        """One fixed-size field of every sample, [N, ...]: labels, say, or class logits."""
        parts = [np.asarray(fields[name]) for fields in self.batches()]
        spec = next(spec for spec in self.manifest.schema if spec.name == name)
        empty = np.empty((0, *spec.inner_shape), spec.dtype)
        return np.concatenate([empty, *parts])

    def _shard(self, shard_idx: int) -> Shard:
        if shard_idx in self._open:
            self._open.move_to_end(shard_idx)
            return self._open[shard_idx]
        sidecar = self.sidecars[shard_idx]
        shard = self._store.open(
            self.cache / sidecar.path,
            self.manifest.schema,
            sidecar.stored,
            num_samples=sidecar.num_samples,
        )
        self._open[shard_idx] = shard
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _read_index(self) -> list[Sidecar]:
        prefix = f"index/{self.split}-"
        sidecars = [
            sidecar
            for entry in self.manifest.index
            if entry["path"].startswith(prefix)
            for sidecar in read_segment(self.cache, entry)
        ]
        expected = self.manifest.splits[self.split].num_shards
        if len(sidecars) != expected:
            raise BadShardError(
                f"{self.cache} lists {len(sidecars)} {self.split} shards in its index, its "
                f"manifest {expected}: run stage one again, it rebuilds the index"
            )
        return sorted(sidecars, key=lambda sidecar: sidecar.shard_idx)
