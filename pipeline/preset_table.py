"""What `--data NAME` stands for: data sets with all that a run needs besides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.pipeline.options import TxtUnit
from teacher_cache.stages.teacher.config import TaskName


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
