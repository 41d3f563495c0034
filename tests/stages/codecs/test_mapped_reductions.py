"""A teacher mapped to a student's ids before its codec cuts, against slow float64 loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.sampled import ReducedSampled, SampledCodec
from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs import sampled as draws
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.measure import reconstruction_error
from teacher_cache.stages.codecs.sampled import uniforms
from teacher_cache.stages.tokens.support import MappedSupport, Support
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap
from tests.reference_codecs import log_softmax, log_sum_exp, realistic_logits
from tests.reference_mapping import head_and_tail, mapped

GRID = (0.5, 1.0, 2.0, 4.0)
NUM_TEACHER, NUM_STUDENT = 60, 40


@pytest.fixture(params=[1, 2**24])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position at a time, and all at once."""
    for module in (reductions, draws):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


def support_of(student_ids: np.ndarray, num_student: int = NUM_STUDENT) -> MappedSupport:
    found = VocabularyMap(
        student_ids=student_ids.astype(np.int64),
        num_student_ids=num_student,
        teacher_sha256="0a",
        student_sha256="0b",
    )
    return MappedSupport(teacher=Support(size=len(student_ids)), vocabulary_map=found)


def one_to_one(seed: int = 0, *, num_mapped: int = 30) -> MappedSupport:
    """Half of the teacher's ids, each to an id of its own; on either side some stay alone."""
    rng = np.random.default_rng(seed)
    ids = np.full(NUM_TEACHER, -1)
    ids[rng.permutation(NUM_TEACHER)[:num_mapped]] = rng.permutation(NUM_STUDENT)[:num_mapped]
    return support_of(ids)


def many_to_one(seed: int = 0) -> MappedSupport:
    return support_of(np.random.default_rng(seed).integers(-1, NUM_STUDENT, NUM_TEACHER))


def reduced(
    codec: TopKCodec, support: MappedSupport, logits: np.ndarray, next_ids: np.ndarray | None = None
) -> ReducedTopK:
    given_ids = np.full(len(logits), NO_LABEL) if next_ids is None else next_ids
    found, unused = reduce_positions(
        codec, support, torch.from_numpy(logits), torch.from_numpy(given_ids)
    )
    assert isinstance(found, ReducedTopK)
    assert (unused == 0).all()
    return found


def shares(found: ReducedTopK, position: int, idx: int) -> tuple[np.ndarray, float]:
    """Masses of head and ghost at the grid's temperature `idx`, as any decoder takes them."""
    head = found.below_max[position].astype(np.float64) / GRID[idx]
    tail = np.array([found.tail_r[position, idx]], np.float64)
    lse = np.logaddexp(log_sum_exp(head), tail)
    return np.exp(head - lse), float(np.exp(tail - lse)[0])


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("top_k", [1, 7, 30])
def test_heads_and_tails_equal_the_reference_at_every_temperature(top_k: int) -> None:
    """At K = 30 the head is all that maps, and the tail exactly what does not."""
    support = one_to_one()
    logits = realistic_logits(9, NUM_TEACHER) + 30
    logits[2, 50:] = -np.inf
    codec = TopKCodec(support_size=NUM_STUDENT, top_k=top_k, temperatures=GRID)
    found = reduced(codec, support, logits)
    student_ids = support.student_ids.numpy()
    for position, row in enumerate(logits):
        for idx, temperature in enumerate(GRID):
            wanted = head_and_tail(row, student_ids, NUM_STUDENT, temperature, top_k)
            head, tail = shares(found, position, idx)
            assert found.ids[position].tolist() == wanted.ids.tolist()
            np.testing.assert_allclose(head, wanted.head, rtol=2e-4, atol=1e-9)
            np.testing.assert_allclose(tail, wanted.tail, rtol=2e-4)
            if top_k == 30:
                unmatched = mapped(row, student_ids, NUM_STUDENT, temperature).unmatched
                np.testing.assert_allclose(tail, unmatched, rtol=2e-4)


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("seed", range(3))
def test_masses_of_several_teacher_ids_add(seed: int) -> None:
    support = many_to_one(seed)
    assert not support.is_one_to_one
    logits = realistic_logits(9, NUM_TEACHER, seed=seed)
    codec = TopKCodec(support_size=NUM_STUDENT, top_k=12, temperatures=GRID)
    found = reduced(codec, support, logits)
    student_ids = support.student_ids.numpy()
    for position, row in enumerate(logits):
        for idx, temperature in enumerate(GRID):
            wanted = head_and_tail(row, student_ids, NUM_STUDENT, temperature, 12)
            head, tail = shares(found, position, idx)
            assert found.ids[position].tolist() == wanted.ids.tolist()
            # What lies in the head is right at every temperature, each share of it at 1.
            np.testing.assert_allclose(tail, wanted.tail, rtol=3e-4)
            if temperature == 1:
                np.testing.assert_allclose(head, wanted.head, rtol=3e-4)


