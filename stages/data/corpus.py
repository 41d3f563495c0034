"""A corpus: the documents of one split, in an order of their own, with labels or without.

>>> corpus = load_corpus(CorpusConfig(source="stanfordnlp/imdb", split="train", max_samples=100))
>>> documents = corpus.documents(0, 64)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from pydantic import Field

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import SAMPLE_ID_BYTES
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.data.columns import (
    TEXT_COLUMNS,
    columns_of,
    refuse_a_document_as_header,
    refuse_hidden_labels,
)
from teacher_cache.stages.data.conversations import (
    ChatCounts,
    ChatReading,
    Conversation,
    Unusable,
    conversation_columns,
)
from teacher_cache.stages.data.delimited import Quoting
from teacher_cache.stages.data.hub import Beginning
from teacher_cache.stages.data.labels import AnyLabels, Label, MissingLabels, settle_missing
from teacher_cache.stages.data.opening import SourceUnavailable
from teacher_cache.stages.data.sources import Source, open_source
from teacher_cache.stages.data.tables import Format
from teacher_cache.stages.heads import Head, HeadName, head_of_labels

logger = logging.getLogger(__name__)

# What of an id decides whether its sample is held out.
PLACE_BYTES = 8
_NUM_NAMED = 5  # files in a message
_NUM_LOOKED_AT = 100  # texts, for labels in them
_IDS, _LEARNED = "ids", "is_learned"  # columns beside a conversation's text
# One `=` on each side; a heading of a lower level has more.
_TITLE = re.compile(r"= (?!=)(?:.*[^ =]|[^ =]) =")


class CorpusConfig(StageConfig):
    """What to read, and how much of it."""

    source: str = Field(
        description="'reviews', 'austen', a file, a pattern of files, a folder (aclImdb's layout "
        "too), an archive, a URL of any of these or a hub id (id:subset@revision)"
    )
    split: str | None = Field(
        default=None,
        description="the split to read, or a part of it as in train[:10%]; by default 'train', or "
        "the only one there is",
    )
    text_column: str | None = Field(
        default=None,
        description="the column with the texts, or the two of a pair with a comma between; by "
        "default one of the usual names",
    )
    pairs: bool = Field(
        default=False, description="whether two columns may be read as the texts of a pair"
    )
    label_column: str | None = Field(
        default=None,
        description="the column with the labels, or the columns of 0 and 1 of a multi-label head "
        "with commas between; by default one of the usual names",
    )
    heads: tuple[HeadName, ...] = Field(
        default=("single_label_classification",),
        description="kinds of head whose labels may be read; of several, how the labels are "
        "written decides",
    )
    txt_unit: Literal["line", "paragraph", "document", "article"] = Field(
        default="line",
        description="what of a .txt file is a document: a line, a paragraph (between empty lines) "
        "or the whole file; or an article of WikiText, whose lines a table may hold too",
    )
    quoting: Quoting | None = Field(
        default=None,
        description="how fields of csv and tsv are quoted; by default found out, or asked for",
    )
    columns: tuple[str, ...] | None = Field(
        default=None, description="of csv and tsv without a header, the names of all columns"
    )
    streamed: bool = Field(
        default=False,
        description="read no more of a hub data set than `max_samples` documents, the first in its "
        "own order",
    )
    labeled: bool = Field(
        default=True,
        description="whether to read labels; data that are one column of text have none",
    )
    conversations: bool = Field(
        default=False,
        description="whether columns of messages, or of prompts and completions, are read as "
        "conversations where no column is called like one of texts, or where they are asked for",
    )
    missing_labels: MissingLabels = Field(
        default="refuse", description="what becomes of documents that have no label"
    )
    label_names: tuple[str, ...] | None = Field(
        default=None, description="the label names in the order of the teacher's classes"
    )
    label_map: tuple[str, ...] | None = Field(
        default=None, description="which class each label means, as in spam=LABEL_1"
    )
    max_samples: int | None = Field(
        default=None, gt=0, description="at most so many documents, the first of the shuffled order"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of the documents' order, whatever the limit"
    )


@dataclass(frozen=True, eq=False)
class DocumentTokens:
    """Of a text that is not tokenised as other texts are: a rendered conversation.

    Attributes:
        ids: uint32 [T], with nothing to be put around them.
        is_learned: bool [T], the tokens that are to be predicted; None: all.
    """

    ids: np.ndarray
    is_learned: np.ndarray | None


@dataclass(frozen=True)
class Document:
    """One text of a corpus, or a pair of texts.

    Attributes:
        text: as the source holds it, or rendered; of a pair the first one.
        source: a packaged or hub name with its revision, or a content hash; never a path.
        split: the split it was read from.
        position: its index in that split, before any shuffling or limit.
        label: the class id, or what else its kind of head reads; None in an unlabelled corpus.
        tokens: of a conversation; None of other texts.
        second: the other text of a pair; None where there is one text.
    """

    text: str
    source: str
    split: str
    position: int
    label: Label | None = None
    tokens: DocumentTokens | None = field(default=None, compare=False)
    second: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The one text, or both of a pair."""
        return (self.text,) if self.second is None else (self.text, self.second)

    @property
    def is_empty(self) -> bool:
        """Whether a text of it is white space; half a pair is none."""
        return not all(text.strip() for text in self.texts)

    @property
    def sample_id(self) -> bytes:
        """16 bytes that stay the same on every machine, in any order and under any limit.

        Each part is hashed with its length in front, so no two different documents are encoded
        alike: the start of SHA-256 over source, split, position and text.
        """
        digest = hashlib.sha256()
        for part in (self.source, self.split, str(self.position), *self.texts):
            encoded = part.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.digest()[:SAMPLE_ID_BYTES]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents with random access; made by `load_corpus`.

    Attributes:
        config: what was asked for.
        identity: what was read, for the fingerprint: kind, name and revision or content hash,
            split, columns, seed and class ids; never a path, nor the limit.
        num_dropped: documents without a label that are left out.
        head: the kind of head whose labels were read; None where there are none.
        chat_columns: that hold conversations, which `rendered` makes documents of; None of texts.
        chat_counts: of those that it read.
    """

    config: CorpusConfig
    identity: dict[str, object]
    num_dropped: int
    _texts: datasets.Dataset
    _text_columns: tuple[str, ...]
    _source: str
    _split: str
    _labels: AnyLabels | None
    _order: np.ndarray
    _first: int  # of the texts, in the split
    head: Head | None = None
    chat_columns: tuple[str, ...] | None = None
    chat_counts: ChatCounts | None = None
    _places: np.ndarray | None = None  # of rendered conversations, among the texts

    def __len__(self) -> int:
        """Number of documents, the limit applied."""
        return len(self._order)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The class names in id order, None when the source has none or no labels are read."""
        return self._labels.names if self._labels is not None else None

    @property
    def num_texts(self) -> int:
        """Of a document: 2 of a pair."""
        return len(self._text_columns)

    def documents(self, start: int, stop: int) -> list[Document]:
        """Documents `start` to `stop` (not included) of the corpus's order.

        Raises:
            IndexError: if the range reaches outside the corpus.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"documents {start} to {stop} of a corpus of {len(self)}")
        assert self.chat_columns is None, "conversations are rendered before they are read"
        positions = self._order[start:stop]
        rows = self._texts[positions.tolist()] if len(positions) else {}
        texts, *seconds = (rows.get(name, []) for name in self._text_columns)
        tokens = _tokens(rows) if _IDS in rows else None
        places = positions if self._places is None else self._places[positions]
        labels = self._labels
        return [
            Document(
                # A null text is an empty one: it is counted as such, and never tokenised.
                text=text or "",
                source=self._source,
                split=self._split,
                position=self._first + position,
                label=None if labels is None else labels.of_document(positions[idx]),
                tokens=None if tokens is None else tokens[idx],
                second=(seconds[0][idx] or "") if seconds else None,
            )
            for idx, (text, position) in enumerate(zip(texts, places.tolist(), strict=True))
        ]

    def rendered(self, reading: ChatReading) -> Corpus:
        """The same corpus of conversations as the texts that a teacher reads.

        All of them are read here: what cannot be learned from is known before a teacher runs.

        Raises:
            UserError: if some cannot be, and the configuration does not drop them; or if none can.
        """
        assert self.chat_columns is not None, "it holds texts"
        counts, places = ChatCounts(num=len(self)), []
        (text_column,) = self._text_columns
        columns: dict[str, list[Any]] = {text_column: [], _IDS: []}
        if reading.config.loss_on != "all":
            columns[_LEARNED] = []
        for place in self._order.tolist():
            try:
                row = Conversation.of_row(self._texts[place], self.chat_columns)
                read = reading.read(row, counts)
            except Unusable as error:
                counts.add_unusable(error, self._first + place)
                continue
            places.append(place)
            columns[text_column].append(read.text)
            columns[_IDS].append(read.tokens.ids)
            if _LEARNED in columns:
                columns[_LEARNED].append(read.tokens.is_learned)
        is_dropped = reading.config.unusable_conversations == "drop" and bool(places)
        if counts.unusable and not is_dropped:
            counts.refuse(self.config.source)
        counts.say(self.config.source)
        settings = {"columns": list(self.chat_columns), **reading.settings}
        if counts.unusable:
            settings["unusable"] = "drop"
        features = {
            text_column: datasets.Value("string"),
            _IDS: datasets.List(datasets.Value("uint32")),
            _LEARNED: datasets.List(datasets.Value("bool")),
        }
        return dataclasses.replace(
            self,
            identity={**self.identity, "conversations": settings},
            chat_columns=None,
            chat_counts=counts,
            _texts=datasets.Dataset.from_dict(
                columns, features=datasets.Features({name: features[name] for name in columns})
            ),
            _order=np.arange(len(places)),
            _places=np.array(places, np.int64),
        )

    def documents_with_text(self) -> list[Document]:
        """All documents that are not empty.

        Raises:
            UserError: if all are.
        """
        documents = [one for one in self.documents(0, len(self)) if not one.is_empty]
        if not documents:
            raise UserError(
                f"the {len(self)} documents of {self.config.source} are all empty: check "
                "--text-column"
            )
        return documents

    @property
    def class_ids(self) -> Mapping[str, int]:
        """By label as the source writes it, the teacher's class id; empty before there is one."""
        found = self.identity.get("class_ids", {})
        assert isinstance(found, dict)
        return found

    def class_names(self) -> tuple[str, ...]:
        """Names for every class id, to fine-tune a new teacher with.

        Raises:
            UserError: if the corpus has no labels, lacks some, or they leave open which class they
                mean.
        """
        labels = self._labels
        if labels is None:
            raise UserError(
                f"{self.config.source} is read without labels: a teacher needs labelled text"
            )
        return labels.class_names()

    def label_counts(self) -> dict[str, int] | None:
        """Number of documents per class name (or integer), the limit applied."""
        if self._labels is None:
            return None
        return self._labels.at(self._order).counts()

    @property
    def num_without_label(self) -> int:
        """Documents of a labelled corpus that have no label, the limit applied."""
        return 0 if self._labels is None else int(self._labels.is_missing[self._order].sum())

    def constant_label(self) -> str | None:
        """The label that all documents have, the limit applied; None where they differ."""
        return None if self._labels is None else self._labels.at(self._order).constant()

    def with_class_names(self, teacher_id2label: Mapping[int, str]) -> Corpus:
        """The same corpus with the teacher's class ids for labels, and a line on which is which.

        Its names are the teacher's, or where those are placeholders (`LABEL_0`) the corpus's own.

        Args:
            teacher_id2label: the teacher's class names by id.

        Raises:
            UserError: if a label is none of the teacher's classes, or nothing tells which it is.
        """
        if self._labels is None:
            return self
        labels, class_ids = self._labels.of_classes(
            teacher_id2label, self.config.label_names, self.config.label_map
        )
        mapped = dataclasses.replace(
            self,
            identity={**self.identity, "class_ids": {str(k): v for k, v in class_ids.items()}},
            _labels=labels,
        )
        counts = self.label_counts() or {}
        logger.info("labels of %s: %s", self.config.source, labels.described(class_ids, counts))
        return mapped


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
        written=Format(
            txt_unit="line" if config.txt_unit == "article" else config.txt_unit,
            quoting=config.quoting,
            columns=config.columns,
        ),
        beginning=Beginning(num_rows=config.max_samples) if config.streamed else None,
    )
    if not source.schema.names:
        raise SourceUnavailable(f"{config.source!r} holds no documents: give another")
    chat_columns = None
    if config.conversations:
        chat_columns = conversation_columns(source.schema, config.text_column, TEXT_COLUMNS)
    text_columns, label_columns = (
        columns_of(config, source) if chat_columns is None else (chat_columns[:1], ())
    )
    label_column = ",".join(label_columns) or None
    table = source.read(chat_columns or [*text_columns, *label_columns])
    if len(table) == 0:
        raise SourceUnavailable(
            f"the split {source.split!r} of {config.source!r} holds no documents: give another"
        )
    rows = source.rows(len(table))
    table = table if len(rows) == len(table) else table.select(rows)
    if config.txt_unit == "article":
        table = _articles(config, table, text_columns[0])
    _say(config, source, text_columns, label_column)
    labels, head = None, None
    if config.labeled and label_column is None:
        refuse_hidden_labels(config, table[:_NUM_LOOKED_AT][text_columns[0]])
    if label_columns:
        written = _arrow(table)
        head = head_of_labels(config.heads, written, label_columns)
        labels = head.read_labels(
            written, table.features, label_columns, config.label_names, config.label_map
        )
        refuse_a_document_as_header(config, source.schema, labels)
    # RandomState's streams never change between numpy versions, unlike Generator's.
    order = np.random.RandomState(config.seed).permutation(len(table))
    if config.streamed:  # of which no more is known than what was read
        order = np.arange(len(table))
    labels, is_kept = settle_missing(labels, config.missing_labels, label_column, len(table))
    order = order[is_kept[order]]
    return Corpus(
        config=config,
        identity={
            **source.identity,
            # Of a pair a list, so that no one column is called like it.
            "text_column": text_columns[0] if len(text_columns) == 1 else list(text_columns),
            "label_column": label_column if len(label_columns) < 2 else list(label_columns),
            # Absent where they do nothing, so that caches from before them keep their fingerprints.
            **({"txt_unit": "article"} if config.txt_unit == "article" else {}),
            **({"streamed": True} if config.streamed else {"seed": config.seed}),
            **({} if is_kept.all() else {"missing_labels": "drop"}),
        },
        num_dropped=int((~is_kept).sum()),
        _texts=table.select_columns(list(chat_columns or text_columns)),
        _text_columns=text_columns,
        _source=source.label,
        _split=source.split,
        _labels=labels,
        _order=order[: config.max_samples],
        _first=rows.start,
        head=head,
        chat_columns=chat_columns,
    )


