"""Fields between separators, as programs and people write them: every document, or a refusal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.delimited import Delimited
from tests.stages.data.reading import read

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "films.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["films.csv", "films.tsv"])
def test_the_separator_that_splits_the_header_is_found(write, name, separator) -> None:
    content = f'text{separator}label\n"one{separator} two"{separator}pos\nthree{separator}neg\n'
    assert read(write(content, name)) == [(f"one{separator} two", "pos"), ("three", "neg")]


def test_the_separator_that_excel_names_in_a_first_line(write) -> None:
    assert read(write("sep=;\ntext;label\none, two;pos\nthree;neg\n")) == [
        ("one, two", "pos"),
        ("three", "neg"),
    ]


def test_a_file_of_one_column_keeps_other_separators_in_its_texts(write) -> None:
    assert read(write("text\none; two\nthree | four; five\n")) == [
        ("one; two", None),
        ("three | four; five", None),
    ]


# As GLUE, SST-2 and the SMS spam collection are written: a quote is a character like any other.
UNQUOTED = [
    [('"I never said', "1"), ("fine", "0"), ('"oh" she said', "1"), ("bad", "0")],
    [("fine", "0"), ("good", "1"), ('"I never said', "1"), ("bad", "0"), ('he left"', "1")],
    [('"open', "pos"), ("plain", "neg"), ("more", "pos")],
]


@pytest.mark.parametrize("rows", UNQUOTED)
@pytest.mark.parametrize(("separator", "name"), [("\t", "films.tsv"), (",", "films.csv")])
def test_no_quote_of_a_file_without_quoting_swallows_a_document(
    write, rows, separator, name
) -> None:
    lines = [f"{text}{separator}{label}" for text, label in [("text", "label"), *rows]]
    assert read(write("\n".join(lines) + "\n", name)) == rows


@pytest.mark.parametrize("rows", UNQUOTED)
def test_nor_where_the_text_comes_last(write, rows) -> None:
    lines = [f"{label}\t{text}" for text, label in [("text", "label"), *rows]]
    assert read(write("\n".join(lines) + "\n", "films.tsv")) == rows


def test_a_quoted_text_of_several_lines_stays_one(write) -> None:
    content = 'text\tlabel\n"one\ttwo\nthree"\tpos\nfour\tneg\n"five"\tpos\n'
    assert read(write(content, "films.tsv")) == [
        ("one\ttwo\nthree", "pos"),
        ("four", "neg"),
        ("five", "pos"),
    ]


def test_quotes_that_a_backslash_escapes(write) -> None:
    content = 'text,label\n"say \\"hi, you\\"",1\n"C:\\\\new, old",0\n"C:\\tmp, x",1\n'
    assert read(write(content)) == [
        ('say "hi, you"', "1"),
        ("C:\\new, old", "0"),
        ("C:\\tmp, x", "1"),
    ]


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        ('text,label\na,1\n"he said "hi, you" to me",1\n', "line 3: text behind a closing quote"),
        ('text,label\nx, y,1\n"he said,1\nb,0\n', "line 2: 2 columns and 3 fields"),
        ('text,label\n"x, y",1\n"he said,1\nb,0\n', "line 3: a quote is opened and not closed"),
        ("text,label\na,1\nb,c,0\n", "line 3: 2 columns and 3 fields"),
        ("text,label\na,1\nb\n", "1 field in line 3, and 2 columns"),
        (b"text,label\na,1\ncaf\xe9,0\n", "in line 3.: save it as UTF-8"),
        ("text,label,text\na,1,b\n", "several columns are called 'text'"),
        ("text,Text,label\na,b,1\n", "several columns are called 'text'.*--text-column"),
    ],
)
def test_what_is_in_no_dialect_is_refused_with_its_line(write, content, saying) -> None:
    with pytest.raises(UserError, match=saying):
        read(write(content))


def test_a_column_of_quoted_or_plain_lines_is_refused_in_a_tsv(write) -> None:
    with pytest.raises(UserError, match=r"in two ways: 2 documents .*, or 3, one a line"):
        read(write('text\n"a\nb"\nc\n', "films.tsv"))


@pytest.mark.parametrize(
    "content",
    [
        ",text,label\n0,a,1\n1,b,0\n",  # as pandas writes its index
        "text,label,\na,1,\nb,0,\n",  # as a spreadsheet ends its lines
        "text,label,\na,1\nb,0\n",
        "text,label\na,1,\nb,0,\n",
        "text,label,x,x\na,1,2,3\nb,0,,\n",
        "text,label,note\na,1\nb,0,x\n",
        "text,label\n\na,1\n \n\nb,0\n\n",
        "\ufefftext,label\na,1\nb,0",
        '\ufeff"text","label"\r\n"a","1"\r\n"b","0"\r\n',
        "text,label\ra,1\rb,0\r",
        " text , label\na,1\nb,0\n",
        'Label,Text\n"1","a"\n0,b\n',
    ],
)
def test_what_is_not_asked_for_does_not_matter(write, content) -> None:
    assert read(write(content)) == [("a", "1"), ("b", "0")]


def test_a_field_of_any_length(write) -> None:
    text = "long " * 40_000
    assert read(write(f'text,label\n"{text}",1\nb,0\n')) == [(text, "1"), ("b", "0")]


def test_a_line_feed_of_another_kind_is_text(write) -> None:
    assert read(write("text\tlabel\na\x0cb\x85c\u2028d\t1\ne\rf\t0\n", "films.tsv")) == [
        ("a\x0cb\x85c\u2028d", "1"),
        ("e\rf", "0"),
    ]


def test_a_dialect_that_is_not_the_usual_one_is_said(write) -> None:
    found = Delimited.of(write('text;label\n"open;1\nplain;0\n'), ",")
    assert found.notes == [
        "films.csv: fields are separated by a semicolon",
        "films.csv: read without quoting, so that a quote is text",
    ]


# What makes readers fail: separators, quotes, line ends, white space, what looks like another type.
TEXTS = st.text(
    st.sampled_from(list("ab,;|\t\"'\\ \n\r\u00e9\u2028\x00")), max_size=8
) | st.sampled_from(["NA", "null", "007", "1e5", "-1", '""', '"', "a\nb", "x\ty\nz"])
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(["pos", "neg"])), min_size=2, max_size=8)


def slow_reference(content: str, separator: str) -> list[list[str]]:
    """RFC 4180 character by character, lines of CR, LF or both."""
    rows, row, text, quoted, i = [], [], "", False, 0
    while i < len(content):
        one = content[i]
        if quoted:
            if one == '"' and content[i + 1 : i + 2] == '"':
                text, i = text + '"', i + 1
            elif one == '"':
                quoted = False
            else:
                text += one
        elif one == '"' and not text:
            quoted = True
        elif one == separator:
            row.append(text)
            text = ""
        elif one in "\r\n":
            i += content[i : i + 2] == "\r\n"
            rows.append([*row, text])
            row, text = [], ""
        else:
            text += one
        i += 1
    return rows


def written(
    rows: Sequence[Sequence[str]], separator: str, quoting: int, end: str, *, reordered: bool
) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)  # pyright: ignore[reportArgumentType]
    order = slice(None, None, -1 if reordered else 1)
    writer.writerows([one[order] for one in [("text", "label"), *rows]])
    return stream.getvalue()


def check_as_the_reference(tmp_path: Path, content: str, separator: str, name: str) -> None:
    """The texts and labels of a file are those of the reference; an empty text is none."""
    header, *rows = slow_reference(content, separator)
    wanted = [dict(zip(header, row, strict=True)) for row in rows]
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == [(one["text"], one["label"]) for one in wanted]


FILES = {
    "rows": ROWS,
    "separator": st.sampled_from([",", "\t", ";"]),
    "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    "end": st.sampled_from(["\n", "\r\n"]),
    "reordered": st.booleans(),
}


@pytest.mark.parametrize("num", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_file_that_a_program_wrote_is_read_as_by_the_reference(
    tmp_path: Path, num: int
) -> None:
    @settings(
        max_examples=num, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(**FILES)
    def check(rows, separator, quoting, end, reordered) -> None:
        if len({label for _, label in rows}) < 2:
            rows = [*rows, ("both", "pos"), ("both", "neg")]
        if quoting == csv.QUOTE_MINIMAL and end == "\n":
            # Python's writer leaves a carriage return bare where it ends no line.
            rows = [(text.replace("\r", ""), label) for text, label in rows]
        content = written(rows, separator, quoting, end, reordered=reordered)
        check_as_the_reference(
            tmp_path, content, separator, "films.tsv" if separator == "\t" else "films.csv"
        )

    check()


@pytest.mark.parametrize("num", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_file_without_quoting_keeps_its_documents(tmp_path: Path, num: int) -> None:
    text = st.text(st.sampled_from(list("ab,\"' \\\u00e9")), min_size=1, max_size=8)
    rows_of = st.lists(st.tuples(text, st.sampled_from("01")), min_size=2, max_size=12)

    @settings(max_examples=num, deadline=None, database=None)
    @given(rows_of, st.booleans())
    def check(rows, reordered) -> None:
        rows = [*rows, ("one", "0"), ("other", "1")]
        order = slice(None, None, -1 if reordered else 1)
        lines = ["\t".join(one[order]) for one in [("text", "label"), *rows]]
        (tmp_path / "films.tsv").write_text("\n".join(lines) + "\n")
        found = read(tmp_path / "films.tsv")
        assert len(found) == len(rows)
        for (got, label), (text, wanted) in zip(found, rows, strict=True):
            # Where all quotes of a file come in pairs, they may as well be the writer's.
            as_quoted = '"' + got.replace('"', '""') + '"'
            assert label == wanted and text in (got, as_quoted)

    check()
