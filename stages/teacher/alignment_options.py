"""What `--align` may stand with; importable without torch, so that it is refused early."""

from __future__ import annotations

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.teacher.config import AlignmentConfig, ShardConfig

NO_ALIGNMENT = "none"
WHOLE = ("hidden", "dense")  # codecs that lose no id: what they hold can be mapped at any time


def check_alignment(config: ShardConfig) -> None:
    """Refuse what the task or the codec has no use for, before anything is loaded.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    for name in AlignmentConfig.model_fields:
        if config.task == "classification" and getattr(config, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of language models, and this run caches a "
                "classifier: leave it out, or give --task lm"
            )
    align = config.align or NO_ALIGNMENT
    if align != NO_ALIGNMENT and config.student_tokenizer is None:
        raise UserError(
            f"--align {align} needs the ids that it aligns to: give --student-tokenizer, the "
            "student's tokenizer"
        )
    if align == "map" and config.codec in WHOLE:
        raise UserError(
            f"--align map is of --codec topk and sampled, which keep a part of what they map; "
            f"--codec {config.codec} keeps the teacher's whole distribution, which loses nothing "
            "by being mapped later: leave --align out, or give the other codec"
        )
