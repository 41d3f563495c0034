"""The ids over which teacher and student are compared: those that the tokenizer really uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class Support:
    """Ids below `size`, without the `unused` ones among them.

    Attributes:
        size: V, one more than the largest used id.
        unused: ids below it that stand for no token.
    """

    size: int
    unused: tuple[int, ...] = ()

    @classmethod
    def of(cls, used: Iterable[int], num_rows: int) -> Support:
        """The used ids that the model has rows for.

        Raises:
            UserError: if it has none of them.
        """
        known = {token_id for token_id in used if token_id < num_rows}
        if not known:
            raise UserError(
                f"none of the tokenizer's ids has a row among the model's {num_rows:,}: give the "
                "teacher its own tokenizer"
            )
        size = max(known) + 1
        return cls(size=size, unused=tuple(sorted(set(range(size)) - known)))

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Support:
        """The ids of a tokenizer, added tokens included.

        Args:
            tokenizer: of the teacher.
            num_rows: of its language-model head; the padded ones belong to no token.

        Raises:
            UserError: if the model has no row of them.
        """
        return cls.of(tokenizer.get_vocab().values(), num_rows)

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprint records of it."""
        return {"kind": "teacher", "size": self.size, "unused": fingerprint({"ids": self.unused})}

    def below_max(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the support, relative to their largest.

        Args:
            logits: [N, R] float32 of all rows; ids from R on are unused ones.

        Returns:
            [N, V] float32 nats, a new tensor, -inf at unused ids; and [N], the teacher's
            probability (T = 1) of what the support leaves out.

        Raises:
            UserError: if a position has no finite largest logit, or one that is no number.
        """
        below = logits[:, : self.size].float().clone()
        missing = self.size - below.shape[1]
        if missing > 0:  # ids of a student's longer table, which are unused
            below = nn.functional.pad(below, (0, missing), value=-torch.inf)
        if self.unused:
            below[:, list(self.unused)] = -torch.inf
        largest = below.amax(dim=1, keepdim=True)  # a NaN is the largest of its row
        finite = torch.isfinite(largest)
        if not bool(finite.all()):
            raise UserError(
                f"the teacher's logits at {int((~finite).sum())} positions are not finite: give "
                "--dtype float32, or bfloat16 where the device has it"
            )
        below -= largest
        unused = [token_id for token_id in self.unused if token_id < logits.shape[1]]
        outside = torch.cat([logits[:, self.size :], logits[:, unused]], dim=1)
        if not outside.shape[1]:
            return below, below.new_zeros(len(below))
        odds = outside.float().logsumexp(dim=1) - largest[:, 0] - below.logsumexp(dim=1)
        return below, torch.sigmoid(odds)

    @property
    def teacher(self) -> Support:
        """The ids that the teacher's own tokens are of."""
        return self

    def log_probs(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The exact distributions that a cache of this support is of.

        Args:
            logits: [N, R] float32 of all rows.
            temperature: positive.

        Returns:
            [N, V] float64 nats, and [N], the log of the mass that no id of the support has: none.
        """
        below, _ = self.below_max(logits)
        log_probs = torch.log_softmax(below.double() / temperature, dim=1)
        return log_probs, log_probs.new_full((len(log_probs),), -torch.inf)
