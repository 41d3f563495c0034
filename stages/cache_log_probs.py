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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest, SplitSummary, utc_now
from teacher_cache.cache.plan import LABELED, UNLABELED, ShardPlan
from teacher_cache.cache.schema import Fields, language_model_schema
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.codecs.capture import packed_fields
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import pack_tokens, packing_settings, with_learned
from teacher_cache.stages.data.survey import CorpusReport
from teacher_cache.stages.data.tokenization import token_ids, tokenize
from teacher_cache.stages.engine_answers import (
    Answer,
    AnswerFile,
    LogProbFile,
    TopLogProbs,
    open_answers,
)
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.llama_cpp_logits import GgufModel, SavedLogits
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.tokens.tokenizers import load_tokenizer

__all__ = ["Engine", "LogProbFile", "cache_log_probs", "listed_positions"]

SUM_TOLERANCE = 1e-3  # of a head's mass above 1
RESOLUTION = 1e-5  # of a tail's mass; what is smaller, rounding made
EQUAL_SHARE = 0.5  # of positions; in float32 there are next to none, in bfloat16 next to all


@dataclass(frozen=True, kw_only=True)
class ListedPositions:
    """What lists say of a document's N positions.

    Attributes:
        reduced: of the N positions; where some are not scored, of those that are.
        num_positions: of which something is said.
        largest_sum: of a position's head, 1 at most but for rounding.
        num_below_resolution: positions whose tail is so small that rounding may have made it.
        num_equal: positions with two tokens of one log-prob, of which half precision makes many.
    """

    reduced: ReducedTopK
    num_positions: int
    largest_sum: float
    num_below_resolution: int
    num_equal: int


