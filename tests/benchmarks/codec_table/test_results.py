from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_rel

from benchmarks.codec_table.codec_goals import goals
from benchmarks.codec_table.findings import finite
from benchmarks.codec_table.gradients import Angles
from benchmarks.codec_table.held_out import Figures
from benchmarks.codec_table.kept import Kept
from benchmarks.codec_table.results import Result, difference, result
from benchmarks.codec_table.rows import BASELINE, BEST, DISTILLED, NONE, ROWS

SEEDS = (0, 1, 2)
CES = {"none": (2.37, 2.38, 2.36), "dense": (2.34, 2.35, 2.34), "naive-12": (2.5, 2.5, 2.52)}


def results() -> list[Result]:
    figures = {
        name: [Figures(ce=ce, kl=0.1, ece=0.02, accuracy=0.4) for ce in ces]
        for name, ces in CES.items()
    }
    rows = [row for row in ROWS if row.name in CES]
    return [result(row, SEEDS, figures, baseline=BASELINE, dense=BEST) for row in rows]


def kept(angle: float) -> Kept:
    angles = Angles(num_steps=2, positions=9, step=angle, all_steps=angle, norm=1)
    return Kept(bytes_per_token=1, num_ids=1, kl=math.inf, mass_outside=0.1, angles=angles)


def test_interval_is_that_of_the_paired_t_test() -> None:
    found = difference(CES["none"], CES["dense"])
    assert found.mean == pytest.approx(0.08 / 3)
    interval = ttest_rel(CES["none"], CES["dense"]).confidence_interval(0.95)
    assert found.margin is not None
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx(interval)
    assert found.is_noise == (interval.low <= 0 <= interval.high)


def test_noise_is_an_interval_that_holds_zero() -> None:
    assert difference((1.0, 1.2, 0.9), (1.1, 1.0, 1.0)).is_noise
    assert not difference((2.0, 2.1, 2.0), (1.0, 1.1, 1.0)).is_noise
    assert not difference((2.0,), (1.0,)).is_noise, "of one seed there is no telling"


def test_rows_are_compared_with_others_and_never_with_themselves() -> None:
    none, dense, naive = results()
    assert none.to_baseline is None and dense.to_dense is None
    assert naive.to_baseline is not None and naive.to_dense is not None
    assert naive.to_baseline.mean == pytest.approx(4.11 / 3 * 1 + (7.52 - 7.11 - 4.11) / 3)
    assert naive.mean.ce == pytest.approx(7.52 / 3)
    assert naive.spread == pytest.approx(math.sqrt(2 * 0.02**2 / 3 / 2 * 1) * 1, rel=1e-6)


def test_published_order_meets_the_goals() -> None:
    angles = {"naive-12": kept(58), "sampled-50": kept(4), "distinct-45": kept(2)}
    found = goals(results(), angles, standard=True)
    verdicts = [one.verdict for one in found]
    unmeasured = ["not measured"] * 2
    assert verdicts == ["met", "not measured", "met", *unmeasured, "not measured", "met", "met"]
    tiny = goals(results(), angles, standard=False)
    assert {one.verdict for one in tiny} == {"other sizes", "not measured"}


def test_infinite_figures_are_words_in_json() -> None:
    assert finite({"kl": [math.inf, 1.5], "of": (kept(1).kl,)}) == {
        "kl": ["inf", 1.5],
        "of": ["inf"],
    }


def test_names_are_unique_and_every_baseline_has_its_ghost() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert NONE.alpha == 0 and {row.alpha for row in DISTILLED} == {1.0}
    for row in ROWS:
        if row.is_renormalised:
            assert any(one.codec == row.codec and not one.is_renormalised for one in ROWS)