@pytest.mark.parametrize("support", [one_to_one(), many_to_one()], ids=["one", "many"])
def test_the_slopes_are_those_of_the_tails(support: MappedSupport) -> None:
    """`tail_m` is `d r / d(1/T)`, where `r` gives the ghost its exact mass beside the head."""
    logits = realistic_logits(5, NUM_TEACHER)
    codec = TopKCodec(support_size=NUM_STUDENT, top_k=5, temperatures=GRID)
    found = reduced(codec, support, logits)
    student_ids = support.student_ids.numpy()

    def wanted_r(position: int, inverse: float) -> float:
        wanted = head_and_tail(logits[position], student_ids, NUM_STUDENT, 1 / inverse, 5)
        head = log_sum_exp(found.below_max[position].astype(np.float64) * inverse)
        return float(head + np.log(wanted.tail) - np.log(wanted.head.sum()))

    for position in range(len(logits)):
        for idx, temperature in enumerate(GRID):
            inverse, step = 1 / temperature, 1e-5
            slope = (wanted_r(position, inverse + step) - wanted_r(position, inverse - step)) / (
                2 * step
            )
            np.testing.assert_allclose(found.tail_m[position, idx], slope, rtol=1e-3, atol=1e-3)


def test_the_most_probable_token_may_have_no_student_id() -> None:
    support = one_to_one()
    none = int(np.flatnonzero(support.student_ids.numpy() < 0)[0])
    logits = realistic_logits(4, NUM_TEACHER)
    logits[:, none] = 40
    codec = TopKCodec(support_size=NUM_STUDENT, top_k=8, temperatures=GRID)
    found = reduced(codec, support, logits)
    assert (found.below_max[:, 0] == 0).all() and (found.tail_r[:, 1] > 20).all()
    encoded = codec.encode(found)
    decoded = codec.decode(codec.expand(encoded), 2.0)
    student_ids = support.student_ids.numpy()
    for position, row in enumerate(logits):
        wanted = head_and_tail(row, student_ids, NUM_STUDENT, 2.0, 8)
        log_probs = np.asarray(decoded.log_probs)[position]
        np.testing.assert_allclose(log_probs, np.log(wanted.head), atol=0.05)
        tail = np.asarray(decoded.tail_log_prob)[position]
        assert float(np.exp(tail)) == pytest.approx(wanted.tail, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"is_exact": True}, {"top_p": 0.4}])
def test_the_first_and_the_next_token_stay_the_teachers(changes: dict[str, object]) -> None:
    logits = realistic_logits(5, NUM_TEACHER)
    next_ids = np.array([NO_LABEL, 0, 59, 7, 30])
    codec = TopKCodec(support_size=NUM_STUDENT, top_k=6, temperatures=GRID)
    codec = replace(codec, **changes)  # pyright: ignore[reportArgumentType]
    support = one_to_one()
    found = reduced(codec, support, logits, next_ids)
    exact = log_softmax(logits.astype(np.float64))
    np.testing.assert_allclose(found.top1_log_prob, exact.max(-1), rtol=1e-5, atol=1e-5)
    wanted = [0.0, *(exact[idx, next_ids[idx]] for idx in range(1, 5))]
    np.testing.assert_allclose(found.next_log_prob, wanted, rtol=1e-5, atol=1e-5)
    stored = codec.encode(found)
    if codec.is_exact:
        for position, row in enumerate(logits):
            at_one = head_and_tail(row, support.student_ids.numpy(), NUM_STUDENT, 1.0, 6)
            log_probs = stored["topk_log_probs"][position]
            np.testing.assert_allclose(log_probs, np.log(at_one.head), rtol=2e-3, atol=2e-3)
    if codec.top_p is not None:
        for position, row in enumerate(logits):
            at_one = head_and_tail(row, support.student_ids.numpy(), NUM_STUDENT, 1.0, 6)
            size = min(6, 1 + int((np.cumsum(at_one.head) < 0.4).sum()))
            assert stored["topk_sizes"][position] == size


