"""Fields between separators, as programs and people write them: every document, or a refusal."""

from __future__ import annotations

import csv
import io
import json
import re
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
    [('"open', "pos"), ("plain", "neg"), ("more", "pos")],
]


@pytest.mark.parametrize("rows", UNQUOTED)
@pytest.mark.parametrize(("separator", "name"), [("\t", "films.tsv"), (",", "films.csv")])
@pytest.mark.parametrize("order", [1, -1])
def test_no_quote_of_a_file_without_quoting_swallows_a_document(
    write, rows, separator, name, order
) -> None:
    lines = [separator.join(row[::order]) for row in [("text", "label"), *rows]]
    assert read(write("\n".join(lines) + "\n", name)) == rows


# Well-formed in two ways: the one that `--quoting` names is read, and without it none.
AMBIGUOUS = [
    (
        'text\tlabel\nfine\t0\n"I never said\t1\nbad\t0\nhe left"\t1\n',
        {
            "doubled": [("fine", "0"), ("I never said\t1\nbad\t0\nhe left", "1")],
            "none": [("fine", "0"), ('"I never said', "1"), ("bad", "0"), ('he left"', "1")],
        },
        r"line 3 as 'I never.*\(2 documents, --quoting doubled\) or .*\(4 documents, --quoting n",
    ),
    (
        'text\tlabel\nfine\t0\n"\\""\t1\n',
        {"escaped": [("fine", "0"), ('"', "1")], "none": [("fine", "0"), ('"\\""', "1")]},
        "line 3 as .* backslashes stand in front of quotes .* or .* quotes are text",
    ),
    (
        'text\tlabel\n"\\""\t1\na"\t0\n',
        {
            "doubled": [('\\"\t1\na', "0")],
            "escaped": [('"', "1"), ('a"', "0")],
            "none": [('"\\""', "1"), ('a"', "0")],
        },
        "--quoting doubled.*--quoting escaped",
    ),
    (
        "text\tlabel\n'a'\t1\n'b'\t0\n",
        {"single": [("a", "1"), ("b", "0")], "doubled": [("'a'", "1"), ("'b'", "0")]},
        "--quoting doubled.*--quoting single",
    ),
    (
        'text\n"a\nb"\nc\n',
        {
            "doubled": [("a\nb", None), ("c", None)],
            "none": [('"a', None), ('b"', None), ("c", None)],
        },
        r"2 documents.*3 documents",
    ),
]


@pytest.mark.parametrize(("content", "readings", "saying"), AMBIGUOUS)
def test_what_is_well_formed_in_two_ways_is_read_as_is_said(
    write, content, readings, saying
) -> None:
    path = write(content, "films.tsv")
    with pytest.raises(UserError, match=f"(?s)films.tsv can be read in two ways.*{saying}.*--quot"):
        read(path)
    for quoting, rows in readings.items():
        if len({label for _, label in rows}) > 1 or rows[0][1] is None:
            assert read(path, quoting=quoting) == rows
        else:  # too few to learn from
            assert read(path, quoting=quoting, labeled=False) == [(text, None) for text, _ in rows]


def test_a_quoting_that_a_file_is_not_of_is_refused_with_the_line(write) -> None:
    path = write('text,label\n"a, b",1\nc,0\n')
    assert read(path) == read(path, quoting="doubled") == [("a, b", "1"), ("c", "0")]
    with pytest.raises(
        UserError, match=r"csv with --quoting none \(line 2: 2 columns and 3 fields"
    ):
        read(path, quoting="none")


@pytest.mark.parametrize("option", [{"quoting": "none"}, {"columns": ("text",)}])
def test_what_is_said_of_csv_is_refused_of_other_files(write, option) -> None:
    with pytest.raises(UserError, match=r"--(quoting|columns) .* is for \.csv and \.tsv files"):
        read(write('{"text": "a"}\n', "films.jsonl"), **option)


def test_quotes_that_only_some_texts_have_are_said(write) -> None:
    path = write('text\tlabel\nplain\t0\n"fine"\t1\n', "films.tsv")
    assert read(path) == [("plain", "0"), ("fine", "1")]
    (note,) = Delimited.of(path, "\t").notes
    assert "line 3" in note and "--quoting none" in note
    for content in ('text,label\n"fine",1\n"plain",0\n', 'text,label\n"a, b",1\nc,0\n'):
        assert Delimited.of(write(content), ",").notes == []


@pytest.mark.parametrize(
    "content",
    [
        "text,label\n'one, two',pos\nthree,neg\n",
        "'text','label'\n'one, two','pos'\n'three','neg'\n",
        "text,label\n'one, two',pos\n'three',neg\n",
    ],
)
def test_single_quotes_around_fields(write, content) -> None:
    path = write(content)
    assert read(path) == [("one, two", "pos"), ("three", "neg")]
    assert Delimited.of(path, ",").notes == [
        "films.csv: read as with --quoting single: single quotes stand around fields"
    ]


