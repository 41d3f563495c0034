import pytest

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.stages.tokens.relation import relate
from teacher_cache.stages.tokens.token_bytes import TokenBytes


def test_a_table_with_itself_is_identical(smollm2_table: TokenBytes) -> None:
    relation = relate(smollm2_table.keys, smollm2_table.keys)
    assert relation.kind == "identical"
    assert relation.num_same_id == relation.num_shared == 49_152
    assert relation.share_differing_below_cut == 0
    relation.require_same_ids("--align truncate")


def test_a_padded_embedding(smollm2_table: TokenBytes) -> None:
    for rows in ({"teacher_rows": 50_000}, {"student_rows": 50_000}):
        relation = relate(smollm2_table.keys, smollm2_table.keys, **rows)
        assert relation.kind == "padded"
        relation.require_same_ids("--align truncate")
    # A gap in the table is padding too: the teacher says nothing with that id.
    assert relate(["a", None, None], ["a", "b"]).kind == "padded"


def test_a_token_that_only_the_teacher_has_is_no_padding() -> None:
    assert relate(["a", "b"], ["a", "b", "c"]).kind == "padded"
    assert relate(["a", "b", "c"], ["a", "b"]).kind == "different"
    assert relate(["a", "b"], ["a", None]).kind == "different"


def test_different_tables_are_refused_with_the_overlap(
    smollm2_table: TokenBytes, gpt2_table: TokenBytes
) -> None:
    relation = relate(smollm2_table.keys, gpt2_table.keys)
    assert relation.kind == "different"
    same = [a == b for a, b in zip(smollm2_table.keys, gpt2_table.keys, strict=False)]
    assert relation.num_same_id == sum(same)
    assert relation.num_shared == len(set(smollm2_table.keys) & set(gpt2_table.keys))
    assert relation.share_differing_below_cut == 1 - sum(same) / 49_152
    with pytest.raises(CheckFailed) as caught:
        relation.require_same_ids("--align truncate")
    message = str(caught.value)
    assert f"{relation.num_shared:,} strings are shared" in message
    assert "--align map" in message and "--align spans" in message


def test_what_cutting_qwen_at_smollm2s_size_would_have_meant(
    qwen_table: TokenBytes, smollm2_table: TokenBytes
) -> None:
    relation = relate(qwen_table.keys, smollm2_table.keys, teacher_rows=151_936)
    assert relation.kind == "different"
    assert relation.num_below_cut == 49_152
    assert relation.num_differing_below_cut == 49_135  # but for 17, every id below the cut
    assert relation.share_differing_below_cut == pytest.approx(0.99965, abs=1e-5)


def test_rows_are_no_fewer_than_ids() -> None:
    with pytest.raises(ValueError, match="too few"):
        relate(["a", "b"], ["a"], teacher_rows=1)
