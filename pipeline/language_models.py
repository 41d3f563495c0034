"""A language model's options: corpora of text, of which no labels are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.options import CacheTeacherOptions, DataOptions, EvaluateCommandOptions
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

    refuse_labels(options)
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
        labeled=text_corpus(options, options.data, options.split, options.max_samples),
        unlabeled=_second_corpus(options),
        unlabeled_is_named=options.unlabeled is not None,
        fallback=tuple(
            text_corpus(options, data, None, options.max_samples) for data in options.fallback
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
    return text_corpus(
        options,
        options.unlabeled,
        options.unlabeled_split,
        options.unlabeled_max_samples,
        is_second=True,
    )


def refuse_labels(options: DataOptions) -> None:
    """Refuse what says how labels are read.

    Raises:
        UserError: naming the option.
    """
    for name in OF_LABELS:
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of classifiers: leave it out with language models, "
                "for which each token is the label of those before it"
            )


def text_corpus(
    options: CacheTeacherOptions | EvaluateCommandOptions,
    data: str,
    split: str | None,
    max_samples: int | None,
    *,
    is_second: bool = False,
    is_held_out: bool = False,
) -> CorpusConfig:
    """The text that `--data`, or with `is_second` `--unlabeled`, names.

    Args:
        options: with what says how to read it.
        data: a preset, file, folder or hub id.
        split: to read; the preset's if none is named.
        max_samples: at most so many documents.
        is_second: whether it is the corpus of `--unlabeled`.
        is_held_out: take the split that a preset holds out.
    """
    from teacher_cache.stages.data.corpus import CorpusConfig

    source, own_split, text_column, unit, is_streamed = data, None, None, None, False
    if data in TEXTS:
        text = TEXTS[data]
        source, text_column, unit = text.source, text.text_column, text.txt_unit
        own_split = text.held_out if is_held_out else text.train
        is_streamed = text.is_streamed
    elif data in PRESETS:
        preset = PRESETS[data]
        own = (preset.source, preset.held_out if is_held_out else preset.train)
        source, own_split = preset.unlabeled if is_second else own
        text_column = None if is_second else preset.text_column
    return CorpusConfig(
        source=source,
        split=split or own_split,
        text_column=(None if is_second else options.text_column) or text_column,
        txt_unit=options.txt_unit or unit or "line",
        labeled=False,
        max_samples=max_samples,
        seed=getattr(options, "seed", 0),
        streamed=is_streamed,
    )
