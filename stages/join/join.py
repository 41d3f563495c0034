"""Join a cache with the student's tokenizer: `pipe check`, and the first step of stage two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER, read_manifest
from teacher_cache.cache.plan import LABELED
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.codecs.named import open_codec, plain_temperature
from teacher_cache.stages.config import refuse_foreign_options
from teacher_cache.stages.join.aligned_sample import NUM_SAMPLES, Coverage, measure
from teacher_cache.stages.join.alignment import Alignment, align
from teacher_cache.stages.join.compare import check, with_chat_template
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.report import ID_TABLE, JoinReport, verified_line, ways_out
from teacher_cache.stages.join.teacher_folder import read_tokenization
from teacher_cache.stages.tasks import task_named
from teacher_cache.stages.tokens.chat_template import ChatRecord
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import recorded_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizationMismatch(CheckFailed):
    """The student would read the cached ids as other tokens; carries the report."""

    def __init__(self, cache: Path, report: JoinReport, more_ways: Sequence[str] = ()):
        names = ", ".join(difference.name for difference in report.differences)
        ways = "; or ".join([*ways_out(report), *more_ways])
        super().__init__(f"the student's tokenization is not that of {cache} ({names}): {ways}")
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The student's side of the join.

    Attributes:
        report: what was compared; its differences, if any, were let pass.
        tokenizer: the student's.
        max_length: tokens at which the student truncates.
        alignment: how a language model's cached ids become the student's; None of a classifier.
        coverage: how much of the teacher that reaches; None where ids and positions stay.
        chat: how the cached conversations are read, by the tokenizer's template; None of texts.
    """

    report: JoinReport
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    alignment: Alignment | None = None
    coverage: Coverage | None = None
    chat: ChatRecord | None = None


def joined_line(joined: Joined) -> str | None:
    """One line on what was verified or aligned; None where differences were let pass."""
    if not joined.report.verified:
        return None
    alignment = joined.alignment
    if alignment is None or alignment.kind == "same":
        return verified_line(joined.report)
    if not alignment.rereads:
        assert alignment.relation is not None, "it was compared"
        return f"✓ aligned by {alignment.kind}: {alignment.relation.overlap}"
    found = [] if alignment.captured is not None else [alignment.relation_of_bytes.overlap]
    found += [] if joined.coverage is None else [joined.coverage.words]
    return f"✓ aligned by {alignment.kind}: {'; '.join([*found, *alignment.caveats])}"


def join(cache: Path, config: JoinConfig, *, longest_sample: int) -> Joined:
    """Compare the cache's tokenization with the student's, and align them where that was asked for.

    Args:
        cache: the cache's folder.
        config: the student's tokenizer, how its ids are aligned and how strict to be.
        longest_sample: tokens of the longest cached sample.

    Raises:
        TokenizationMismatch: if they differ and the configuration does not let that pass.
        CheckFailed: if an alignment is asked for that the ids' meanings do not allow.
        UserError: if the student's tokenizer cannot be loaded, or a classifier's cache be aligned.
    """
    manifest = read_manifest(cache)
    task = task_named(manifest.settings["task"], cache)
    refuse_foreign_options(config, task=manifest.settings["task"])
    folder = cache / TEACHER_FOLDER
    cached = read_tokenization(folder)
    own = str(folder.resolve())
    tokenizer = load_tokenizer(config.student_tokenizer or own, option="--student-tokenizer")
    report = check(cached, tokenizer, config=config, longest_sample=longest_sample)
    chat = ChatRecord.read(folder)
    if chat is not None:
        report = with_chat_template(report, chat, tokenizer)
    alignment = None
    if task.predicts_tokens:
        teacher = tokenizer
        if config.student_tokenizer is not None:
            teacher = load_tokenizer(own, option="--cache")
        alignment, report = align(
            mode=config.align,
            captured=recorded_map(cache, manifest),
            tables=(cached.table, teacher),
            student=tokenizer,
            report=report,
        )
        if chat is not None and alignment.rereads:
            raise UserError(
                f"{cache} holds conversations, whose control tokens another tokenizer does not "
                "read: use the cache's own tokenizer (drop --student-tokenizer and --align)"
            )
    if not report.accepted(config.on_mismatch):
        is_table = any(one.name == ID_TABLE for one in report.differences)
        more = _aligned_ways(cache, alignment) if alignment and is_table else []
        raise TokenizationMismatch(cache, report, more)
    if chat is not None and config.student_tokenizer is not None:
        # What it has learned to answer is the cache's.
        tokenizer.chat_template = load_tokenizer(own, option="--cache").chat_template
    return Joined(
        report=report,
        tokenizer=tokenizer,
        max_length=config.max_length or cached.record.max_length,
        alignment=alignment,
        coverage=None
        if alignment is None or not alignment.rereads
        else _measured(cache, alignment),
        chat=chat,
    )


def _aligned_ways(cache: Path, alignment: Alignment) -> list[str]:
    """What else a language model's cache can do for this student, with what it would come to."""
    mapped = replace(alignment, kind="map")
    try:
        found = f"{mapped.relation_of_bytes.overlap}; {_measured(cache, mapped).words}"
    except UserError as error:  # a tokenizer whose bytes are not known
        return [f"(--align cannot help: {error})"]
    return [f"train on the text read again, with --align map, spans or projection ({found})"]


def _measured(cache: Path, alignment: Alignment) -> Coverage:
    """The coverage on the first samples."""
    reader = CacheReader(cache, LABELED)
    codec = open_codec(reader)
    return measure(
        [reader.sample(idx) for idx in range(min(NUM_SAMPLES, len(reader)))],
        codec,
        alignment.aligner,
        alignment.head_ids,
        temperature=plain_temperature(codec),
    )
