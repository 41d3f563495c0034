"""Which columns hold the texts and the labels, and what shows that none does."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.config import comma_separated
from teacher_cache.stages.data.labels import AnyLabels, spelled
from teacher_cache.stages.data.sources import Source
from teacher_cache.stages.data.tables import FROM_FIRST_LINE, plain_type

if TYPE_CHECKING:
    from teacher_cache.stages.data.corpus import CorpusConfig

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "body", "comment")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target", "rating")
# What the other text of a pair is called: by GLUE, SNLI, SQuAD, FEVER and sentence-transformers.
_PARTNER = re.compile(
    r"question|query|premise|hypothesis|context|passage|claim|evidence|answer"
    r"|.*_pair|pair|(text|sentence|sent|question|string|document|doc)_?[12ab]"
)
_NAME_SHOWN = 60  # characters of a column's name in a message


def columns_of(config: CorpusConfig, source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of texts, two of pairs, and of labels, several of multi-label heads.

    Raises:
        UserError: if one is not there, both are one, there is a pair of which nobody says that it
            is one, or folders may be the labels.
    """
    schema = source.schema
    pair = _pair_of(config, schema)
    if pair is None:
        _check_pair(config, schema)
    text_columns = tuple(find_text_column(schema, one) for one in pair or (config.text_column,))
    if not config.labeled:
        return text_columns, ()
    named = [name for name in schema.names if name.strip()]
    is_text_alone = config.label_column is None and set(named) == set(text_columns)
    if is_text_alone and source.folders:
        raise UserError(
            f"the texts of {config.source} lie in the folders {', '.join(source.folders)}, which "
            "may be their classes: give the folder right above those of the classes, write the "
            "classes into a column, or read the texts alone with --unlabeled alone"
        )
    if is_text_alone:
        logger.info(
            "%s has no column but %s: read as text without labels, of which the teacher alone is "
            "learned",
            config.source,
            " and ".join(map(repr, text_columns)),
        )
        return text_columns, ()
    wanted: Sequence[str | None] = (config.label_column,)
    if config.label_column is not None and config.label_column not in schema.names:
        wanted = comma_separated(config.label_column) or wanted
    label_columns = tuple(find_label_column(schema, one) for one in wanted)
    for one in label_columns:
        if one in text_columns:
            raise UserError(
                f"the column {one!r} of {config.source} is named for both texts and labels "
                f"({_listed(schema)}): name the other one with --text-column or --label-column"
            )
        if label_columns.count(one) > 1:
            raise UserError(f"--label-column names the column {one!r} twice: name each once")
    return text_columns, label_columns


def _pair_of(config: CorpusConfig, schema: pa.Schema) -> tuple[str, ...] | None:
    """The two columns that are named for a pair; None where one is, or none.

    Raises:
        UserError: if they are not two, or a document of this task is one text.
    """
    wanted = config.text_column
    if wanted is None or "," not in wanted or wanted in schema.names:
        return None
    names = comma_separated(wanted)
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(
            f"--text-column {wanted} names {len(names)} columns: give one, or the two different "
            f"ones of a pair, as in premise,hypothesis ({_listed(schema)})"
        )
    if not config.pairs:
        raise UserError(
            f"--text-column {wanted} is a pair of texts, which classifiers read, and here a "
            "document is one text: name one column"
        )
    return names


def _check_pair(config: CorpusConfig, schema: pa.Schema) -> None:
    """Refuse a second text that a teacher of pairs reads; warn where the text is named.

    Text without labels may be read for its own sake: there, too, a warning.

    Raises:
        UserError: naming both columns.
    """
    text_column = config.text_column or _usual(schema, TEXT_COLUMNS)
    partners = [
        name
        for name in schema.names
        if name != text_column
        and _PARTNER.fullmatch(name.strip().lower())
        and _is_text(schema, name)
    ]
    if text_column is None and len(partners) > 1:
        text_column = partners.pop(0)
    if text_column is None or not partners:
        return
    listed = " and ".join(sorted([*partners, text_column], key=schema.names.index))
    if config.text_column is None and config.labeled:
        both = ",".join(sorted([partners[0], text_column], key=schema.names.index))
        raise UserError(
            f"the columns {listed} of {config.source} look like a pair: read both with "
            f"--text-column {both}, or {text_column!r} alone with --text-column {text_column}"
        )
    logger.warning(
        "the columns %s of %s look like a pair: %r alone is read",
        listed,
        config.source,
        text_column,
    )