def listed_positions(
    codec: TopKCodec,
    token_ids: np.ndarray,
    lists: Sequence[TopLogProbs | None],
    *,
    used: np.ndarray,
    where: str,
    is_scored: np.ndarray | None = None,
) -> ListedPositions:
    """Heads and tails of a document's positions; the last one, after which nothing comes, is blank.

    Args:
        codec: with 1 as its only temperature and whole heads.
        token_ids: [N].
        lists: [N], of each token given those before it; the first is not read.
        used: [V] bool, the ids of the support.
        where: the document is called in a message.
        is_scored: [N], the tokens that have a list, which may be short; None: all but the first.

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
    is_known = np.arange(num) < num - 1
    if is_scored is not None:
        is_known[:-1] &= is_scored[1:]
    num_equal, num_kept = 0, np.full(num, k)
    for place in np.flatnonzero(is_known).tolist():
        at = f"{where}, token {place + 1}"
        found, listed = _sorted(
            lists[place + 1], used, at, num_expected=k if is_scored is None else 1
        )
        num_equal += bool((np.diff(listed) == 0).any())
        real = int(token_ids[place + 1])
        if real not in found:
            raise UserError(
                f"{at}: the list lacks the real token {real}, whose log-prob every cache keeps: "
                "ask the engine for the prompt's own log-probs beside the most probable ones"
            )
        num_kept[place] = kept = min(k, len(found))
        ids[place], log_probs[place, :kept] = _filled(found, k), listed[:kept]
        next_log_prob[place] = listed[np.flatnonzero(found == real)[0]]
    outside = is_known & ~(ids == np.append(token_ids[1:], -1)[:, None]).any(axis=1)
    sums = np.exp(log_probs).sum(axis=1)
    least = log_probs[np.arange(num), num_kept - 1]
    most_left = (codec.support_size - num_kept) * np.exp(least)
    _refuse_sums(np.where(is_known, sums, 1.0), np.where(is_known, most_left, 1.0), where)
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
        )[slice(None) if is_scored is None else is_known],
        num_positions=int(is_known.sum()),
        largest_sum=float(sums[is_known].max(initial=0.0)),
        num_below_resolution=int((is_known & (tail < RESOLUTION)).sum()),
        num_equal=num_equal,
    )


def _filled(ids: np.ndarray, k: int) -> np.ndarray:
    """The first K ids; where there are fewer, the lowest others behind them."""
    if len(ids) >= k:
        return ids[:k]
    others = np.setdiff1d(np.arange(k), ids)
    return np.concatenate([ids, others[: k - len(ids)]])


def _sorted(
    listed: TopLogProbs | None, used: np.ndarray, at: str, *, num_expected: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs, descending, ties to the lower id."""
    num = 0 if listed is None else len(listed)
    if listed is None or num < num_expected:
        raise UserError(
            f"{at}: the list has {num} tokens, expected at least {num_expected}: ask the engine "
            "for more, or cache fewer (--top-k)"
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
    if is_bad.any():
        raise UserError(
            f"{at}: {log_probs[np.argmax(is_bad)]:g} is no log-prob: expected numbers up to 0"
        )
    if np.isneginf(log_probs).any():
        raise UserError(
            f"{at}: the token {ids[np.argmin(log_probs)]} has no probability at all (-inf or "
            "-9999), which a sampler's mask gives and no model: have the engine give log-probs "
            "before top-k, top-p and penalties"
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


def run(
    cache: Path,
    answers: Path,
    *,
    tokenizer: str,
    engine: str | None,
    model: str | None,
    revision: str | None,
    dtype: str | None,
    gguf: Path | None,
    second_pass: Path | None,
    unlabeled: Path | None,
    top_k: int,
    max_length: int,
    shard_documents: int,
    overwrite: bool,
) -> Manifest:
    """`pipe import-log-probs`: open what was given, and `cache_log_probs` with it.

    Raises:
        UserError: for files or options that do not belong together, and as `cache_log_probs`.
    """
    loaded = load_tokenizer(tokenizer, option="--tokenizer")
    given = {"--engine": engine, "--model": model, "--dtype": dtype}
    if gguf is None:
        if second_pass is not None:
            raise UserError(
                "--second-pass is of logits that llama.cpp saved: name their model with --gguf, or "
                "leave it out"
            )
        missing = [flag for flag, value in given.items() if value is None]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, which "
                "nothing in the answers tells and the cache keeps: say what ran"
            )
        file: AnswerFile = open_answers(answers)
        others = None if unlabeled is None else open_answers(unlabeled)
        speaker = Engine(name=str(engine), model=str(model), revision=revision, dtype=str(dtype))
    else:
        foreign = [
            flag
            for flag, value in {**given, "--revision": revision, "--unlabeled": unlabeled}.items()
            if value is not None
        ]
        if foreign:
            raise UserError(f"{foreign[0]} is of answers, and --gguf says what ran: leave it out")
        spoken = GgufModel.of(gguf)
        _require_same_tokens(loaded, spoken, gguf)
        saved = SavedLogits(answers, spoken, num_listed=top_k, second_pass=second_pass)
        max_length = max(max_length, saved.window)
        file, others = saved, None
        speaker = Engine(
            name="llama.cpp", model=gguf.name, revision=spoken.sha256,
            dtype=f"gguf file type {spoken.file_type}",
        )  # fmt: skip
    return cache_log_probs(
        cache, file, tokenizer=loaded, engine=speaker, top_k=top_k, max_length=max_length,
        unlabeled=others, shard_documents=shard_documents, overwrite=overwrite,
    )  # fmt: skip


def _require_same_tokens(tokenizer: PreTrainedTokenizerBase, model: GgufModel, where: Path) -> None:
    """Every id of the tokenizer must be spelt alike in the GGUF."""
    for token, token_id in tokenizer.get_vocab().items():
        theirs = model.tokens[token_id] if token_id < len(model.tokens) else None
        if theirs != token:
            raise UserError(
                f"the id {token_id} is {token!r} to the tokenizer and {theirs!r} in {where}: give "
                "the tokenizer of the model that the GGUF was made from"
            )


def cache_log_probs(
    cache: Path,
    file: AnswerFile,
    *,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    top_k: int,
    max_length: int = 512,
    unlabeled: AnswerFile | None = None,
    shard_documents: int = 1024,
    overwrite: bool = False,
) -> Manifest:
    """Write the cache; killed and called again, it goes on from the shards that it has committed.

    The answers are read twice: first all of them, so that what is wrong with one is said before
    anything is written, then a shard at a time.

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
    checked = {split: source.checked(split, plan) for split, plan in plans.items()}
    manifest = _manifest(source, engine, plans, checked)
    with CacheWriter(cache, manifest, plans, overwrite=overwrite) as writer:
        for split, shard_idx in writer.begin(lambda folder: _write_teacher(folder, source, plans)):
            fields, facts = source.shard(split, *plans[split].documents(shard_idx))
            writer.commit(split, shard_idx, fields, num_truncated=0, environment=facts)
        return writer.manifest if writer.manifest.complete else writer.finish()


@dataclass(frozen=True)
class _Read:
    """A document, what an engine said of it, and what that means."""

    document: Document
    answer: Answer
    listed: ListedPositions


@dataclass(frozen=True)
class _Source:
    """Answers, and what they mean."""

    files: dict[str, AnswerFile]
    tokenizer: PreTrainedTokenizerBase
    support: Support
    codec: TopKCodec
    max_length: int

    @property
    def at_counted(self) -> bool:
        """Whether what was not scored takes no room in a sample."""
        return any(file.scores_some for file in self.files.values())

    def documents(self, split: str, start: int, stop: int) -> list[tuple[Document, Answer]]:
        """Documents with their answers, whose tokens are those of their text.

        Raises:
            UserError: if they are not, or are too many, or none.
        """
        file = self.files[split]
        answers = file.answers(start, stop)
        texts = [self._spelt(one) if one.text is None else one.text for one in answers]
        made = token_ids(texts, self.tokenizer, max_length=None)
        found = []
        rows = enumerate(zip(answers, texts, made, strict=True), start)
        for idx, (answer, text, ids) in rows:
            self._check(file.name_of(idx), answer, ids)
            document = Document(text=text, source=file.sha256, split=split, position=idx)
            found.append((document, answer))
        return found

    def checked(self, split: str, plan: ShardPlan) -> Counter[str]:
        """Read all answers of a split; warn of what they show of the engine.

        Returns:
            What was counted, for the manifest.

        Raises:
            UserError: for the first one that is not as expected.
        """
        counts, texts = Counter[str](), set[str]()
        end_id = self.tokenizer.eos_token_id
        for shard_idx in range(len(plan)):
            for one in self._read(split, *plan.documents(shard_idx)):
                counts["num_documents"] += 1
                counts["num_duplicates"] += one.document.text in texts
                texts.add(one.document.text)
                is_whole = one.answer.text is not None
                counts["num_left_out"] += one.answer.num_left_out
                counts["num_without_end"] += is_whole and one.answer.token_ids[-1] != end_id
                counts.update(_counted(one.listed))
        self._warn(split, counts)
        return counts

    def shard(self, split: str, start: int, stop: int) -> tuple[Fields, dict[str, Any]]:
        """A shard's fields, and what its sidecar says of the lists."""
        read = list(self._read(split, start, stop))
        tokens = [
            (one.document.sample_id, np.asarray(one.answer.token_ids, np.uint32)) for one in read
        ]
        counts = sum((_counted(one.listed) for one in read), Counter[str]())
        facts = {
            "num_positions": counts["num_positions"],
            "num_tails_below_resolution": counts["num_tails_below_resolution"],
            "num_equal": counts["num_equal"],
            "largest_sum": max(one.listed.largest_sum for one in read),
        }
        samples = pack_tokens(tokens, max_length=self.max_length)
        if self.at_counted:
            samples = with_learned(samples, [_is_scored(one.answer) for one in read])
        # No document is longer than a sample, so each stands whole in one, in their order.
        in_order = iter(read)
        pieces = [[next(in_order).listed.reduced for _ in sample.pieces] for sample in samples]
        return packed_fields(self.codec, samples, pieces, at_counted=self.at_counted), facts

    def _read(self, split: str, start: int, stop: int) -> Iterator[_Read]:
        used = np.ones(self.support.size, bool)
        used[list(self.support.unused)] = False
        for idx, (document, answer) in enumerate(self.documents(split, start, stop), start):
            listed = listed_positions(
                self.codec,
                np.asarray(answer.token_ids, np.uint32),
                answer.lists,
                used=used,
                where=self.files[split].name_of(idx),
                is_scored=_is_scored(answer) if self.at_counted else None,
            )
            yield _Read(document, answer, listed)

    def _spelt(self, answer: Answer) -> str:
        """What the tokens of a part of a text spell."""
        return str(self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True))

    def _warn(self, split: str, counts: Counter[str]) -> None:
        path, num = self.files[split].path, counts["num_positions"]
        if num and counts["num_tails_below_resolution"] == num:
            logger.warning(
                "%s: every list holds all the mass; if the engine renormalised what it left (a "
                "top-k or top-p of its own), what students learn is wrong",
                path,
            )
        if counts["num_equal"] > EQUAL_SHARE * num:
            logger.warning(
                "%s: at %s of %s positions two tokens have the very same log-prob, as half "
                "precision makes them: students learn its rounding, so run the engine in float32",
                path,
                f"{counts['num_equal']:,}",
                f"{num:,}",
            )
        if counts["num_left_out"]:
            logger.info(
                "%s: %s tokens are left out, whose log-prob lies under what the file can tell",
                path,
                f"{counts['num_left_out']:,}",
            )
        if counts["num_without_end"]:
            logger.warning(
                "%s: %s of %s documents do not end with the end of text, so no student learns to "
                "end there: give the engine the ids with %r behind them",
                path,
                f"{counts['num_without_end']:,}",
                f"{counts['num_documents']:,}",
                self.tokenizer.eos_token,
            )

    def _check(self, where: str, answer: Answer, ids: list[int]) -> None:
        found = [int(one) for one in answer.token_ids]
        if not found or len(found) > self.max_length:
            raise UserError(
                f"{where} has {len(found)} tokens, expected 1 to {self.max_length}: raise "
                "max_length, or have the engine read it in pieces"
            )
        if len(answer.lists) != len(found):
            raise UserError(
                f"{where} has {len(answer.lists)} lists for {len(found)} tokens: expected one a "
                "token, the first without entries"
            )
        if answer.text is not None and found not in (ids, [*ids, self.tokenizer.eos_token_id]):
            raise UserError(
                f"{where} has other tokens than the tokenizer makes of its text "
                f"({found[:5]}... and {ids[:5]}...): give the tokenizer that the engine used, and "
                "the text as it was read"
            )


