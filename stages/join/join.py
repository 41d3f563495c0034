"""Join a cache with the student's tokenizer: `pipe check`, and the first step of stage two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.manifest import TEACHER_FOLDER
from teacher_cache.stages.join.compare import check
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.report import JoinReport, ways_out
from teacher_cache.stages.join.teacher_folder import read_tokenization
from teacher_cache.stages.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizationMismatch(CheckFailed):
    """The student would read the cached ids as other tokens; carries the report."""

    def __init__(self, cache: Path, report: JoinReport):
        names = ", ".join(difference.name for difference in report.differences)
        ways = "; or ".join(ways_out(report))
        super().__init__(f"the student's tokenization is not that of {cache} ({names}): {ways}")
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The student's side of the join.

    Attributes:
        report: what was compared; its differences, if any, were let pass.
        tokenizer: the student's.
        max_length: tokens at which the student truncates.
    """

    report: JoinReport
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def join(cache: Path, config: JoinConfig, *, longest_sample: int) -> Joined:
    """Compare the cache's tokenization with the student's.

    Args:
        cache: the cache's folder.
        config: the student's tokenizer and how strict to be.
        longest_sample: tokens of the longest cached sample.

    Raises:
        TokenizationMismatch: if they differ and the configuration does not let that pass.
        UserError: if the student's tokenizer cannot be loaded.
    """
    folder = cache / TEACHER_FOLDER
    cached = read_tokenization(folder)
    tokenizer = load_tokenizer(
        config.student_tokenizer or str(folder.resolve()), option="--student-tokenizer"
    )
    report = check(cached, tokenizer, config=config, longest_sample=longest_sample)
    if not report.accepted(config.on_mismatch):
        raise TokenizationMismatch(cache, report)
    return Joined(
        report=report,
        tokenizer=tokenizer,
        max_length=config.max_length or cached.record.max_length,
    )
