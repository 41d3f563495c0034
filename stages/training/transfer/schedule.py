"""Which terms a step trains: all together, or in stages from the inside out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.stages.losses.config import TransferConfig

Term = Literal["attention", "hidden", "others"]
ALL: frozenset[Term] = frozenset(("attention", "hidden", "others"))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages of whole steps; MOHAWK's order (Bick et al. 2024, section 3, arXiv:2408.10189).

    Attributes:
        attention_until: steps below it match attention maps alone.
        hidden_until: further steps below it match hidden states alone; those behind it train all
            other terms.
        is_staged: False: every step trains all terms.
    """

    attention_until: int = 0
    hidden_until: int = 0
    is_staged: bool = False

    @classmethod
    def of(cls, config: TransferConfig, num_steps: int) -> Schedule:
        """The stages of a training.

        Args:
            config: weights and shares.
            num_steps: optimizer steps of the whole training.
        """
        if config.transfer_schedule == "together":
            return cls()
        of_attention, of_hidden = config.transfer_shares
        first = round(of_attention * num_steps) if config.attention_weight else 0
        second = round(of_hidden * num_steps) if config.hidden_weight else 0
        return cls(attention_until=first, hidden_until=first + second, is_staged=True)

    def terms(self, step: int) -> frozenset[Term]:
        """What a step trains; steps count from 0."""
        if not self.is_staged:
            return ALL
        if step < self.attention_until:
            return frozenset(("attention",))
        return frozenset(("hidden",) if step < self.hidden_until else ("others",))
