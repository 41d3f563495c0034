"""A cache's splits by their names, and which documents make shard i of each, for every worker."""

from __future__ import annotations

import re
from dataclasses import dataclass

from teacher_cache.cache.errors import UserError

LABELED, UNLABELED = "labeled", "unlabeled"

_SPLIT = re.compile(rf"({LABELED}|{UNLABELED})(?:_views_([1-9][0-9]*))?")


def views_split(split: str, number: int) -> str:
    """The split of the views of that number (from 1) of a corpus's documents."""
    return f"{split}_views_{number}"


def viewed_split(split: str) -> str | None:
    """The split whose documents these are views of; None for a corpus."""
    found = _SPLIT.fullmatch(split)
    return found[1] if found and found[2] else None


def is_split(name: str) -> bool:
    """Whether a folder of this name is a split's."""
    return _SPLIT.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Fixed-size runs of consecutive documents; only the last shard may be shorter.

    Attributes:
        num_documents: of the corpus, in its order.
        documents_per_shard: recorded once, so a longer corpus changes the last shard only.
    """

    num_documents: int
    documents_per_shard: int

    def __len__(self) -> int:
        """The number of shards."""
        return -(-self.num_documents // self.documents_per_shard)

    def documents(self, shard_idx: int) -> tuple[int, int]:
        """First and one-past-last document of a shard."""
        start = shard_idx * self.documents_per_shard
        return start, min(start + self.documents_per_shard, self.num_documents)


def documents_per_shard(bytes_per_sample: float, *, shard_mb: int, max_documents: int) -> int:
    """How many documents fill a shard of `shard_mb` megabytes, at most `max_documents`.

    The second bound keeps what a kill can lose small where samples are tiny, as class logits are.

    Raises:
        UserError: if a bound is not positive.
    """
    if shard_mb < 1 or max_documents < 1:
        raise UserError(
            f"a shard of {shard_mb} MB and {max_documents} documents holds nothing: give at "
            "least 1 of each"
        )
    return max(1, min(max_documents, int(shard_mb * 1e6 / bytes_per_sample)))
