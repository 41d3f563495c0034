"""A cache from what an inference engine wrote: its log-probs of the most probable tokens.

For a teacher that runs elsewhere (vLLM, SGLang, llama.cpp, ...). The engine reads each document as
a prompt and returns, for every token of it, the log-probs of the K most probable tokens there and
of the token itself; a file of these becomes a cache of the codec `topk`, from which students train
as from any other:

>>> cache_log_probs(
...     Path("caches/mine"), LogProbFile(Path("answers.jsonl")), tokenizer=tokenizer, top_k=20,
...     engine=Engine(name="vllm 0.11.0", model="Qwen/Qwen3-0.6B", revision="c1899de"),
... )
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest, SplitSummary, utc_now
from teacher_cache.cache.plan import LABELED, UNLABELED, ShardPlan
from teacher_cache.cache.schema import Fields, language_model_schema
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.codecs.capture import packed_fields
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.packing import pack_tokens, packing_settings
from teacher_cache.stages.data.survey import CorpusReport
from teacher_cache.stages.data.tokenization import token_ids, tokenize
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.teacher.log_probs import (
    SUM_TOLERANCE,
    Answer,
    LogProbFile,
    listed_positions,
)
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.support import Support

VERSIONED = ("teacher-cache", "transformers", "tokenizers", "pyarrow", "numpy")
NUM_PROBED = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who said it; recorded in the manifest as it is given, since nothing here can check it.

    Attributes:
        name: with its version.
        model: hub id or path that the engine was given.
        revision: commit or hash of the weights; None where it is not known.
        dtype: number format in which it ran.
    """

    name: str
    model: str
    revision: str | None = None
    dtype: str = "unknown"


