"""A corpus: the documents of one split, in an order of their own, with labels or without.

>>> corpus = load_corpus(CorpusConfig(source="stanfordnlp/imdb", split="train", max_samples=100))
>>> documents = corpus.documents(0, 64)
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features
from pydantic import Field

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.hub import Beginning
from teacher_cache.stages.data.labels import Labels, is_generic, map_labels, read_labels
from teacher_cache.stages.data.opening import SourceUnavailable
from teacher_cache.stages.data.sources import open_source

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "body", "comment")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target", "rating")
# One `=` on each side; a heading of a lower level has more.
_TITLE = re.compile(r"= (?!=)(?:.*[^ =]|[^ =]) =")


class CorpusConfig(StageConfig):
    """What to read, and how much of it."""

    source: str = Field(
        description="'reviews', 'austen', a file, a folder (aclImdb's layout too) or a hub id "
        "(id:subset where it has several)"
    )
    split: str | None = Field(
        default=None, description="the split to read; by default 'train', or the only one there is"
    )
    text_column: str | None = Field(
        default=None, description="the column with the texts; by default one of the usual names"
    )
    label_column: str | None = Field(
        default=None, description="the column with the labels; by default one of the usual names"
    )
    txt_unit: Literal["line", "paragraph", "document", "article"] = Field(
        default="line",
        description="what of a .txt file is a document: a line, a paragraph (between empty lines) "
        "or the whole file; or an article of WikiText, whose lines a table may hold too",
    )
    streamed: bool = Field(
        default=False,
        description="read no more of a hub data set than `max_samples` documents, the first in its "
        "own order",
    )
    labeled: bool = Field(default=True, description="whether to read labels")
    label_names: tuple[str, ...] | None = Field(
        default=None, description="the label names in the order of the teacher's classes"
    )
    max_samples: int | None = Field(
        default=None, gt=0, description="at most so many documents, the first of the shuffled order"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of the documents' order, whatever the limit"
    )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents with random access; made by `load_corpus`.

    Attributes:
        config: what was asked for.
        identity: what was read, for the fingerprint: kind, name and revision or content hash,
            split, columns, seed and class ids; never a path, nor the limit.
    """

    config: CorpusConfig
    identity: dict[str, object]
    _texts: datasets.Dataset
    _text_column: str
    _source: str
    _split: str
    _labels: Labels | None
    _order: np.ndarray

    def __len__(self) -> int:
        """Number of documents, the limit applied."""
        return len(self._order)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The class names in id order, None when the source has none or no labels are read."""
        return self._labels.names if self._labels is not None else None

    def documents(self, start: int, stop: int) -> list[Document]:
        """Documents `start` to `stop` (not included) of the corpus's order.

        Raises:
            IndexError: if the range reaches outside the corpus.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"documents {start} to {stop} of a corpus of {len(self)}")
        positions = self._order[start:stop]
        texts = self._texts[positions.tolist()][self._text_column] if len(positions) else []
        labels = self._labels.ids[positions].tolist() if self._labels is not None else None
        return [
            Document(
                # A null text is an empty one: it is counted as such, and never tokenised.
                text=text or "",
                source=self._source,
                split=self._split,
                position=position,
                label=labels[idx] if labels is not None else None,
            )
            for idx, (text, position) in enumerate(zip(texts, positions.tolist(), strict=True))
        ]

    def documents_with_text(self) -> list[Document]:
        """All documents that are not empty.

        Raises:
            UserError: if all are.
        """
        documents = [one for one in self.documents(0, len(self)) if one.text.strip()]
        if not documents:
            raise UserError(
                f"the {len(self)} documents of {self.config.source} are all empty: check "
                "--text-column"
            )
        return documents

    def class_names(self) -> tuple[str, ...]:
        """Names for every class id, to fine-tune a new teacher with.

        Raises:
            UserError: if the corpus has no labels, or negative ones.
        """
        labels = self._labels
        if labels is None:
            raise UserError("the corpus is read without labels: a teacher needs labelled text")
        if labels.names is not None:
            return labels.names
        if labels.ids.min() < 0:
            raise UserError(
                f"the corpus has the label {labels.ids.min()}, expected integers from 0: name "
                f"another --label-column"
            )
        # The placeholders of transformers, so that integers stay integers for such a teacher.
        return tuple(f"LABEL_{class_id}" for class_id in range(int(labels.ids.max()) + 1))

    def label_counts(self) -> dict[str, int] | None:
        """Number of documents per class name (or integer), the limit applied."""
        if self._labels is None:
            return None
        return dataclasses.replace(self._labels, ids=self._labels.ids[self._order]).counts()

    def with_class_names(self, teacher_id2label: Mapping[int, str]) -> Corpus:
        """The same corpus with the teacher's class ids for labels.

        Its names are the teacher's, or where those are placeholders (`LABEL_0`) the corpus's own.

        Args:
            teacher_id2label: the teacher's class names by id.

        Raises:
            UserError: if a label is none of the teacher's classes, or nothing tells which it is.
        """
        labels = self._labels
        if labels is None:
            return self
        values: Sequence[str] | Sequence[int]
        values = labels.names if labels.names is not None else np.unique(labels.ids).tolist()
        class_ids = map_labels(
            values,
            teacher_id2label,
            self.config.label_names if labels.names is not None else None,
            names_are_ordered=labels.names_are_ordered,
        )
        ids = labels.ids
        if labels.names is not None:
            ids = np.array([class_ids[name] for name in labels.names], dtype=np.int64)[ids]
        own_names: dict[int, str] = {}
        if labels.names is not None and is_generic(teacher_id2label):
            # The corpus knows what the teacher's LABEL_0 is called.
            own_names = {class_id: str(name) for name, class_id in class_ids.items()}
        names = tuple(
            own_names.get(class_id, teacher_id2label[class_id])
            for class_id in range(len(teacher_id2label))
        )
        return dataclasses.replace(
            self,
            identity={**self.identity, "class_ids": {str(k): v for k, v in class_ids.items()}},
            _labels=Labels(ids, names, names_are_ordered=True),
        )