@settings(max_examples=40)
@given(st.data())
def test_head_and_ghost_hold_all_mass_of_any_map(data: st.DataObject) -> None:
    ids = data.draw(
        st.lists(st.integers(-1, 5), min_size=9, max_size=9).filter(lambda one: max(one) >= 0)
    )
    support = support_of(np.array(ids), 6)
    top_k = data.draw(st.integers(1, support.num_reached))
    seed = data.draw(st.integers(0, 50))
    logits = (3 * np.random.default_rng(seed).standard_normal((3, 9))).astype(np.float32)
    codec = TopKCodec(support_size=6, top_k=top_k, temperatures=GRID)
    found = reduced(codec, support, logits)
    for position, row in enumerate(logits):
        for idx, temperature in enumerate(GRID):
            wanted = head_and_tail(row, np.array(ids), 6, temperature, top_k)
            head, tail = shares(found, position, idx)
            assert tail == pytest.approx(wanted.tail, rel=1e-3, abs=1e-6)
            assert head.sum() == pytest.approx(wanted.head.sum(), rel=1e-3)
            if support.is_one_to_one or temperature == 1:
                np.testing.assert_allclose(head, wanted.head, rtol=1e-3, atol=1e-6)


def draws_from(
    codec: SampledCodec, support: MappedSupport, logits: np.ndarray, drawn_at: np.ndarray
) -> ReducedSampled:
    nexts = torch.full((len(logits),), -1)
    found, _ = reduce_positions(codec, support, torch.from_numpy(logits), nexts, drawn_at=drawn_at)
    assert isinstance(found, ReducedSampled)
    return found


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("support", [one_to_one(), many_to_one()], ids=["one", "many"])
def test_draws_are_the_teachers_mapped(support: MappedSupport) -> None:
    codec = SampledCodec(
        support_size=NUM_STUDENT,
        num_draws=20,
        temperatures=GRID,
        draw_temperature=2.0,
        has_unmatched=True,
    )
    logits = realistic_logits(8, NUM_TEACHER)
    drawn_at = uniforms(b"s" * 16, 8, 20, seed=0)
    found = draws_from(codec, support, logits, drawn_at)
    student_ids = support.student_ids.numpy()
    for position, row in enumerate(logits):
        cumulative = np.cumsum(np.exp(log_softmax(row.astype(np.float64) / 2.0)))
        drawn = student_ids[np.searchsorted(cumulative, drawn_at[position], side="right")]
        ids, counts = np.unique(drawn[drawn >= 0], return_counts=True)
        size = found.sizes[position]
        assert found.ids[position, :size].tolist() == ids.tolist()
        assert found.counts[position, :size].tolist() == counts.tolist()
        assert not found.counts[position, size:].any()
        at_draws = mapped(row, student_ids, NUM_STUDENT, 2.0)
        np.testing.assert_allclose(
            found.log_probs[position, :size], np.log(at_draws.masses[ids]), atol=1e-4
        )
        below = row.astype(np.float64) - row.max()
        for idx, temperature in enumerate(GRID):
            assert found.unmatched is not None
            wanted = mapped(row, student_ids, NUM_STUDENT, temperature).unmatched
            np.testing.assert_allclose(np.exp(found.unmatched[position, idx]), wanted, rtol=1e-4)
            np.testing.assert_allclose(
                found.lse[position, idx], log_sum_exp(below / temperature), atol=1e-4
            )
    stored = codec.encode(found)
    assert stored["sampled_unmatched"].shape == (8, 4)
    assert codec.bytes_per_token(10) == replace(codec, has_unmatched=False).bytes_per_token(10) + 8


