"""Draws that are mapped: their mean is the mapped teacher's, from either kind of cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.draws import MappedDraws, mapped_draws_kl
from teacher_cache.stages.losses.objective import StepTotals, distillation_objective
from teacher_cache.stages.training.targets import CachedTargets, FixedMap, MappedTargets

NUM_TEACHER, NUM_STUDENT, NUM_DRAWS = 7, 6, 5
TO = [
    2,
    -1,
    0,
    4,
    -1,
    2,
    3,
]  # two to one, two to none; 1 and 5 of the student's are reached by none
GRID = (1.0, 2.0)
NUM_POSITIONS = 4000


def logits(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 1.5 * torch.randn(NUM_TEACHER, generator=generator, dtype=torch.float64)
    student = torch.randn(NUM_STUDENT, generator=generator, dtype=torch.float64)
    return teacher, student


def mapped(teacher: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """[V_s] the teacher's probabilities of the student's ids, and of what has none."""
    p = (teacher / t).softmax(0)
    found = torch.zeros(NUM_STUDENT, dtype=p.dtype)
    for one, to in zip(p, TO, strict=True):
        if to >= 0:
            found[to] += one
    return found, 1 - found.sum()


def stored(teacher: Tensor, *, is_captured: bool) -> tuple[SampledCodec, dict[str, Tensor]]:
    """Many positions of one teacher, each with its own draws, as a cache expands them.

    Float32 in place of float16: its rounding is tested with the codec.
    """
    outcomes = teacher.softmax(0)
    if is_captured:
        found, rest = mapped(teacher, 1.0)
        outcomes = torch.cat([found, rest[None]])
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.multinomial(NUM_DRAWS, outcomes.numpy(), NUM_POSITIONS))
    below = teacher - teacher.max()
    lse = torch.stack([(below / t).logsumexp(0) for t in GRID])
    fields: dict[str, Tensor] = {}
    if is_captured:
        counts = counts[:, :-1]
        unmatched = torch.stack([mapped(teacher, t)[1].log() for t in GRID])
        fields["sampled_unmatched"] = unmatched.expand(NUM_POSITIONS, -1)
    order = (counts > 0).long().argsort(dim=1, descending=True, stable=True)
    sizes = (counts > 0).sum(dim=1)
    fields |= {
        "sampled_ids": order,
        "sampled_counts": counts.gather(1, order),
        "sampled_log_probs": outcomes.log()[order],
        "sampled_sizes": sizes,
        "sampled_lse": lse.expand(NUM_POSITIONS, -1),
    }
    codec = SampledCodec(
        support_size=NUM_STUDENT if is_captured else NUM_TEACHER,
        num_draws=NUM_DRAWS,
        temperatures=GRID,
        has_unmatched=is_captured,
    )
    return codec, fields


def targets(teacher: Tensor, t: float, *, is_captured: bool) -> MappedDraws:
    codec, fields = stored(teacher, is_captured=is_captured)
    student_ids = torch.arange(NUM_STUDENT) if is_captured else torch.tensor(TO)
    reached = torch.zeros(NUM_STUDENT, dtype=torch.bool)
    reached[[to for to in TO if to >= 0]] = True
    cached = CachedTargets(
        codec=codec, stored=fields, temperature=t, num_outcomes=codec.support_size
    )
    fixed = FixedMap(student_ids=student_ids, reached=reached)
    found = MappedTargets(cached=cached, fixed=fixed).at_positions(slice(0, NUM_POSITIONS))
    assert isinstance(found, MappedDraws)
    return found


@pytest.mark.parametrize(
    ("is_captured", "t"),
    # Two ids that are one at capture have one value there: only its own temperature is exact.
    [(False, 1.0), (False, 2.0), (True, 1.0)],
)
def test_the_mean_gradient_is_the_mapped_teachers(is_captured: bool, t: float) -> None:
    teacher, student = logits(1)
    found = targets(teacher, t, is_captured=is_captured)
    leaf = student.expand(NUM_POSITIONS, -1).clone().requires_grad_()
    values = mapped_draws_kl(leaf, found)
    values.sum().backward()
    assert leaf.grad is not None

    p, rest = mapped(teacher, t)
    one = student.clone().requires_grad_()
    log_q = (one / t).log_softmax(0)
    reached = found.reached
    exact = (p[reached] * (p[reached].log() - log_q[reached])).sum()
    exact = exact + rest * (rest.log() - log_q[~reached].logsumexp(0))
    exact.backward()
    assert one.grad is not None
    error = (leaf.grad.mean(0) - one.grad).abs()
    standard = leaf.grad.std(0) / math.sqrt(NUM_POSITIONS)
    assert (error < 4 * standard + 1e-4).all(), error / standard
    assert standard.max() < 0.3 * one.grad.abs().max(), "they tell right from wrong"
    if is_captured:  # one value an id, and the unmatched mass is known: the value is unbiased, too
        value_error = values.detach().std() / math.sqrt(NUM_POSITIONS)
        assert abs(values.detach().mean() - exact.detach()) < 4 * value_error + 1e-4


def test_where_all_is_reached_a_draw_without_an_id_counts_for_nothing() -> None:
    teacher, student = logits(2)
    found = targets(teacher, 1.0, is_captured=False)
    everywhere = torch.zeros_like(found.reached)
    everywhere[found.reached] = True
    leaf = student.expand(NUM_POSITIONS, -1).clone().requires_grad_()
    values = mapped_draws_kl(leaf, found, support=everywhere)
    drawn = (found.weights[0] > 0).nonzero()[:, 0].tolist()
    log_q = student.masked_fill(~everywhere, -math.inf).log_softmax(0)
    cross = sum(float(found.weights[0, i]) * float(log_q[found.ids[0, i]]) for i in drawn)
    assert float(values[0].detach()) == pytest.approx(float(found.information[0]) - cross)
    values.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad[:, ~everywhere] == 0).all()


def test_other_divergences_take_the_drawn_ids_as_a_head() -> None:
    teacher, student = logits(3)
    found = targets(teacher, 1.0, is_captured=False).at_positions(slice(0, 50))
    terms = distillation_objective(
        student.expand(50, -1),
        found,
        None,
        config=ObjectiveConfig(divergence="jsd", unlabeled_alpha=1.0, temperature=1.0),
        totals=StepTotals(num_unlabeled=50),
    )
    assert terms.agreement is None and terms.effective_draws is not None
    assert 0 < float(terms.kd) < math.log(2)
    tail = found.head.tail_log_prob
    assert tail is not None
    total = found.head.log_probs.exp().sum(-1) + tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_positions_and_outcomes_must_agree() -> None:
    found = targets(logits(1)[0], 1.0, is_captured=False)
    for shape in ((3, NUM_STUDENT), (NUM_POSITIONS, NUM_STUDENT + 1)):
        with pytest.raises(ValueError, match="against drawn ids of shape"):
            mapped_draws_kl(torch.zeros(shape), found)
