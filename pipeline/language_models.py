"""Stage one's options for a language model: corpora of text, of which no labels are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.options import CacheTeacherOptions
from teacher_cache.pipeline.preset_table import PRESETS, TEXTS, data_name, refuse_misspelt
from teacher_cache.stages.teacher.codec_options import check_options
from teacher_cache.stages.teacher.config import ShardConfig

if TYPE_CHECKING:
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig
    from teacher_cache.stages.data.corpus import CorpusConfig

OF_LABELS = ("label_column", "label_names")
OF_SECOND_CORPUS = ("unlabeled_split", "unlabeled_max_samples")


def resolve_language_model(options: CacheTeacherOptions) -> CacheTeacherConfig:
    """Fill in what the preset supplies.

    Raises:
        UserError: if nothing names a teacher, or an option has no meaning for a language model.
    """
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig

    for name in OF_LABELS:
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of classifiers: leave it out with --task lm, for "
                "which each token is the label of those before it"
            )
    refuse_misspelt(options.data)
    teacher, student_tokenizer = options.teacher, options.student_tokenizer
    if options.data in TEXTS:
        teacher = teacher or TEXTS[options.data].teacher
        student_tokenizer = student_tokenizer or TEXTS[options.data].student_tokenizer
    if teacher is None:
        raise UserError(
            f"--data {options.data} names no language model: give --teacher, the folder or hub id "
            "of a causal language model"
        )
    config = CacheTeacherConfig(
        **options.model_dump(
            include=set(ShardConfig.model_fields) - {"teacher", "task", "student_tokenizer"}
        ),
        task="lm",
        teacher=teacher,
        student_tokenizer=student_tokenizer,
        name=data_name(options.data),
        labeled=_text_corpus(options, options.data, options.split, options.max_samples),
        unlabeled=_second_corpus(options),
        unlabeled_is_named=options.unlabeled is not None,
        fallback=tuple(
            _text_corpus(options, data, None, options.max_samples) for data in options.fallback
        ),
    )
    check_options(config)
    return config


def _second_corpus(options: CacheTeacherOptions) -> CorpusConfig | None:
    if options.unlabeled in (None, "none"):
        for name in OF_SECOND_CORPUS:
            if name in options.model_fields_set:
                raise UserError(
                    f"--{name.replace('_', '-')} is of a second corpus, and there is none: name "
                    "it with --unlabeled, or leave the option out"
                )
        return None
    return _text_corpus(
        options,
        options.unlabeled,
        options.unlabeled_split,
        options.unlabeled_max_samples,
        is_second=True,
    )


def _text_corpus(
    options: CacheTeacherOptions,
    data: str,
    split: str | None,
    max_samples: int | None,
    *,
    is_second: bool = False,
) -> CorpusConfig:
    """The text that `--data`, or with `is_second` `--unlabeled`, names."""
    from teacher_cache.stages.data.corpus import CorpusConfig

    source, own_split, text_column = data, None, None
    if data in TEXTS:
        text = TEXTS[data]
        source, own_split, text_column = text.source, text.train, text.text_column
    elif data in PRESETS:
        preset = PRESETS[data]
        source, own_split = preset.unlabeled if is_second else (preset.source, preset.train)
        text_column = None if is_second else preset.text_column
    return CorpusConfig(
        source=source,
        split=split or own_split,
        text_column=(None if is_second else options.text_column) or text_column,
        txt_unit=options.txt_unit or "line",
        labeled=False,
        max_samples=max_samples,
        seed=options.seed,
    )
