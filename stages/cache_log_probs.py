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

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import file_sha256, fingerprint
from teacher_cache.cache.manifest import Manifest, SplitSummary, utc_now
from teacher_cache.cache.plan import LABELED, UNLABELED, ShardPlan
from teacher_cache.cache.schema import Fields, language_model_schema
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.codecs.capture import packed_fields
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import pack_tokens, packing_settings
from teacher_cache.stages.data.survey import CorpusReport
from teacher_cache.stages.data.tokenization import token_ids, tokenize
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.support import Support


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A document and what the engine said of it.

    Attributes:
        text: of the document.
        token_ids: [S], as the engine read it, with the special tokens that it added.
        lists: [S], the log-probs of each token given those before it; None for the first.
    """

    text: str
    token_ids: Sequence[int]
    lists: Sequence[TopLogProbs | None]


class LogProbFile:
    """Answers in a JSONL file, one document a line, in vLLM's form.

    A line is `{"text": ..., "prompt_token_ids": [...], "prompt_logprobs": [null, {"11": {"logprob":
    -1.2, ...}, ...}, ...]}`; a plain number in the place of an object will do. The file is read
    twice: once to find its lines, once when the cache is written, a shard at a time.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        num_duplicates: documents whose text an earlier one has too.

    Raises:
        UserError: if the file is not there, or a line is no such answer.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path} is no file: give what the engine's answers were written to")
        self.path = path
        self._starts: list[int] = []
        self.sha256 = file_sha256(path)
        texts: set[str] = set()
        with open(path, "rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self._starts.append(start)
                    texts.add(self._answer(line, len(self._starts)).text)
                start += len(line)
        self.num_duplicates = len(self._starts) - len(texts)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._starts)

    def answers(self, start: int, stop: int) -> list[Answer]:
        """Answers `start` to `stop` (not included)."""
        found = []
        with open(self.path, "rb") as file:
            for idx in range(start, stop):
                file.seek(self._starts[idx])
                found.append(self._answer(file.readline(), idx + 1))
        return found

    def name_of(self, idx: int) -> str:
        """What a message calls a document."""
        return f"{self.path}, document {idx + 1}"

    def _answer(self, line: bytes, number: int) -> Answer:
        try:
            value = json.loads(line)
            return Answer(
                text=value["text"],
                token_ids=value["prompt_token_ids"],
                lists=[None if one is None else _listed(one) for one in value["prompt_logprobs"]],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.name_of(number - 1)} cannot be read ({type(error).__name__}: {error}): "
                "expected a JSON object with text, prompt_token_ids and prompt_logprobs"
            ) from error


def _listed(entry: dict[str, Any]) -> TopLogProbs:
    return {
        int(token_id): float(one["logprob"] if isinstance(one, dict) else one)
        for token_id, one in entry.items()
    }


SUM_TOLERANCE = 1e-3  # of a head's mass above 1
RESOLUTION = 1e-5  # of a tail's mass; what is smaller, rounding made

TopLogProbs = Mapping[int, float]
"""Nats at temperature 1, by token id."""


@dataclass(frozen=True, kw_only=True)
class ListedPositions:
    """What lists say of a document's N positions.

    Attributes:
        reduced: of the N positions.
        largest_sum: of a position's head, 1 at most but for rounding.
        num_below_resolution: positions whose tail is so small that rounding may have made it.
    """

    reduced: ReducedTopK
    largest_sum: float
    num_below_resolution: int


