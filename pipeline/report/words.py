"""How a report says numbers and names: each figure with its words, places and unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f}"


def places(num: int) -> Callable[[float], str]:
    """So many behind the point."""
    return lambda value: f"{value:,.{num}f}"


def of_any_size(value: float) -> str:
    """To the hundredth where it is small, whole where it is large."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A figure that models have.

    Attributes:
        name: in rows and logs.
        words: of it in a heading or an axis.
        shown: a value in words.
        is_percent: whether an axis shows it as a percentage.
        of_nats: the figure of nats of which it is a function; None where it has its own intervals.
    """

    name: str
    words: str
    shown: Callable[[float], str]
    is_percent: bool = False
    of_nats: str | None = None


KNOWN = {
    one.name: one
    for one in (
        Quantity(name="accuracy", words="accuracy, %", shown=percent, is_percent=True),
        Quantity(name="f1", words="F1, %", shown=percent, is_percent=True),
        Quantity(name="micro_f1", words="micro F1, %", shown=percent, is_percent=True),
        Quantity(name="macro_f1", words="macro F1, %", shown=percent, is_percent=True),
        Quantity(name="exact_match", words="all labels right, %", shown=percent, is_percent=True),
        Quantity(name="mse", words="mean squared error", shown=places(3)),
        Quantity(name="pearson", words="Pearson's correlation", shown=places(3)),
        Quantity(name="spearman", words="Spearman's correlation", shown=places(3)),
        Quantity(name="mse_to_teacher", words="squared error from teacher", shown=places(3)),
        Quantity(name="ece", words="calibration error (ECE), %", shown=percent, is_percent=True),
        Quantity(name="perplexity", words="perplexity", shown=of_any_size, of_nats="nll"),
        Quantity(name="bits_per_byte", words="bits a byte", shown=places(3), of_nats="nll"),
        Quantity(name="agreement", words="agrees with teacher, %", shown=percent, is_percent=True),
        Quantity(name="kl", words="KL from teacher, nats", shown=places(3)),
        Quantity(name="loss", words="loss", shown=places(3)),
        Quantity(name="nll", words="negative log-likelihood, nats", shown=places(3)),
        Quantity(name="ce", words="cross-entropy to labels, nats", shown=places(3)),
        Quantity(name="kd", words="distillation term, nats", shown=places(3)),
        Quantity(name="learning_rate", words="learning rate", shown="{:.2g}".format),
        Quantity(name="grad_norm", words="norm of the gradient", shown=places(2)),
        Quantity(name="teacher_perplexity", words="teacher's perplexity", shown=of_any_size),
        Quantity(name="conf_w", words="mean confidence weight", shown=places(3)),
    )
}
OF_HEADS = ("micro_f1", "macro_f1", "exact_match", "mse", "pearson", "spearman", "mse_to_teacher")
HEADLINE = ("accuracy", "f1", *OF_HEADS, "ece", "perplexity", "bits_per_byte", "agreement", "kl")
CURVES = ("loss", "accuracy", "micro_f1", "mse", "perplexity", "agreement", "kl")  # shown first


def quantity(name: str) -> Quantity:
    """A known one, or the name's own words."""
    plain = name.replace("_", " ")
    return KNOWN.get(name) or Quantity(name=name, words=plain, shown="{:.4g}".format)


def shown(name: str, value: Any) -> str:
    """A figure's value; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    return quantity(name).shown(value)


def interval(name: str, ends: Sequence[float]) -> str:
    """Both ends."""
    say = quantity(name).shown
    return f"{say(ends[0])} – {say(ends[1])}"


def parameters(value: int | None) -> str:
    """As people say them."""
    if value is None:
        return NONE
    if value < 1_000_000:
        return f"{value / 1e3:,.1f} k"
    return f"{value / 1e6:,.1f} M" if value < 1e9 else f"{value / 1e9:,.2f} B"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
