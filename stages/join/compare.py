"""The join: do the cached token ids mean to the student what they meant to the teacher?

Decided once, before training, by comparing the cache's record of its tokenization with the
student's tokenizer. Ids are compared before the student's `position_map`, which is checked for
itself: it moves ids, and may append one, but changes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.tokenization import tokenize
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.report import ID_TABLE, Difference, JoinReport
from teacher_cache.stages.join.teacher_folder import CachedTokenization, ProbeDocument
from teacher_cache.stages.tokens.chat_template import ChatRecord, Untold
from teacher_cache.stages.tokens.record import TokenizationRecord, describe, id_to_string
from teacher_cache.stages.tokens.relation import TableComparison, compare_tables, string_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TEXT_SHOWN = 24  # characters of a conversation where two templates part


class PositionMapLike(Protocol):
    """The part of the student's `PositionMap` that the join needs."""

    def check(self, length: int) -> None:
        """Raise ValueError unless it is a permutation plus at most one appended token."""
        ...


def check(
    cached: CachedTokenization,
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    config: JoinConfig,
    longest_sample: int,
) -> JoinReport:
    """`compare`, with the student's maximum length taken from the config or else from the cache."""
    return compare(
        cached.record,
        cached.table,
        cached.probe,
        student_tokenizer,
        student_max_length=config.max_length or cached.record.max_length,
        longest_sample=longest_sample,
    )


def compare(
    cached: TokenizationRecord,
    cached_table: list[str | None],
    probe: Sequence[ProbeDocument],
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    student_max_length: int,
    longest_sample: int,
) -> JoinReport:
    """Compare all that decides which ids a text becomes, and then the ids of real documents.

    Args:
        cached: how the cached ids were made.
        cached_table: the string of every id, then.
        probe: cached documents with their text.
        student_tokenizer: what the student will use.
        student_max_length: tokens at which the student truncates.
        longest_sample: tokens of the longest cached sample.

    Raises:
        UserError: if `student_max_length` leaves no room for text beside the special tokens.
    """
    pairs = cached.pair_form is not None
    student = describe(student_tokenizer, max_length=student_max_length, pairs=pairs)
    student_table = id_to_string(student_tokenizer)
    tables = compare_tables(cached_table, student_table)
    found = [
        *_file_differences(cached, student),
        *_table_differences(cached, student, tables),
        *_special_token_differences(cached, student),
        *_length_differences(cached, student, longest_sample),
        *_side_differences(cached, student),
        *_pair_differences(cached, student),
        *_probe_differences(probe, cached_table, student_tokenizer, student_table, student),
    ]
    return JoinReport(
        compared=(
            "tokenizer files",
            f"{cached.vocab_size:,} ids",
            f"{len(cached.special_tokens)} special tokens",
            "normaliser",
            f"max length {student_max_length:,} (longest cached sample {longest_sample:,})",
            "truncation and padding side",
            *(("form of a pair",) if pairs else ()),
            f"{len(probe)} documents re-tokenised",
        ),
        differences=tuple(found),
    )


def with_chat_template(
    report: JoinReport, chat: ChatRecord, tokenizer: PreTrainedTokenizerBase
) -> JoinReport:
    """The same with the chat templates compared: by their hashes, and by a cached conversation.

    A tokenizer without a template has none that differs; it gets the cache's.

    Args:
        report: of `compare`.
        chat: of the cache.
        tokenizer: the student's.
    """
    compared = (*report.compared, "chat template")
    if not tokenizer.chat_template:
        return replace(report, compared=compared)
    theirs = chat.template(tokenizer)
    try:
        text = theirs.render(chat.messages, tools=chat.tools)
    except Untold as error:
        text = f"nothing: {error}"
    if theirs.sha256 == chat.template_sha256 or text == chat.text:
        return replace(report, compared=compared)
    at = next((i for i, (a, b) in enumerate(zip(text, chat.text, strict=False)) if a != b), 0)
    found = Difference(
        name="chat template",
        cache=f"sha256 {chat.template_sha256[:12]}; {chat.text[at : at + _TEXT_SHOWN]!r}",
        student=f"sha256 {theirs.sha256[:12]}; {text[at : at + _TEXT_SHOWN]!r}",
        waivable=True,
    )
    return JoinReport(compared=compared, differences=(*report.differences, found))


def check_position_map(position_map: PositionMapLike, lengths: Iterable[int]) -> None:
    """Check the student's re-ordering at every length that occurs.

    Args:
        position_map: of the student.
        lengths: of the cached samples, tokens; repetitions are checked once.

    Raises:
        CheckFailed: if at some length it is more than a permutation plus one appended token.
    """
    for length in sorted(set(lengths)):
        try:
            position_map.check(length)
        except ValueError as error:
            raise CheckFailed(
                f"the student reorders samples of {length} tokens in a way that loses or doubles "
                f"some ({error}): use another --pooling"
            ) from error


def _file_differences(
    cached: TokenizationRecord, student: TokenizationRecord
) -> Iterable[Difference]:
    if cached.files_sha256 != student.files_sha256:
        names = sorted(cached.sections.keys() | student.sections.keys())
        parts = [name for name in names if cached.sections.get(name) != student.sections.get(name)]
        yield Difference(
            name="tokenizer files",
            cache=f"{cached.tokenizer_class}, sha256 {cached.files_sha256[:12]}",
            student=f"{student.tokenizer_class}, sha256 {student.files_sha256[:12]}; "
            f"other {', '.join(parts)}",
            waivable=True,
        )
    if cached.normalizer != student.normalizer:
        yield Difference(
            name="normaliser", cache=cached.normalizer, student=student.normalizer, waivable=True
        )


