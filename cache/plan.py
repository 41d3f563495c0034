"""A cache's splits by their names, which documents make shard i of each, and who makes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


Shard = tuple[str, int]
"""A shard by its split and its number there."""


def shards_of(plans: Mapping[str, ShardPlan]) -> list[Shard]:
    """Every shard of a cache, in the order in which one process makes them."""
    return [(split, shard_idx) for split, plan in plans.items() for shard_idx in range(len(plan))]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a cache's shards that one of several workers makes.

    Of the shards in order, worker `idx` of `num` makes each whose place, modulo `num`, is `idx`.

    Attributes:
        idx: the worker, from 0.
        num: of workers.
    """

    idx: int = 0
    num: int = 1

    def of(self, plans: Mapping[str, ShardPlan]) -> list[Shard]:
        """Its shards, in order."""
        return shards_of(plans)[self.idx :: self.num]

    @property
    def is_all(self) -> bool:
        """Whether there is no other worker."""
        return self.num == 1

    def __str__(self) -> str:
        return f"{self.idx}/{self.num}"

    @classmethod
    def parse(cls, text: str) -> Share:
        """From `i/n`.

        Raises:
            UserError: if it is not of that form, or i is not from 0 to n - 1.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        idx, num = (int(found[1]), int(found[2])) if found else (0, 0)
        if not idx < num:
            raise UserError(
                f"--slice {text} is no slice: give i/n, where i is from 0 to n - 1, as in 0/4"
            )
        return cls(idx=idx, num=num)


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
