"""The options of each command: the stages' own settings, plus how a person names data.

Light to import: `--help` builds itself from these models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.config import (
    ComposedConfig,
    DeviceConfig,
    Of,
    Part,
    StageConfig,
    comma_separated,
)
from teacher_cache.stages.evaluation.config import (
    AnswerOptions,
    EvaluateOptions,
    GenerationOptions,
    PairOptions,
)
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.tasks import TaskName
from teacher_cache.stages.teacher.config import (
    AlignmentConfig,
    ChatConfig,
    ForwardConfig,
    LayersConfig,
    ShardConfig,
)
from teacher_cache.stages.training.config import FinetuneOptions
from teacher_cache.stages.workers.config import WorkersConfig

MissingLabels = Literal["refuse", "drop", "unlabeled"]
TxtUnit = Literal["line", "paragraph", "document", "article"]
Quoting = Literal["doubled", "escaped", "single", "none"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Names = Annotated[tuple[str, ...], BeforeValidator(comma_separated)]


OF_LABELS = Of(
    task="classification",
    elsewhere="{flag} is of classifiers: leave it out with language models, for which each token "
    "is the label of those before it",
)


class DataOptions(StageConfig):
    """How a person names labelled data."""

    data: str = Field(
        description="Data: a preset (imdb, sst2, mnli, qnli, demo; for language models wikitext, "
        "openwebtext, moe-to-mamba, austen), a hub id (id:subset@revision), a folder (aclImdb's "
        "layout and save_to_disk's too), an archive, a csv, tsv, jsonl, parquet, arrow or txt file "
        "(compressed too), a pattern of files, or a URL of any of these."
    )
    split: str | None = Field(
        default=None,
        description="Split of the data, or a part of it as in train[:10%]. Default: the preset's, "
        "else train.",
    )
    text_column: str | None = Field(
        default=None,
        description="Column with the texts; of pairs both, as in premise,hypothesis. Default: the "
        "usual names are tried.",
    )
    label_column: Annotated[str | None, OF_LABELS] = Field(
        default=None,
        description="Column with the labels; of a multi-label teacher lists, or columns of 0 and 1 "
        "as in toxic,rude. Default: the usual names are tried.",
    )
    label_names: Annotated[Names | None, OF_LABELS] = Field(
        default=None,
        description="Label names in the order of the teacher's class ids, comma-separated.",
    )
    missing_labels: Annotated[MissingLabels, OF_LABELS] = Field(
        default="refuse",
        description="Documents without a label (null, empty or -1): refuse the data; drop them; or "
        "unlabeled, keep them for what the teacher says of them.",
    )
    quoting: Quoting | None = Field(
        default=None,
        description="How fields of csv and tsv are quoted: in quotes that are doubled inside them "
        "or escaped by a backslash, in single quotes, or none, so that a quote is text. Default: "
        "what the whole file is written in.",
    )
    columns: Names | None = Field(
        default=None,
        description="Names of all columns of csv and tsv without a header, comma-separated.",
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="At most so many labelled documents, of a shuffled order."
    )


class MappedDataOptions(DataOptions):
    """The same for a teacher that is there, whose classes labels become."""

    label_map: Annotated[Names | None, OF_LABELS] = Field(
        default=None,
        description="Which of the teacher's classes each label means, by its name or id, "
        "comma-separated, as in ham=LABEL_0,spam=LABEL_1. Default: names decide, or ids.",
    )


class CachedDataOptions(MappedDataOptions):
    """How a person names data to cache."""

    data: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description=f"{DataOptions.model_fields['data'].description} Default: none, with the text "
        "of --unlabeled alone.",
    )


class FinetuneTeacherOptions(ComposedConfig):
    """`pipe finetune-teacher`."""

    corpus: Part[DataOptions]
    training: Part[FinetuneOptions]
    problem_type: ProblemType | None = Field(
        default=None,
        description="What the teacher learns to say: one class of several, any of several labels, "
        "or a number. Default: as the labels are written: lists and several columns are "
        "multi-label, fractions numbers, all else classes.",
    )
    model: str | None = Field(
        default=None,
        description="Base model: hub id or folder of an encoder or decoder. Default: the preset's.",
    )
    validation_split: str | None = Field(
        default=None,
        description="Split to evaluate on. Default: the preset's, else --eval-fraction of the "
        "data.",
    )


class TextOptions(StageConfig):
    """How text files are cut into documents."""

    txt_unit: TxtUnit | None = Field(
        default=None,
        description="What of a txt file is a document: a line, a paragraph (between empty lines) "
        "or the whole document; or an article of WikiText, which a table of its lines may hold "
        "too. Default: the preset's, else line.",
    )


class CacheTeacherOptions(ComposedConfig):
    """`pipe cache-teacher`."""

    corpus: Part[CachedDataOptions]
    text: Part[TextOptions]
    layers: Part[LayersConfig]
    shards: Part[ShardConfig]
    forward: Part[ForwardConfig]
    kept: Part[CodecConfig]
    aligned: Part[AlignmentConfig]
    chat: Part[ChatConfig]
    workers: Part[WorkersConfig]
    teacher: str | None = Field(
        default=None,
        description="Teacher: hub id or folder of a fine-tuned classifier or, with --task lm, of "
        "a causal language model. Default: the preset's.",
    )
    task: TaskName | None = Field(
        default=None,
        description="What the teacher does: classification of documents, or lm, the prediction of "
        "every next token, for which text needs no labels. Default: the preset's, else "
        "classification.",
    )
    unlabeled: str | None = Field(
        default=None,
        description="Unlabelled text: as --data, or none. Default: the preset's, or the folder's "
        "own unlabelled split; none with --task lm, for which it is a second corpus.",
    )
    unlabeled_split: str | None = Field(default=None, description="Split of the unlabelled text.")
    unlabeled_max_samples: int | None = Field(
        default=5000,
        ge=1,
        description="At most so many unlabelled documents; a number beyond what there is takes "
        "all.",
    )
    fallback: Names = Field(
        default=(),
        description="Data to take, in this order, if --data cannot be loaded; comma-separated.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the documents' order.")


class ImportOptions(StageConfig):
    """`pipe import-log-probs`."""

    tokenizer: str = Field(description="The engine's tokenizer: hub id or folder.")
    engine: str | None = Field(
        default=None,
        description="The engine with its version, as in 'vllm 0.32.0'. Default: llama.cpp's, of "
        "--gguf.",
    )
    model: str | None = Field(
        default=None,
        description="Hub id or path of the model that the engine ran. Default: the name of --gguf.",
    )
    revision: str | None = Field(
        default=None,
        description="Commit or hash of its weights. Default: unknown; of --gguf, its own.",
    )
    dtype: str | None = Field(
        default=None,
        description="Number format in which it ran; vLLM's `auto` is not float32 but bfloat16. "
        "Default: the file type of --gguf.",
    )
    gguf: Path | None = Field(
        default=None,
        description="Of logits that llama.cpp saved: the GGUF whose they are. Default: none, for "
        "the answers of other engines.",
    )
    second_pass: Path | None = Field(
        default=None,
        description="Of logits that llama.cpp saved: another file, of the text without its first "
        "half window, which scores what the first pass only read. Default: none.",
    )
    unlabeled: Path | None = Field(
        default=None,
        description="Answers on a second corpus, for training without cross-entropy. Default: "
        "none.",
    )
    top_k: int = Field(default=64, ge=1, description="Tokens of a list to keep; none has fewer.")
    max_length: int = Field(default=512, ge=2, description="Tokens of a sample.")
    shard_documents: int = Field(default=1024, ge=1, description="Documents in a shard.")
    overwrite: bool = Field(default=False, description="Start the cache again, whatever it holds.")


class CheckOptions(JoinConfig):
    """`pipe check`."""

    cache: Path | None = Field(
        default=None,
        description="Folder of the cache. Default: the newest complete one in ./caches.",
    )


class HeldOutOptions(MappedDataOptions):
    """How a person names data to evaluate on."""

    data: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description="Data to evaluate on, labelled for classifiers: as for cache-teacher; a "
        "preset's held-out split.",
    )


class EvaluateCommandOptions(ComposedConfig):
    """`pipe evaluate`."""

    corpus: Part[HeldOutOptions]
    text: Part[TextOptions]
    evaluation: Part[EvaluateOptions]
    answers: Part[AnswerOptions]
    cache: Path | None = Field(
        default=None,
        description="In the place of --data: a cache, which needs no teacher; of the one that a "
        "run was trained on, what it held out. Default: none.",
    )


class PredictOptions(ComposedConfig):
    """`pipe predict`."""

    where: Part[DeviceConfig]
    pair: Part[PairOptions]
    answers: Part[AnswerOptions]
    generation: Part[GenerationOptions]


class PredictSettings(EvaluateCommandOptions):
    """What `pipe predict` may find in the section `evaluate` of a file, and its own options."""

    pair: Part[PairOptions]
    generation: Part[GenerationOptions]
