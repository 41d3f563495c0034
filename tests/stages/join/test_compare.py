import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.join.compare import check, check_position_map
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.report import JoinReport, verified_line, ways_out
from teacher_cache.stages.join.teacher_folder import CachedTokenization
from teacher_cache.stages.student.position_map import PositionMap
from tests.stages.join.conftest import MAX_LENGTH


def join(
    cached: CachedTokenization,
    student: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    longest_sample: int = MAX_LENGTH,
) -> JoinReport:
    config = JoinConfig(max_length=max_length)
    return check(cached, student, config=config, longest_sample=longest_sample)


def names(report: JoinReport) -> list[str]:
    return [difference.name for difference in report.differences]


def with_files(source: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a tokenizer whose tokenizer.json was changed."""
    folder.mkdir(parents=True)
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_tokenizer_equals_itself(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    report = join(cached_bert, bert)
    assert report.verified
    assert report.accepted("error")
    assert verified_line(report) == (
        "✓ tokenization verified: tokenizer files, 30,522 ids, 5 special tokens, normaliser, "
        "max length 32 (longest cached sample 32), truncation and padding side, "
        "5 documents re-tokenised"
    )


def test_another_normaliser_is_waivable_with_the_ids_that_follow_from_it(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    backend: Any = bert.backend_tokenizer
    backend.normalizer = BertNormalizer(lowercase=False)
    report = join(cached_bert, bert)
    assert names(report) == ["tokenizer files", "normaliser", "documents re-tokenised"]
    files, normaliser, probe = report.differences
    assert files.student.endswith("other normalizer")
    assert '"lowercase":true' in normaliser.cache
    assert '"lowercase":false' in normaliser.student
    assert "position 1: 1996 'the'" in probe.cache
    assert probe.student == "100 '[UNK]'; 3 of 5 documents differ"
    assert report.waivable
    assert not report.accepted("error")
    assert report.accepted("warn")
    assert any("--on-mismatch warn" in way for way in ways_out(report))
    with pytest.raises(ValueError, match="not verified: tokenizer files"):
        verified_line(report)


def test_a_swapped_id_is_never_waivable(
    cached_bert: CachedTokenization, minilm_dir: Path, tmp_path: Path
) -> None:
    def swap(tokenizer: dict) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["joy"], vocab["film"] = vocab["film"], vocab["joy"]

    student = AutoTokenizer.from_pretrained(with_files(minilm_dir, tmp_path / "swapped", swap))
    report = join(cached_bert, student)
    assert names(report) == ["tokenizer files", "id-to-string table", "documents re-tokenised"]
    files, table, probe = report.differences
    assert files.student.endswith("other model")
    assert table.cache == "30,522 ids; id 2143 is 'film'"
    assert table.student == (
        "30,522 ids; id 2143 is 'joy'; 2 ids differ, 30,522 strings are shared"
    )
    assert (files.waivable, table.waivable, probe.waivable) == (True, False, False)
    assert not report.accepted("warn")
    assert not any("--on-mismatch" in way for way in ways_out(report))


def test_an_added_special_token_is_never_waivable(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    bert.add_special_tokens({"additional_special_tokens": ["[SPEAKER]"]})
    report = join(cached_bert, bert)
    assert names(report) == ["tokenizer files", "id-to-string table", "special token extra_0"]
    _, table, special = report.differences
    assert table.cache == "30,522 ids; id 30522 is nothing"
    assert (special.cache, special.student) == ("none", "'[SPEAKER]', id 30522")
    assert not report.accepted("warn")


def test_a_role_with_another_token_is_never_waivable(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    bert.pad_token = "[MASK]"
    report = join(cached_bert, bert)
    assert names(report) == ["special token pad_token"]
    assert report.differences[0].student == "'[MASK]', id 103"
    assert not report.accepted("warn")


def test_a_padding_token_named_on_one_side_only_is_no_difference(
    gpt2_tokenizer: PreTrainedTokenizerBase,
    write_cached: Callable[[Path, PreTrainedTokenizerBase], CachedTokenization],
    tmp_path: Path,
) -> None:
    cached = write_cached(tmp_path, gpt2_tokenizer)
    student = AutoTokenizer.from_pretrained(tmp_path)
    student.pad_token = student.eos_token
    assert join(cached, student).verified


def test_another_family_is_refused_with_the_overlap(
    cached_bert: CachedTokenization, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    report = join(cached_bert, gpt2_tokenizer)
    table = next(item for item in report.differences if item.name == "id-to-string table")
    assert table.cache == "30,522 ids; id 0 is '[PAD]'"
    assert table.student.startswith("50,257 ids; id 0 is '!'; 50,25")
    shared = set(cached_bert.table) & set(gpt2_tokenizer.get_vocab())
    assert table.student.endswith(f" ids differ, {len(shared):,} strings are shared")
    assert {"special token cls_token", "normaliser", "documents re-tokenised"} <= set(names(report))
    assert not report.accepted("warn")


@pytest.mark.parametrize(
    ("max_length", "longest_sample", "expected"),
    [
        (16, 32, ["max length", "documents re-tokenised"]),  # cuts cached samples
        (64, 32, ["max length", "documents re-tokenised"]),  # sees what the teacher did not
        (32, 32, []),
        (None, 32, []),
    ],
)
def test_max_length(
    cached_bert: CachedTokenization,
    bert: PreTrainedTokenizerBase,
    max_length: int | None,
    longest_sample: int,
    expected: list[str],
) -> None:
    report = join(cached_bert, bert, max_length=max_length, longest_sample=longest_sample)
    assert names(report) == expected
    assert report.accepted("warn")


@pytest.mark.parametrize(
    ("max_length", "expected"), [(19, ["max length"]), (20, []), (31, []), (100, [])]
)
def test_a_limit_that_no_cached_sample_reaches_is_free(
    cached_bert: CachedTokenization,
    bert: PreTrainedTokenizerBase,
    max_length: int,
    expected: list[str],
) -> None:
    short = replace(cached_bert, probe=tuple(d for d in cached_bert.probe if len(d.input_ids) < 19))
    assert names(join(short, bert, max_length=max_length, longest_sample=20)) == expected


def test_the_tokenizers_own_limit_counts_where_cached_samples_are_longer(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    bert.model_max_length = 256
    assert join(cached_bert, bert).verified
    bert.model_max_length = 16
    report = join(cached_bert, bert)
    assert names(report) == ["tokenizer's model_max_length"]
    assert report.differences[0].student == "16 tokens"
    assert report.accepted("warn")


def test_sides_are_waivable(cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase) -> None:
    bert.padding_side = "left"
    report = join(cached_bert, bert)
    assert names(report) == ["padding side"]
    bert.truncation_side = "left"
    report = join(cached_bert, bert)
    assert names(report) == ["truncation side", "padding side", "documents re-tokenised"]
    assert report.differences[-1].student.endswith("1 of 5 documents differ")
    assert report.accepted("warn")


def test_ids_that_end_early_are_named(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    document = cached_bert.probe[0]
    cut = document.model_copy(update={"input_ids": document.input_ids[:-1]})
    report = join(replace(cached_bert, probe=(cut,)), bert)
    assert names(report) == ["documents re-tokenised"]
    (difference,) = report.differences
    assert difference.cache.endswith(f"position {len(cut.input_ids)}: no token")
    assert difference.student == "102 '[SEP]'; 1 of 1 documents differ"


def test_comparing_leaves_the_record_as_it_was(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    assert join(cached_bert, bert, max_length=16) == join(cached_bert, bert, max_length=16)
    assert join(cached_bert, bert).verified


def test_the_position_map_is_checked_at_every_length_once() -> None:
    class Map:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def check(self, length: int) -> None:
            if length == 9:
                raise ValueError("position 3 occurs twice")
            self.seen.append(length)

    position_map = Map()
    check_position_map(position_map, [5, 2, 5, 3, 2])
    assert position_map.seen == [2, 3, 5]
    with pytest.raises(CheckFailed, match=r"samples of 9 tokens .*occurs twice"):
        check_position_map(position_map, [9])


def test_the_students_own_position_maps_pass() -> None:
    for position_map in (
        PositionMap(),
        PositionMap(mode="move_first_to_last"),
        PositionMap(mode="append", token_id=50_256),
    ):
        check_position_map(position_map, [1, 2, 5, 32])


def test_a_max_length_without_room_for_text_is_the_users_error(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match="--max-length 2 leaves no room"):
        join(cached_bert, bert, max_length=2)


def test_a_document_of_which_nothing_is_left_differs(
    cached_bert: CachedTokenization, bert: PreTrainedTokenizerBase
) -> None:
    blank = cached_bert.probe[0].model_copy(update={"text": " "})
    report = join(replace(cached_bert, probe=(blank,)), bert)
    assert report.differences[0].student == "no token; 1 of 1 documents differ"


def test_defaults_and_what_the_config_refuses() -> None:
    assert JoinConfig().model_dump() == {
        "student_tokenizer": None,
        "max_length": None,
        "on_mismatch": "error",
        "align": "auto",
    }
    for wrong in ({"max_length": 0}, {"on_mismatch": "ignore"}, {"tokenizer": "x"}):
        with pytest.raises(ValidationError):
            JoinConfig.model_validate(wrong)