def _is_scored(answer: Answer) -> np.ndarray:
    if answer.is_scored is not None:
        return answer.is_scored
    return np.arange(len(answer.token_ids)) > 0


def _counted(listed: ListedPositions) -> Counter[str]:
    return Counter(
        num_positions=listed.num_positions,
        num_tails_below_resolution=listed.num_below_resolution,
        num_equal=listed.num_equal,
    )


def _manifest(
    source: _Source,
    engine: Engine,
    plans: dict[str, ShardPlan],
    checked: dict[str, Counter[str]],
) -> Manifest:
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
        schema=language_model_schema(
            source.codec.fields, is_packed=True, at_counted=source.at_counted
        ),
        splits={
            split: SplitSummary(
                num_documents=plan.num_documents,
                num_shards=len(plan),
                report=CorpusReport(
                    num_documents=plan.num_documents,
                    num_empty=0,
                    num_duplicates=checked[split]["num_duplicates"],
                ).model_dump(),
            )
            for split, plan in plans.items()
        },
        about={
            "teacher": engine.model,
            "engine": asdict(engine),
            "answers": {split: dict(counts) for split, counts in checked.items()},
        },
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
        # A part of a longer text may begin or end inside what the tokenizer would join.
        own = {document.sample_id: list(answer.token_ids) for document, answer in found}
        samples = [
            one
            for one in samples
            if not source.at_counted or list(one.input_ids) == own[one.sample_id]
        ]
        kept = [by_id[sample.sample_id] for sample in samples]
        probe.extend(choose_probe(kept, samples, num=NUM_PROBED // len(plans)))
    write_tokenization(folder, source.tokenizer, max_length=source.max_length, probe=probe)