def listed_positions(
    codec: TopKCodec,
    token_ids: np.ndarray,
    lists: Sequence[TopLogProbs | None],
    *,
    used: np.ndarray,
    where: str,
) -> ListedPositions:
    """Heads and tails of a document's positions; the last one, after which nothing comes, is blank.

    Args:
        codec: with 1 as its only temperature and whole heads.
        token_ids: [N].
        lists: [N], of each token given those before it; the first is not read.
        used: [V] bool, the ids of the support.
        where: the document is called in a message.

    Raises:
        ValueError: for a codec of other temperatures, or lists of another number.
        UserError: for a list that is too short, lacks the real token, names an unknown id, or is
            no list of log-probs at temperature 1.
    """
    if codec.temperatures != (1.0,) or codec.top_p is not None:
        raise ValueError("lists of log-probs fill whole heads, at temperature 1 alone")
    if len(lists) != len(token_ids):
        raise ValueError(f"{len(lists)} lists for {len(token_ids)} tokens")
    num, k = len(token_ids), codec.top_k
    ids = np.tile(np.arange(k), (num, 1))
    log_probs = np.full((num, k), -np.inf)
    log_probs[:, 0] = 0.0
    next_log_prob = np.zeros(num)
    for place in range(num - 1):
        at = f"{where}, token {place + 1}"
        found, listed = _sorted(lists[place + 1], k, used, at)
        real = int(token_ids[place + 1])
        if real not in found:
            raise UserError(
                f"{at}: the list lacks the real token {real}, whose log-prob every cache keeps: "
                "ask the engine for the prompt's own log-probs beside the most probable ones"
            )
        ids[place], log_probs[place] = found[:k], listed[:k]
        next_log_prob[place] = listed[np.flatnonzero(found == real)[0]]
    is_known = np.arange(num) < num - 1
    outside = is_known & ~(ids == np.append(token_ids[1:], -1)[:, None]).any(axis=1)
    sums = np.exp(log_probs).sum(axis=1)
    most_left = (codec.support_size - k) * np.exp(log_probs[:, -1])
    _refuse_sums(sums[:-1], most_left[:-1], where)
    tail = np.clip(1.0 - sums, 0.0, most_left)
    tail = np.where(is_known, np.maximum(tail, np.where(outside, np.exp(next_log_prob), 0.0)), 0.0)
    with np.errstate(divide="ignore"):
        tail_r = np.log(tail) - log_probs[:, 0]
    return ListedPositions(
        reduced=ReducedTopK(
            top1_log_prob=log_probs[:, 0].astype(np.float32),
            next_log_prob=next_log_prob.astype(np.float32),
            ids=ids,
            below_max=(log_probs - log_probs[:, :1]).astype(np.float32),
            tail_r=tail_r[:, None],
            # Not known, and read between temperatures only, of which there are none.
            tail_m=np.full((num, 1), np.nan),
        ),
        largest_sum=float(sums[:-1].max(initial=0.0)),
        num_below_resolution=int((is_known & (tail < RESOLUTION)).sum()),
    )


def _sorted(
    listed: TopLogProbs | None, k: int, used: np.ndarray, at: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs, descending, ties to the lower id."""
    num = 0 if listed is None else len(listed)
    if listed is None or num < k:
        raise UserError(
            f"{at}: the list has {num} tokens, expected at least {k}: ask the engine for more, or "
            "cache fewer (top_k)"
        )
    ids = np.fromiter(listed, np.int64, num)
    log_probs = np.fromiter(listed.values(), np.float64, num)
    unknown = ids[~((ids >= 0) & (ids < len(used)) & used[np.clip(ids, 0, len(used) - 1)])]
    if len(unknown):
        raise UserError(
            f"{at}: the id {unknown[0]} is no token of the tokenizer: give the one that the engine "
            "used"
        )
    is_bad = ~(log_probs <= SUM_TOLERANCE)
    if is_bad.any() or np.isneginf(log_probs).all():
        raise UserError(
            f"{at}: {log_probs[np.argmax(is_bad)]:g} is no log-prob: expected numbers up to 0"
        )
    order = np.lexsort((ids, -log_probs))
    return ids[order], log_probs[order]


def _refuse_sums(sums: np.ndarray, most_left: np.ndarray, where: str) -> None:
    """Refuse heads that hold too much, or leave more than the others could hold.

    Args:
        sums: [N] mass of each head.
        most_left: [N] the most that the others can have, none being above the head's last.
        where: the document is called in a message.
    """
    wrong = (sums > 1 + SUM_TOLERANCE) | (1 - sums > most_left + SUM_TOLERANCE)
    if wrong.any():
        place = int(np.argmax(wrong))
        expected = f"{max(0.0, 1 - most_left[place]):.4f} to 1"
        raise UserError(
            f"{where}, token {place + 1}: the probabilities add up to {sums[place]:.4f}, expected "
            f"{expected}: these are not the most probable tokens of one distribution at "
            "temperature 1, so have the engine give them before temperature, penalties and top-p"
        )


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