def cache_log_probs(
    cache: Path,
    file: LogProbFile,
    *,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    top_k: int,
    max_length: int = 512,
    unlabeled: LogProbFile | None = None,
    shard_documents: int = 1024,
    overwrite: bool = False,
) -> Manifest:
    """Write the cache; killed and called again, it goes on from the shards that it has committed.

    Args:
        cache: its folder.
        file: the engine's answers on the main corpus.
        tokenizer: the engine's.
        engine: what the manifest says of it.
        top_k: tokens of a list to keep; each has at least so many.
        max_length: tokens of a sample; no document has more.
        unlabeled: answers on a second corpus, for training without cross-entropy.
        shard_documents: documents in a shard.
        overwrite: start the cache again, whatever it holds.

    Raises:
        UserError: for a file or a list that is not as expected, tokens that the tokenizer does not
            make of their text, or a cache with other settings.
    """
    files = {LABELED: file} | ({} if unlabeled is None else {UNLABELED: unlabeled})
    support = Support.of_tokenizer(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    codec = TopKCodec(support_size=support.size, top_k=top_k, temperatures=(1.0,), is_exact=True)
    source = _Source(files, tokenizer, support, codec, max_length)
    plans = {
        split: ShardPlan(num_documents=len(one), documents_per_shard=shard_documents)
        for split, one in files.items()
    }
    manifest = _manifest(source, engine, plans)
    with CacheWriter(cache, manifest, plans, overwrite=overwrite) as writer:
        for split, shard_idx in writer.begin(lambda folder: _write_teacher(folder, source, plans)):
            fields, facts = source.shard(split, *plans[split].documents(shard_idx))
            writer.commit(split, shard_idx, fields, num_truncated=0, environment=facts)
        return writer.manifest if writer.manifest.complete else writer.finish()


@dataclass(frozen=True)
class _Source:
    """Answers, and what they mean."""

    files: dict[str, LogProbFile]
    tokenizer: PreTrainedTokenizerBase
    support: Support
    codec: TopKCodec
    max_length: int

    def documents(self, split: str, start: int, stop: int) -> list[tuple[Document, Answer]]:
        """Documents with their answers, whose tokens are those of their text.

        Raises:
            UserError: if they are not, or are too many, or none.
        """
        file = self.files[split]
        answers = file.answers(start, stop)
        made = token_ids([one.text for one in answers], self.tokenizer, max_length=None)
        found = []
        for idx, (answer, ids) in enumerate(zip(answers, made, strict=True), start):
            self._check(file.name_of(idx), answer, ids)
            document = Document(text=answer.text, source=file.sha256, split=split, position=idx)
            found.append((document, answer))
        return found

    def shard(self, split: str, start: int, stop: int) -> tuple[Fields, dict[str, Any]]:
        """A shard's fields, and what its sidecar says of the lists."""
        used = np.ones(self.support.size, bool)
        used[list(self.support.unused)] = False
        tokens, positions = [], []
        for idx, (document, answer) in enumerate(self.documents(split, start, stop), start):
            ids = np.asarray(answer.token_ids, np.uint32)
            tokens.append((document.sample_id, ids))
            where = self.files[split].name_of(idx)
            positions.append(
                listed_positions(self.codec, ids, answer.lists, used=used, where=where)
            )
        facts = {
            "num_positions": sum(len(one.reduced) - 1 for one in positions),
            "num_tails_below_resolution": sum(one.num_below_resolution for one in positions),
            "largest_sum": max(one.largest_sum for one in positions),
        }
        if facts["num_tails_below_resolution"] == facts["num_positions"]:
            logger.warning(
                "%s, documents %d to %d: every list holds all the mass; if the engine renormalised "
                "what it left (a top-k or top-p of its own), what students learn is wrong",
                self.files[split].path,
                start + 1,
                stop,
            )
        samples = pack_tokens(tokens, max_length=self.max_length)
        # No document is longer than a sample, so each stands whole in one, in their order.
        in_order = iter(positions)
        pieces = [[next(in_order).reduced for _ in sample.pieces] for sample in samples]
        return packed_fields(self.codec, samples, pieces), facts

    def _check(self, where: str, answer: Answer, ids: list[int]) -> None:
        found = [int(one) for one in answer.token_ids]
        if not found or len(found) > self.max_length:
            raise UserError(
                f"{where} has {len(found)} tokens, expected 1 to {self.max_length}: raise "
                "max_length, or have the engine read it in pieces"
            )
        if len(answer.lists) != len(found):
            raise UserError(f"{where} has {len(answer.lists)} lists for {len(found)} tokens")
        if found not in (ids, [*ids, self.tokenizer.eos_token_id]):
            raise UserError(
                f"{where} has other tokens than the tokenizer makes of its text "
                f"({found[:5]}... and {ids[:5]}...): give the tokenizer that the engine used, and "
                "the text as it was read"
            )


def _manifest(source: _Source, engine: Engine, plans: dict[str, ShardPlan]) -> Manifest:
    record = describe(source.tokenizer, max_length=source.max_length)
    settings = {
        "task": "lm",
        "codec": source.codec.settings,
        "support": source.support.settings,
        "teacher": {
            "engine": engine.name,
            "model": engine.model,
            "commit": engine.revision,
            "dtype": engine.dtype,
            "weights_sha256": None,  # the engine's to know
            "tokenizer_sha256": record.files_sha256,
        },
        "packing": packing_settings(
            source.tokenizer, max_length=source.max_length, document_end="none"
        ),
        "log_probs": {"version": 1, "sum_tolerance": SUM_TOLERANCE},
        "max_length": source.max_length,
        "data": {split: {"sha256": file.sha256} for split, file in source.files.items()},
    }
    per_shard = plans[LABELED].documents_per_shard
    return Manifest(
        fingerprint=fingerprint(settings),
        settings=settings,
        layout={"documents_per_shard": per_shard, "shard_documents": per_shard},
        schema=language_model_schema(source.codec.fields, is_packed=True),
        splits={
            split: SplitSummary(
                num_documents=plan.num_documents,
                num_shards=len(plan),
                report=CorpusReport(
                    num_documents=plan.num_documents,
                    num_empty=0,
                    num_duplicates=source.files[split].num_duplicates,
                ).model_dump(),
            )
            for split, plan in plans.items()
        },
        about={"teacher": engine.model, "engine": asdict(engine)},
        teacher_files={},
        versions={name: version(name) for name in VERSIONED},
        created_at=utc_now(),
    )


def _write_teacher(folder: Path, source: _Source, plans: dict[str, ShardPlan]) -> None:
    """The tokenizer, its table, and a probe of documents, as stage one writes them."""
    probe = []
    for split, plan in plans.items():
        found = source.documents(split, *plan.documents(0))
        documents = [document for document, _ in found]
        samples = tokenize(documents, source.tokenizer, max_length=source.max_length)
        by_id = {document.sample_id: document for document in documents}
        kept = [by_id[sample.sample_id] for sample in samples]
        probe.extend(choose_probe(kept, samples, num=NUM_PROBED // len(plans)))
    write_tokenization(folder, source.tokenizer, max_length=source.max_length, probe=probe)