def _tokens(rows: Mapping[str, Any]) -> list[DocumentTokens]:
    """Of rendered conversations."""
    learned = rows.get(_LEARNED, [None] * len(rows[_IDS]))
    return [
        DocumentTokens(
            ids=np.asarray(ids, np.uint32),
            is_learned=None if is_learned is None else np.asarray(is_learned, bool),
        )
        for ids, is_learned in zip(rows[_IDS], learned, strict=True)
    ]


def _arrow(table: datasets.Dataset) -> pa.Table:
    """Its rows, chosen ones in their order."""
    found = table.flatten_indices() if table._indices is not None else table
    return found.data.table


def _say(
    config: CorpusConfig, source: Source, text_columns: Sequence[str], label_column: str | None
) -> None:
    """What is read, how, and what is not."""
    labels = f", labels of {label_column!r}" if label_column else ""
    logger.info(
        "%s: split %s%s, %s of %s%s",
        *(config.source, source.split, source.part or ""),
        *("texts" if len(text_columns) == 1 else "pairs", " and ".join(map(repr, text_columns))),
        labels,
    )
    for note in source.notes:
        logger.info("%s", note)
    for reason, names in source.left_out.items():
        few = ", ".join(names[:_NUM_NAMED])
        more = f" and {len(names) - _NUM_NAMED} others" if len(names) > _NUM_NAMED else ""
        logger.warning("%s: left out, %s: %s%s", config.source, reason, few, more)


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