def test_apostrophes_are_text(write) -> None:
    content = "text,label\n'tis good,pos\n'never' he said,neg\n'fine',pos\n"
    assert read(write(content)) == [
        ("'tis good", "pos"),
        ("'never' he said", "neg"),
        ("'fine'", "pos"),
    ]


def test_a_quoted_text_of_several_lines_stays_one(write) -> None:
    content = 'text\tlabel\n"one\ttwo\nand\nthree"\tpos\nfour\tneg\n"five"\tpos\n'
    assert read(write(content, "films.tsv")) == [
        ("one\ttwo\nand\nthree", "pos"),
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_how_a_file_is_encoded(write, encoding) -> None:
    rows = [("na\u00efve \u7535\u5f71", "1"), ("b", "0")]
    content = "text\tlabel\r\n" + "".join(f"{text}\t{label}\r\n" for text, label in rows)
    assert read(write(content.encode(encoding), "films.tsv")) == rows
    objects = "\n".join(json.dumps({"text": a, "label": b}) for a, b in rows)
    assert read(write(objects.encode(encoding), "films.jsonl")) == rows


GZIP, ZIP = b"\x1f\x8b\x08\x00\x00", b"PK\x03\x04\x14\x00\x06"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 81\n"


@pytest.mark.parametrize("name", ["films.csv", "films.jsonl", "films.txt", "films.parquet"])
@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (GZIP, r"gzip: end its name in \.gz"),
        (ZIP, "spreadsheet: .*save it as csv"),
        (POINTER, "pointer of git-lfs"),
    ],
)
def test_a_file_that_is_something_else_is_refused_for_what_it_is(
    write, name, content, saying
) -> None:
    with pytest.raises(UserError, match=saying):
        read(write(content, name))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["films.csv", "films.txt"])
def test_an_encoding_that_is_not_said_is_refused(write, encoding, name) -> None:
    with pytest.raises(UserError, match="UTF-16 without a byte-order mark: save it as UTF-8"):
        read(write("text,label\na,1\nb,0\n".encode(encoding), name))


def test_a_bad_byte_of_another_encoding_is_found_in_its_line(write) -> None:
    with pytest.raises(UserError, match=r"in line 3\): save it as UTF-8"):
        read(write("text,label\na,1\nb,0\n".encode("utf-16")[:-1]))


# As the sets of Zhang et al. 2015 are written, CoLA, or the SMS spam collection.
HEADLESS = [
    ("pos,a good film\nneg,bad\npos,fine\n", ("label", "text")),
    ('"pos","a good film"\n"neg","bad"\n"pos","fine"\n', ("label", "text")),
    ("a1,pos,,a good film\na2,neg,,bad\na3,pos,,fine\n", ("id", "label", "star", "text")),
]


@pytest.mark.parametrize(("content", "columns"), HEADLESS)
def test_no_document_is_eaten_as_a_header(write, content, columns) -> None:
    path = write(content)
    assert read(path, columns=columns) == [("a good film", "pos"), ("bad", "neg"), ("fine", "pos")]
    with pytest.raises(UserError, match=r"if the first line is a document .*--columns"):
        read(path)
    with pytest.raises(UserError, match=r"'pos' of .* is called like one of its labels"):
        read(path, text_column="a good film", label_column="pos")
    with pytest.raises(UserError, match=r"line 1: 1 column and \d fields.: name all columns with"):
        read(path, columns=("text",))


def test_columns_that_are_numbered_are_no_documents(write) -> None:
    content = "0,1\na,0\nb,1\n"  # as pandas writes columns that nobody named
    assert read(write(content), text_column="0", label_column="1") == [("a", "0"), ("b", "1")]


@pytest.mark.parametrize(("columns", "line"), [(None, 3), (("text", "label"), 1)])
def test_a_header_is_no_document(write, columns, line) -> None:
    path = write("text,label\na,1\ntext,label\nb,0\n")
    with pytest.raises(UserError, match=f"its header again in line {line}: delete that line"):
        read(path, columns=columns)


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
        "films.csv: read as with --quoting none: quotes are text",
    ]


# What makes readers fail: separators, quotes, line ends, white space, what looks like another type.
TEXTS = st.text(
    st.sampled_from(list("ab,;|\t\"'\\ \n\r\u00e9\u2028\x00")), max_size=8
) | st.sampled_from(["NA", "null", "007", "1e5", "-1", '""', '"', "a\nb", "x\ty\nz"])
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(["pos", "neg"])), min_size=2, max_size=8)


