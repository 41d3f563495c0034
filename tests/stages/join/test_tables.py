from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.stages.tokens.relation import compare_tables, string_at

tables = st.lists(st.one_of(st.none(), st.sampled_from("abcdefgh")), max_size=12)


@given(cache=tables, student=tables)
def test_equals_a_slow_loop(cache: list[str | None], student: list[str | None]) -> None:
    differing = []
    for token_id in range(max(len(cache), len(student))):
        ours = cache[token_id] if token_id < len(cache) else None
        theirs = student[token_id] if token_id < len(student) else None
        if ours != theirs:
            differing.append((token_id, ours, theirs))
    result = compare_tables(cache, student)
    assert result.num_differing == len(differing)
    first = (result.first_differing_id, result.cache_string, result.student_string)
    assert first == (differing[0] if differing else (None, None, None))
    shared = {string for string in cache if string is not None and string in student}
    assert result.num_shared == len(shared)


def test_names_an_id_with_its_string() -> None:
    assert string_at(["a", None], 0) == "0 'a'"
    assert string_at(["a", None], 1) == "1 (no string)"
    assert string_at(["a", None], 5) == "5 (no string)"
    assert string_at(["a", None], None) == "no token"