def find_text_column(schema: pa.Schema, wanted: str | None) -> str:
    """The column to read texts from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there or does not hold text; the columns there are get named.
    """
    name = _find_column(schema, wanted, TEXT_COLUMNS, option="--text-column")
    if not _is_text(schema, name):
        raise UserError(
            f"the column {name!r} holds {schema.field(name).type}, expected text: name another one "
            f"with --text-column ({_listed(schema)})"
        )
    return name


def _is_text(schema: pa.Schema, name: str) -> bool:
    return schema.names.count(name) == 1 and pa.types.is_string(plain_type(schema.field(name).type))


def find_label_column(schema: pa.Schema, wanted: str | None) -> str:
    """The column to read labels from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there; the columns there are get named.
    """
    without = "; or give text without labels as --unlabeled alone"
    return _find_column(schema, wanted, LABEL_COLUMNS, option="--label-column", or_else=without)


def _find_column(
    schema: pa.Schema, wanted: str | None, usual: Sequence[str], *, option: str, or_else: str = ""
) -> str:
    names = schema.names
    if wanted is not None and wanted not in names:
        raise UserError(
            f"there is no column {wanted!r} ({_listed(schema)}): {did_you_mean(wanted, names)}"
            + _if_a_document(schema)
        )
    called = wanted or _usual(schema, usual)
    if called is None:
        raise UserError(
            f"no column is called {', '.join(usual[:-1])} or {usual[-1]}: name the right one with "
            f"{option} ({_listed(schema)}){or_else}{_if_a_document(schema)}"
        )
    alike = [one for one in names if one.strip().lower() == called.strip().lower()]
    if names.count(called) > 1 or (wanted is None and len(alike) > 1):
        raise UserError(
            f"several columns are called {called!r} ({_listed(schema)}): "
            f"{'rename one' if names.count(called) > 1 else f'name one with {option}'}"
        )
    return called


def _usual(schema: pa.Schema, usual: Sequence[str]) -> str | None:
    """The first column of these names, whatever its case."""
    plain = [name.strip().lower() for name in schema.names]
    return next((schema.names[plain.index(one)] for one in usual if one in plain), None)


def _listed(schema: pa.Schema) -> str:
    if not schema.names:
        return "there are no columns"
    names = [
        name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..." for name in schema.names
    ]
    return f"the columns are {', '.join(names)}"


def _if_a_document(schema: pa.Schema) -> str:
    """What to do if there is no header, where only a first line says that there is."""
    if FROM_FIRST_LINE not in (schema.metadata or {}):
        return ""
    return "; if the first line is a document and no header, name all columns with --columns"


def refuse_a_document_as_header(config: CorpusConfig, schema: pa.Schema, labels: AnyLabels) -> None:
    """Refuse a column of labels that is called like one of them; pandas may number columns.

    Raises:
        UserError: saying how to name columns that the file does not.
    """
    called = config.label_column
    numbered = [str(number) for number in range(len(schema.names))]
    if called is None or FROM_FIRST_LINE not in (schema.metadata or {}) or schema.names == numbered:
        return
    if spelled(called) in map(spelled, labels.counts()):
        raise UserError(
            f"the column {called!r} of {config.source} is called like one of its labels, so the "
            "first line may be a document: name all columns with --columns, as in --columns "
            "text,label, or rename this one"
        )


def refuse_hidden_labels(config: CorpusConfig, texts: Sequence[str | None]) -> None:
    """Refuse labels that stand in the texts: as fastText writes them, in a table or in JSON.

    Raises:
        UserError: saying how to write them instead.
    """
    found = [text for text in texts if text and text.strip()]
    num_tabs = {text.count("\t") for text in found}
    header = {word.strip(' "').lower() for word in re.split("[,;|]", found[0])} if found else set()
    if found and all(text.startswith("__label__") for text in found):
        what = "begin with their labels (__label__...)"
    elif len(found) > 1 and len(num_tabs) == 1 and num_tabs != {0}:
        what = f"are rows of a table ({num_tabs.pop() + 1} fields between tabs)"
    elif header & {*TEXT_COLUMNS} and header & {*LABEL_COLUMNS}:
        what = f"are rows of a table (its header is {found[0]!r})"
    elif found and all(re.fullmatch(r"\s*\{\s*\".*\}\s*", text) for text in found):
        what = "are objects of JSON"
    else:
        return
    raise UserError(
        f"the texts of {config.source} {what}: write texts and labels as columns of a file that is "
        "called what it is (.csv, .tsv, .jsonl), or read them as they are with --unlabeled alone"
    )
