"""The temperatures a cache serves, and what is stored at each: exact there, interpolated between.

The tail is kept relative to the largest logit (docs/maths.md, section 1):
`r_T = logsumexp over i outside the head of (z_i - z_max) / T`, and its slope in 1/T, the tail's
mean `m_T = E[z - z_max]`. Between two temperatures r_T is the cubic Hermite polynomial in 1/T.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from teacher_cache.cache.codecs.arrays import Array, cast, namespace
from teacher_cache.cache.errors import UserError

DEFAULT_TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse a grid that is empty, not ascending, or not of positive numbers.

    Raises:
        UserError: naming what was given.
    """
    ascending = all(low < high for low, high in itertools.pairwise(temperatures))
    if not temperatures or not ascending or not 0 < temperatures[0] <= temperatures[-1] < math.inf:
        raise UserError(
            f"--temperatures {named(temperatures) or 'none'} is no grid: give positive numbers in "
            f"ascending order, as {named(DEFAULT_TEMPERATURES)}"
        )


def require_within(temperature: float, temperatures: Sequence[float]) -> None:
    """Refuse a temperature outside the grid: nothing cached says what the tail holds there.

    Raises:
        UserError: naming the grid.
    """
    if not temperatures[0] <= temperature <= temperatures[-1]:
        raise UserError(
            f"temperature {temperature:g} is outside the grid of the cache ({named(temperatures)}):"
            " give one within it, or make the cache again with --temperatures that reach it"
        )


def interpolated(
    values: Array, slopes: Array, temperatures: Sequence[float], temperature: float
) -> Array:
    """`values` at a temperature, [...] float64: the stored ones on the grid, Hermite between.

    Args:
        values: [..., G], r_T; -inf (at every temperature) where there is no tail.
        slopes: [..., G], d value / d(1/T).
        temperatures: [G] ascending.
        temperature: within the grid.

    Raises:
        UserError: if it is outside.
    """
    require_within(temperature, temperatures)
    if temperature in temperatures:
        return cast(values[..., list(temperatures).index(temperature)], "float64")
    right = bisect.bisect(temperatures, temperature)
    betas = [1 / temperatures[idx] for idx in (right - 1, right)]
    width = betas[1] - betas[0]
    x = (1 / temperature - betas[0]) / width  # 0 at the lower temperature, 1 at the upper
    xp = namespace(values)
    (v0, v1), (s0, s1) = (
        [cast(one[..., idx], "float64") for idx in (right - 1, right)] for one in (values, slopes)
    )
    # 0 < x < 1: all four weights are not zero, and a tail of -inf stays -inf.
    step = v1 - xp.where(v0 == -xp.inf, 0.0, v0)
    cubic = v0 + x * x * (3 - 2 * x) * step
    return cubic + width * x * (1 - x) * ((1 - x) * s0 - x * s1)


def named(temperatures: Sequence[float]) -> str:
    """As the command line takes them."""
    return ",".join(f"{temperature:g}" for temperature in temperatures)


def missing_temperature(there: Sequence[float], asked: Sequence[float]) -> str | None:
    """Why one grid cannot be had from another; None where all of it is there."""
    for temperature in asked:
        if temperature not in there:
            grid = ", ".join(f"{one:g}" for one in there)
            return f"temperature {temperature:g} is not one of its grid ({grid})"
    return None