def _table_differences(
    cached: TokenizationRecord, student: TokenizationRecord, tables: TableComparison[str]
) -> Iterable[Difference]:
    if not tables.num_differing:
        return
    first = tables.first_differing_id
    yield Difference(
        name=ID_TABLE,
        cache=f"{cached.vocab_size:,} ids; id {first} is {_quoted(tables.cache_string)}",
        student=f"{student.vocab_size:,} ids; id {first} is {_quoted(tables.student_string)}; "
        f"{tables.num_differing:,} ids differ, {tables.num_shared:,} strings are shared",
        waivable=False,
    )


def _special_token_differences(
    cached: TokenizationRecord, student: TokenizationRecord
) -> Iterable[Difference]:
    """Roles whose token differs.

    A padding token that only one side names is no difference: padding is not cached, and a padding
    token with an id of its own shows in the table.
    """
    for role in sorted(cached.special_tokens.keys() | student.special_tokens.keys()):
        ours, theirs = cached.special_tokens.get(role), student.special_tokens.get(role)
        if ours == theirs or (role == "pad_token" and None in (ours, theirs)):
            continue
        yield Difference(
            name=f"special token {role}", cache=_token(ours), student=_token(theirs), waivable=False
        )


def _length_differences(
    cached: TokenizationRecord, student: TokenizationRecord, longest_sample: int
) -> Iterable[Difference]:
    """Lengths under which a cached sample would come out otherwise.

    A shorter limit matters where it cuts a cached sample; a longer one where the cache's own may
    have cut one, that is where a sample is as long as the cache allowed.
    """
    was_cut = longest_sample >= cached.max_length
    if student.max_length < longest_sample or (was_cut and student.max_length > cached.max_length):
        yield Difference(
            name="max length",
            cache=f"{cached.max_length:,} tokens, the longest sample has {longest_sample:,}",
            student=f"{student.max_length:,} tokens",
            waivable=True,
        )
    limit = student.model_max_length
    if limit != cached.model_max_length and limit is not None and limit < longest_sample:
        yield Difference(
            name="tokenizer's model_max_length",
            cache=f"{cached.model_max_length or 'no limit'}, the longest sample has "
            f"{longest_sample:,} tokens",
            student=f"{limit:,} tokens",
            waivable=True,
        )


def _side_differences(
    cached: TokenizationRecord, student: TokenizationRecord
) -> Iterable[Difference]:
    for name, ours, theirs in (
        ("truncation side", cached.truncation_side, student.truncation_side),
        ("padding side", cached.padding_side, student.padding_side),
    ):
        if ours != theirs:
            yield Difference(name=name, cache=ours, student=theirs, waivable=True)


def _pair_differences(
    cached: TokenizationRecord, student: TokenizationRecord
) -> Iterable[Difference]:
    """What stands around and between two texts; where the ids mean the same, it can be let pass."""
    if cached.pair_form is not None and cached.pair_form != student.pair_form:
        yield Difference(
            name="form of a pair",
            cache=cached.pair_form,
            student=student.pair_form or "none",
            waivable=cached.id_to_string_sha256 == student.id_to_string_sha256,
        )


def _probe_differences(
    probe: Sequence[ProbeDocument],
    cached_table: list[str | None],
    student_tokenizer: PreTrainedTokenizerBase,
    student_table: list[str | None],
    student: TokenizationRecord,
) -> Iterable[Difference]:
    """Documents whose ids differ when tokenized again.

    Waivable where the tables are equal: then every cached id means the same string to both, and
    the documents differ because of the files, normaliser, length or side, which are waivable
    themselves.
    """
    documents = [
        Document(
            text=document.text,
            second=document.second,
            source="probe",
            split="probe",
            position=position,
        )
        for position, document in enumerate(probe)
    ]
    samples = tokenize(documents, student_tokenizer, max_length=student.max_length)
    ids_of = {sample.sample_id: sample.input_ids.tolist() for sample in samples}
    # A document of which the student's tokenizer leaves nothing is no sample.
    again = [ids_of.get(document.sample_id, []) for document in documents]
    differing = [
        (document, ids)
        for document, ids in zip(probe, again, strict=True)
        if list(document.input_ids) != ids
    ]
    if not differing:
        return
    document, ids = differing[0]
    position, ours, theirs = _first_difference(document.input_ids, ids)
    yield Difference(
        name="documents re-tokenised",
        cache=f"sample {document.sample_id[:12]}, position {position}: "
        f"{string_at(cached_table, ours)}",
        student=f"{string_at(student_table, theirs)}; {len(differing)} of {len(probe)} documents "
        "differ",
        waivable=cached_table == student_table,
    )


def _first_difference(
    ours: Sequence[int], theirs: Sequence[int]
) -> tuple[int, int | None, int | None]:
    """First position at which two unequal sequences part, and the id of each, None at an end."""
    shorter = min(len(ours), len(theirs))
    position = next((idx for idx in range(shorter) if ours[idx] != theirs[idx]), shorter)
    return (
        position,
        ours[position] if position < len(ours) else None,
        theirs[position] if position < len(theirs) else None,
    )


def _quoted(string: str | None) -> str:
    return "nothing" if string is None else repr(string)


def _token(token: tuple[str, int | None] | None) -> str:
    return "none" if token is None else f"{token[0]!r}, id {token[1]}"