def slow_reference(
    content: str, separator: str, quoting: str = "doubled"
) -> list[list[str]] | None:
    """Rows character by character, lines of CR, LF or both; None if it is not well-formed.

    Empty lines are no rows.
    """
    quote = {"none": "", "single": "'"}.get(quoting, '"')
    rows, row, text, is_open, was_open, i = [], [], "", False, False, 0
    while i < len(content):
        one, two = content[i], content[i : i + 2]
        if was_open and not is_open and one not in f"{separator}\r\n":
            return None  # text behind a closing quote
        if quoting == "escaped" and two in ('\\"', "\\\\"):
            text, i = text + two[1], i + 1
        elif is_open:
            if two == quote * 2:
                text, i = text + quote, i + 1
            elif one == quote:
                is_open = False
            else:
                text += one
        elif quote and one == quote and not text and not was_open:
            is_open = was_open = True
        elif one == separator:
            row, text, was_open = [*row, text], "", False
        elif one == "\n" or (one == "\r" and (quote or two == "\r\n")):
            i += two == "\r\n"
            rows.append([*row, text])
            row, text, was_open = [], "", False
        else:
            text += one
        i += 1
    rows = [one for one in rows if len(one) > 1 or one[0].strip()]
    return None if is_open or len({len(one) for one in rows}) > 1 else rows


def is_ambiguous(content: str, separator: str) -> bool:
    """Whether a file is well-formed in two dialects that say something else."""
    plain = slow_reference(content, separator, "none")
    header = content.partition("\n")[0]
    named = ["doubled"]
    named += ["escaped"] if '\\"' in content else []
    named += [] if '"' in header else ["none"]
    if plain and all(any(one.startswith("'") for one in row) for row in plain[1:]):
        named.append("single")
    read = {name: slow_reference(content, separator, name) for name in named}
    (best, rows), *others = [(name, rows) for name, rows in read.items() if rows is not None]

    def alike(one: str, other: str, quoting: str) -> bool:
        if best == "doubled" and quoting == "none":
            return other in (one, '"' + one.replace('"', '""') + '"')
        if best == "doubled" and quoting == "escaped":
            one = re.sub(r'\\(["\\])', r"\1", one)
        return one == other

    return any(
        len(other) != len(rows)
        or not all(
            alike(one, two, name)
            for row, another in zip(rows, other, strict=True)
            for one, two in zip(row, another, strict=True)
        )
        for name, other in others
    )


def written(
    rows: Sequence[Sequence[str]], separator: str, quoting: int, end: str, *, reordered: bool
) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)  # pyright: ignore[reportArgumentType]
    order = slice(None, None, -1 if reordered else 1)
    writer.writerows([one[order] for one in [("text", "label"), *rows]])
    return stream.getvalue()


def check_as_the_reference(path: Path, content: str, separator: str) -> None:
    """The texts and labels of a file are those of the reference; an empty text is none.

    Without being told, it is refused if it may say something else, and only then.
    """
    header, *rows = slow_reference(content, separator) or []
    wanted = [dict(zip(header, row, strict=True)) for row in rows]
    path.write_bytes(content.encode())
    expected = [(one["text"], one["label"]) for one in wanted]
    assert read(path, quoting="doubled") == expected
    if is_ambiguous(content, separator):
        with pytest.raises(UserError, match="two ways"):
            read(path)
    else:
        assert read(path) == expected


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
    @settings(max_examples=num, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(**FILES)
    def check(rows, separator, quoting, end, reordered) -> None:
        if len({label for _, label in rows}) < 2:
            rows = [*rows, ("both", "pos"), ("both", "neg")]
        if quoting == csv.QUOTE_MINIMAL and end == "\n":
            # Python's writer leaves a carriage return bare where it ends no line.
            rows = [(text.replace("\r", ""), label) for text, label in rows]
        content = written(rows, separator, quoting, end, reordered=reordered)
        name = "films.tsv" if separator == "\t" else "films.csv"
        check_as_the_reference(tmp_path / name, content, separator)

    check()


@pytest.mark.parametrize("num", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_file_without_quoting_keeps_its_documents(tmp_path: Path, num: int) -> None:
    text = st.text(st.sampled_from(list("ab,\"' \\\u00e9")), min_size=1, max_size=8)
    rows_of = st.lists(st.tuples(text, st.sampled_from("01")), min_size=2, max_size=12)

    @settings(max_examples=num, database=None)
    @given(rows_of, st.booleans())
    def check(rows, reordered) -> None:
        rows = [*rows, ("one", "0"), ("other", "1")]
        order = slice(None, None, -1 if reordered else 1)
        lines = ["\t".join(one[order]) for one in [("text", "label"), *rows]]
        content, path = "\n".join(lines) + "\n", tmp_path / "films.tsv"
        path.write_text(content)
        assert read(path, quoting="none") == rows
        if is_ambiguous(content, "\t"):
            with pytest.raises(UserError, match="two ways"):
                read(path)
            return
        found = read(path)
        if found != rows:
            # All quotes of the file come in pairs, and may as well be the writer's: it is said.
            assert "--quoting none" in Delimited.of(path, "\t").notes[0]
            as_quoted = ['"' + text.replace('"', '""') + '"' for text, _ in found]
            for (text, label), quoted, (own, wanted) in zip(found, as_quoted, rows, strict=True):
                assert label == wanted and own in (text, quoted)

    check()
