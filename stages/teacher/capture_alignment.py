"""From `--student-tokenizer` and `--align` to the support of a language model's cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.stages.codecs.config import DEFAULT_CODEC
from teacher_cache.stages.codecs.named import chosen_room, given_attributes
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.teacher.config import CaptureConfig
from teacher_cache.stages.teacher.load import LanguageModelTeacher
from teacher_cache.stages.teacher.options import NO_ALIGNMENT
from teacher_cache.stages.tokens.record import id_to_string
from teacher_cache.stages.tokens.relation import VocabularyRelation, relate
from teacher_cache.stages.tokens.support import AnySupport, CutSupport, MappedSupport, Support
from teacher_cache.stages.tokens.token_bytes import TokenBytes
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap, exact_map

WAYS_OUT = (
    "use --align map (exact byte strings), or --align none, which leaves the alignment to "
    "train-student, or a student of the teacher's tokenizer"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptureAlignment:
    """Over whose ids a cache is.

    Attributes:
        support: of the cache.
        about: what the manifest says of the student's tokenizer; empty where none was named.
    """

    support: AnySupport
    about: dict[str, Any]


def aligned(
    config: CaptureConfig, teacher: LanguageModelTeacher, support: Support
) -> CaptureAlignment:
    """Bring the teacher's support to the ids that the options ask for.

    Where a student's tokenizer is named, the log says how its ids relate to the teacher's.

    Args:
        config: that `check_options` let pass.
        teacher: the model, with its tokenizer.
        support: the ids that it uses.

    Raises:
        UserError: if the student's tokenizer cannot be loaded or is of no known kind, or a head
            would leave no outcome for what no student id means.
        CheckFailed: if `truncate` is asked for where equal ids mean different strings.
    """
    name = config.aligned.student_tokenizer
    if name is None:
        return CaptureAlignment(support=support, about={})
    student_tokenizer = load_tokenizer(
        name,
        option="--student-tokenizer",
        trust_remote_code=config.forward.trust_remote_code,
    )
    readers = Reader.of(teacher.tokenizer), Reader.of(student_tokenizer)
    own, student = (one.table for one in readers)
    relation = relate(
        _of_support(own, support),
        student.keys,
        teacher_rows=max(teacher.num_logits, support.size),
    )
    logger.info("student tokenizer %s: %s", name, relation.overlap)
    for side, one in zip(("teacher", "student"), readers, strict=True):
        if one.caveat:
            logger.warning("%s's tokenizer: %s", side, one.caveat)
    about: dict[str, Any] = {
        "student_tokenizer": name,
        "vocabularies": _facts(relation),
    }
    align = config.aligned.align or NO_ALIGNMENT
    if align == NO_ALIGNMENT:
        return CaptureAlignment(support=support, about=about)
    if align == "truncate":
        strings = relate(
            id_to_string(teacher.tokenizer)[: support.size], id_to_string(student_tokenizer)
        )
        if not strings.is_cut:
            strings.require_same_ids("--align truncate", counted=relation, ways_out=WAYS_OUT)
        return CaptureAlignment(
            support=CutSupport.by(_same_ids(own, student, support)), about=about
        )
    ends = teacher.tokenizer.eos_token_id, student_tokenizer.eos_token_id
    mapped = MappedSupport(teacher=support, vocabulary_map=exact_map(own, student, ends=ends))
    num_teacher = support.size - len(support.unused)
    num_mapped = int((mapped.student_ids >= 0).sum())
    logger.info(
        "mapped by exact byte strings: %s of the teacher's %s ids to %s of the student's; the "
        "mass of the others is kept as one outcome",
        f"{num_mapped:,}",
        f"{num_teacher:,}",
        f"{mapped.num_reached:,}",
    )
    chosen_room(config.kept).check_mapped(
        given_attributes(config.kept, config.kept.codec or DEFAULT_CODEC),
        num_reached=mapped.num_reached,
        num_student=relation.num_student,
    )
    about["vocabularies"] |= {"num_mapped": num_mapped, "num_reached": mapped.num_reached}
    return CaptureAlignment(support=mapped, about=about)


def _of_support(own: TokenBytes, support: Support) -> list[bytes | None]:
    """What the ids mean that the teacher has rows for."""
    return own.keys[: support.size]


def _same_ids(own: TokenBytes, student: TokenBytes, support: Support) -> VocabularyMap:
    """Each used id to itself."""
    ids = np.full(len(own), -1, np.int64)
    same = np.arange(min(support.size, len(student)))
    used = ~np.isin(same, np.array(support.unused, np.int64))
    ids[same[used]] = same[used]
    return VocabularyMap(
        student_ids=ids,
        num_student_ids=len(student),
        teacher_sha256=own.sha256,
        student_sha256=student.sha256,
    )


def _facts(relation: VocabularyRelation) -> dict[str, Any]:
    """Of two vocabularies, for the manifest."""
    return {
        "relation": relation.kind,
        "num_teacher": relation.num_teacher,
        "num_student": relation.num_student,
        "num_same_id": relation.num_same_id,
        "num_shared": relation.num_shared,
        "num_below_cut": relation.num_below_cut,
        "num_differing_below_cut": relation.num_differing_below_cut,
    }