def load_corpus(config: CorpusConfig) -> Corpus:
    """Read a corpus.

    The documents come in a random order that depends on the seed and on how many there are, for
    data sets sorted by label are common; a limit takes the first ones of that order, so a higher
    limit only appends. A streamed data set comes in its own order.

    Args:
        config: what to read.

    Raises:
        SourceUnavailable: if the source is not there, cannot be reached or holds nothing.
        UserError: if a split or column is not there, or the labels cannot be learned from.
    """
    source = open_source(
        config.source,
        config.split,
        txt_unit="line" if config.txt_unit == "article" else config.txt_unit,
        beginning=Beginning(num_rows=config.max_samples) if config.streamed else None,
    )
    table = source.table
    if len(table) == 0:
        raise SourceUnavailable(
            f"the split {source.split!r} of {config.source!r} holds no documents: give another"
        )
    text_column = find_text_column(table.features, config.text_column)
    if config.txt_unit == "article":
        table = _articles(config, table, text_column)
    label_column = (
        find_label_column(table.features, config.label_column) if config.labeled else None
    )
    labels = None
    if label_column is not None:
        labels = read_labels(table.data.table, table.features, label_column, config.label_names)
    # RandomState's streams never change between numpy versions, unlike Generator's.
    order = np.random.RandomState(config.seed).permutation(len(table))
    if config.streamed:  # of which no more is known than what was read
        order = np.arange(len(table))
    return Corpus(
        config=config,
        identity={
            **source.identity,
            "text_column": text_column,
            "label_column": label_column,
            # Absent where they do nothing, so that caches from before them keep their fingerprints.
            **({"txt_unit": "article"} if config.txt_unit == "article" else {}),
            **({"streamed": True} if config.streamed else {"seed": config.seed}),
        },
        _texts=table.select_columns([text_column]),
        _text_column=text_column,
        _source=source.label,
        _split=source.split,
        _labels=labels,
        _order=order[: config.max_samples],
    )


