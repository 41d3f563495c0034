"""The shards of one cache: made durable one by one, by whichever process, and read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.committed import committed_sidecar
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.plan import Shard, ShardPlan
from teacher_cache.cache.schema import Fields, Ragged
from teacher_cache.cache.sidecar import Sidecar, shard_path, sidecar_path
from teacher_cache.cache.stores.named import store_named


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of a cache that somebody began; index and manifest are its writer's.

    Attributes:
        cache: its folder.
        manifest: whose store, schema and fingerprint count.
        plans: the shard plan of each split.
    """

    cache: Path
    manifest: Manifest
    plans: Mapping[str, ShardPlan]

    def commit(
        self,
        split: str,
        shard_idx: int,
        fields: Fields,
        *,
        num_truncated: int,
        environment: dict[str, Any],
    ) -> Sidecar:
        """Make one shard durable, then its sidecar.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        store = store_named(self.manifest.store)
        path = shard_path(split, shard_idx, store.suffix)
        stored = store.write(self.cache / path, self.manifest.schema, fields)
        ids, tokens = fields["sample_id"], fields["input_ids"]
        assert isinstance(ids, np.ndarray) and isinstance(tokens, Ragged)
        sidecar = Sidecar(
            split=split,
            shard_idx=shard_idx,
            path=path,
            documents=self.plans[split].documents(shard_idx),
            num_bytes=stored.num_bytes,
            num_samples=len(ids),
            num_tokens=len(tokens.values),
            num_truncated=num_truncated,
            first_id=ids[0].tobytes().hex() if len(ids) else "",
            last_id=ids[-1].tobytes().hex() if len(ids) else "",
            sha256=stored.sha256,
            batches=stored.batches,
            files=stored.files,
            fingerprint=self.manifest.fingerprint,
            environment=environment,
        )
        write_bytes_atomically(
            sidecar_path(self.cache, split, shard_idx), sidecar.to_json().encode()
        )
        return sidecar

    def committed(self, shard: Shard) -> Sidecar | None:
        """The sidecar of a shard that is there; None before.

        Raises:
            BadShardError: if it cannot be read back.
        """
        return committed_sidecar(self.cache, self.manifest, self.plans, shard)

    def batches(self, sidecar: Sidecar) -> Iterator[Fields]:
        """The samples of a committed shard, in order, some at a time.

        Raises:
            BadShardError: if its bytes are missing or differ from their checksum.
        """
        shard = store_named(self.manifest.store).open(
            self.cache / sidecar.path,
            self.manifest.schema,
            sidecar.stored,
            num_samples=sidecar.num_samples,
        )
        yield from shard.batches()