def test_shares_of_the_draws_are_those_of_the_mapped_distribution() -> None:
    support = many_to_one(1)
    codec = SampledCodec(
        support_size=NUM_STUDENT, num_draws=255, temperatures=(1.0,), has_unmatched=True
    )
    logits = np.repeat(realistic_logits(1, NUM_TEACHER, seed=3), 200, axis=0)
    found = draws_from(codec, support, logits, uniforms(b"t" * 16, 200, 255, seed=0))
    share = np.zeros(NUM_STUDENT)
    np.add.at(share, found.ids, found.counts / (200 * 255))
    wanted = mapped(logits[0], support.student_ids.numpy(), NUM_STUDENT, 1.0)
    np.testing.assert_allclose(share, wanted.masses, atol=0.008)  # 4 standard deviations of 51,000
    assert 1 - share.sum() == pytest.approx(wanted.unmatched, abs=0.008)


def test_a_position_may_have_drawn_nothing_that_maps() -> None:
    support = one_to_one()
    none = int(np.flatnonzero(support.student_ids.numpy() < 0)[0])
    logits = realistic_logits(2, NUM_TEACHER)
    logits[0, none] = 60
    codec = SampledCodec(support_size=NUM_STUDENT, num_draws=9, has_unmatched=True)
    found = draws_from(codec, support, logits, uniforms(b"u" * 16, 2, 9, seed=0))
    assert found.sizes[0] == 0 and not found.counts[0].any() and found.sizes[1] > 0
    decoded = codec.decode(codec.expand(codec.encode(found)), 1.0)
    assert float(np.asarray(decoded.tail_log_prob)[0]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "codec",
    [
        TopKCodec(support_size=NUM_STUDENT, top_k=20),
        TopKCodec(support_size=NUM_STUDENT, top_k=20, is_exact=True, top_p=0.5),
        SampledCodec(support_size=NUM_STUDENT, num_draws=9, has_unmatched=True),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_probe_compares_with_the_mapped_teacher(
    codec: TopKCodec | SampledCodec, temperature: float
) -> None:
    support, logits = one_to_one(), realistic_logits(12, NUM_TEACHER)
    error = reconstruction_error(
        codec,
        support,
        torch.from_numpy(logits),
        temperature=temperature,
        drawn_at=uniforms(b"v" * 16, 12, 9, seed=0),
    )
    found = [mapped(row, support.student_ids.numpy(), NUM_STUDENT, temperature) for row in logits]
    unmatched = float(np.mean([one.unmatched for one in found]))
    assert error.coverage == pytest.approx(1 - unmatched, abs=1e-6)
    assert error.lost_mass >= unmatched - 1e-9
    assert 0 <= error.kl < 1e-3
    assert error.to_json()["coverage"] == float(f"{error.coverage:.4g}")


def test_a_merged_ids_share_off_its_temperature_is_measured() -> None:
    """Two teacher ids of equal mass: at T = 2 their sum is not the power of their sum at 1."""
    support = support_of(np.array([0, 0, 1, -1]), 3)
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    codec = TopKCodec(support_size=3, top_k=2)
    at_one, at_two = (
        reconstruction_error(codec, support, logits, temperature=temperature).kl
        for temperature in (1.0, 2.0)
    )
    assert at_one < 1e-6 < 1e-3 < at_two


def test_whole_distributions_are_not_mapped() -> None:
    with pytest.raises(ValueError, match="whole distributions"):
        reduce_positions(
            DenseCodec(support_size=NUM_STUDENT),
            one_to_one(),
            torch.zeros(1, NUM_TEACHER),
            torch.zeros(1).long(),
        )


def test_nothing_to_map_is_refused() -> None:
    support = support_of(np.array([0, -1, -1]), 2)
    logits = np.array([[-np.inf, 0.0, 1.0]], np.float32)
    with pytest.raises(UserError, match="at 1 positions the teacher rules out every token"):
        reduced(TopKCodec(support_size=2, top_k=1), support, logits)
