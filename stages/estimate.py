"""What a cache will take, before it is made: bytes, shards, what codec and maps lose.

Nothing is fetched: what needs data or a teacher that is not on this machine is left open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.plan import ShardPlan, documents_per_shard
from teacher_cache.stages.cache_teacher import NUM_PROBED_FOR_SIZE, CacheTeacherConfig, load_corpora
from teacher_cache.stages.codecs.measure import Probe
from teacher_cache.stages.data.packaged import austen, reviews
from teacher_cache.stages.data.packaged.packages import assets_folder
from teacher_cache.stages.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a cache that does not exist yet.

    Attributes:
        bytes_per_token: of a language model's fields but those of layers; None where it takes the
            teacher to know, or it is a classifier.
        num_ids: of the teacher's support; None where it was not loaded.
        probe: of the codec; None where it was not probed.
        num_bytes: of all shards; None where nothing was tokenised, as the next two.
        num_layer_bytes: of that, of attention maps and states of layers.
        maps: what storing attention maps loses (`RowErrors.to_json`); None without any.
        num_tokens: of all corpora.
        num_shards: of all corpora.
    """

    bytes_per_token: float | None
    num_ids: int | None = None
    probe: Probe | None = None
    num_bytes: float | None = None
    num_layer_bytes: float | None = None
    maps: dict[str, Any] | None = None
    num_tokens: float | None = None
    num_shards: int | None = None


def estimate(config: CacheTeacherConfig) -> Estimate:
    """Estimate a cache, views left out, from what is on this machine.

    Raises:
        UserError: for what the run itself would refuse.
    """
    of_teacher = TASKS[config.task].teacher
    corpora = [config.labeled, *([] if config.unlabeled is None else [config.unlabeled])]
    if not Path(config.forward.teacher).is_dir() or not all(
        _is_here(one.source) for one in corpora
    ):
        return Estimate(bytes_per_token=of_teacher.assumed_bytes_per_token(config.kept))
    task = of_teacher.prepared(config, load_corpora(config))
    num_bytes = num_layer_bytes = num_tokens = 0.0
    num_shards, per_shard = 0, None
    for corpus in task.corpora.values():
        documents = corpus.documents(0, min(NUM_PROBED_FOR_SIZE, len(corpus)))
        of_one = task.bytes_per_document(documents)
        if of_one is None:
            continue
        per_shard = per_shard or documents_per_shard(
            of_one, shard_mb=config.shards.shard_mb, max_documents=config.shards.shard_documents
        )
        num_bytes += of_one * len(corpus)
        num_layer_bytes += task.layer_bytes_per_document(documents) * len(corpus)
        num_tokens += task.tokens_per_document(documents) * len(corpus)
        num_shards += len(ShardPlan(num_documents=len(corpus), documents_per_shard=per_shard))
    return Estimate(
        bytes_per_token=task.bytes_per_token,
        num_ids=task.num_ids,
        probe=task.probe,
        num_bytes=num_bytes,
        num_layer_bytes=num_layer_bytes,
        maps=task.about().get("attention"),
        num_tokens=num_tokens,
        num_shards=num_shards,
    )


def _is_here(source: str) -> bool:
    if source in (austen.NAME, reviews.NAME):
        return (assets_folder() / source).is_dir()
    return Path(source).expanduser().exists()