def _articles(config: CorpusConfig, table: datasets.Dataset, text_column: str) -> datasets.Dataset:
    if config.labeled:
        raise UserError("--txt-unit article joins lines, which have no labels: give --task lm")
    if config.streamed:
        raise UserError("--txt-unit article needs all lines, and a streamed text has its first")
    return datasets.Dataset.from_dict({text_column: join_articles(table[text_column])})


def load_with_fallback(
    config: CorpusConfig, fallbacks: Sequence[CorpusConfig]
) -> tuple[Corpus, CorpusConfig]:
    """Read the first corpus that is there; only what the user listed is ever tried.

    Args:
        config: what is wanted.
        fallbacks: what may stand in for it, in this order.

    Returns:
        The corpus, and which of the configurations it is from.

    Raises:
        SourceUnavailable: if none is there.
        UserError: if one is there and cannot be read as asked.
    """
    candidates = [config, *fallbacks]
    reasons: list[str] = []
    for candidate in candidates:
        try:
            corpus = load_corpus(candidate)
        except SourceUnavailable as error:
            reasons.append(str(error))
            continue
        if reasons:
            logger.warning("falling back to %s: %s", candidate.source, reasons[0])
        return corpus, candidate
    raise SourceUnavailable(
        reasons[0] if len(reasons) == 1 else f"no source could be loaded; {'; '.join(reasons)}"
    )


def find_text_column(features: Features, wanted: str | None) -> str:
    """The column to read texts from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there or does not hold text; the columns there are get named.
    """
    name = _find_column(features, wanted, TEXT_COLUMNS, option="--text-column")
    column_type = features.arrow_schema.field(name).type
    if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
        raise UserError(
            f"the column {name!r} holds {column_type}, expected text: name another one with "
            f"--text-column ({_listed(features)})"
        )
    return name


def find_label_column(features: Features, wanted: str | None) -> str:
    """The column to read labels from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there; the columns there are get named.
    """
    return _find_column(features, wanted, LABEL_COLUMNS, option="--label-column")


def _find_column(
    features: Features, wanted: str | None, usual: Sequence[str], *, option: str
) -> str:
    if wanted is not None:
        if wanted not in features:
            raise UserError(
                f"there is no column {wanted!r} ({_listed(features)}): "
                f"{did_you_mean(wanted, features)}"
            )
        return wanted
    by_lower_name = {name.lower(): name for name in reversed(list(features))}
    for name in usual:
        if name in by_lower_name:
            return by_lower_name[name]
    raise UserError(
        f"no column is called {', '.join(usual[:-1])} or {usual[-1]}: name the right one with "
        f"{option} ({_listed(features)})"
    )


def _listed(features: Features) -> str:
    return f"the columns are {', '.join(features)}" if features else "there are no columns"


def join_articles(lines: Iterable[str | None]) -> list[str]:
    """Articles of lines in their order.

    Args:
        lines: with or without their line breaks; None is an empty one.

    Raises:
        UserError: if no line is a title.
    """
    read = [_line(one) for one in lines]
    is_empty = [not one.strip() for one in read]
    starts = [
        i
        for i, line in enumerate(read)
        # A title stands alone; a paragraph may look like one.
        if _TITLE.fullmatch(line.strip())
        and (i == 0 or is_empty[i - 1])
        and (i + 1 == len(read) or is_empty[i + 1])
    ]
    if not starts:
        raise UserError(
            "--txt-unit article joins WikiText's lines to articles, and no line is a title, as in "
            "` = Emma = `: give another unit"
        )
    ends = [*starts[1:], len(read)]
    return ["".join(read[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=True)]


def _line(text: str | None) -> str:
    """As in the original file, where an empty line is a space; tables keep it as no text."""
    return f"{(text or '').rstrip(chr(10)) or ' '}\n"
