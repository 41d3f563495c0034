"""The ids over which teacher and student are compared: those that the tokenizer really uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.tokens.mapped_teacher import project_logits
from teacher_cache.stages.tokens.vocabulary_map import (
    ALIGNED,
    MAP_FILE,
    VocabularyMap,
    recorded_map,
    write_map,
)


def require_finite(largest: Tensor) -> None:
    """Refuse positions without a finite largest logit; a NaN is the largest of its row.

    Raises:
        UserError: naming how many.
    """
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        raise UserError(
            f"the teacher's logits at {int((~finite).sum())} positions are not finite: give "
            "--dtype float32, or bfloat16 where the device has it"
        )


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
        below = self.selected(logits)
        largest = below.amax(dim=1, keepdim=True)
        require_finite(largest[:, 0])
        below -= largest
        if not self._outside(logits).shape[1]:
            return below, below.new_zeros(len(below))
        return below, self.unused_mass(logits, largest[:, 0], below.logsumexp(dim=1))

    def selected(self, logits: Tensor) -> Tensor:
        """Logits of the support, [N, V] float32, a new tensor, -inf at unused ids."""
        found = logits[:, : self.size].float().clone()
        missing = self.size - found.shape[1]
        if missing > 0:  # ids of a student's longer table, which are unused
            found = nn.functional.pad(found, (0, missing), value=-torch.inf)
        if self.unused:
            found[:, list(self.unused)] = -torch.inf
        return found

    def unused_mass(self, logits: Tensor, largest: Tensor, lse: Tensor) -> Tensor:
        """[N], the teacher's probability (T = 1) of what the support leaves out.

        Args:
            logits: [N, R] of all rows.
            largest: [N] of the support.
            lse: [N] of the support, relative to it.
        """
        outside = self._outside(logits)
        if not outside.shape[1]:
            return torch.zeros_like(largest)
        return torch.sigmoid(outside.float().logsumexp(dim=1) - largest - lse)

    def _outside(self, logits: Tensor) -> Tensor:
        unused = [token_id for token_id in self.unused if token_id < logits.shape[1]]
        return torch.cat([logits[:, self.size :], logits[:, unused]], dim=1)

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


@dataclass(frozen=True, kw_only=True)
class CutSupport(Support):
    """The teacher's ids, of which each means the same to the student, among the student's.

    Attributes:
        vocabulary_map: each of them to itself.
    """

    vocabulary_map: VocabularyMap

    @classmethod
    def by(cls, vocabulary_map: VocabularyMap) -> CutSupport:
        """Of the student's ids, those that the teacher has."""
        size = vocabulary_map.num_student_ids
        unused = set(range(size)) - set(vocabulary_map.student_ids.tolist())
        return cls(size=size, unused=tuple(sorted(unused)), vocabulary_map=vocabulary_map)

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprint records of it."""
        return _settings("truncate", self.vocabulary_map, self)


@dataclass(frozen=True, kw_only=True)
class MappedSupport:
    """The student's ids, with the mass of the teacher's that write the same bytes.

    Attributes:
        teacher: the ids that the teacher uses.
        vocabulary_map: from them to the student's.
    """

    teacher: Support
    vocabulary_map: VocabularyMap

    @property
    def size(self) -> int:
        """V_s, the ids of the student's table."""
        return self.vocabulary_map.num_student_ids

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprint records of it."""
        return _settings("map", self.vocabulary_map, self.teacher)

    @cached_property
    def student_ids(self) -> Tensor:
        """[V_t] int64: the student's id of each of the teacher's, -1 where there is none."""
        found = self.vocabulary_map.student_ids[: self.teacher.size].copy()
        found[list(self.teacher.unused)] = -1
        return torch.from_numpy(found)

    @cached_property
    def num_reached(self) -> int:
        """Student ids that some id of the teacher maps to."""
        return len(np.unique(self.student_ids[self.student_ids >= 0]))

    @cached_property
    def is_one_to_one(self) -> bool:
        """Whether no two of the teacher's ids map to one of the student's."""
        return self.num_reached == int((self.student_ids >= 0).sum())

    def log_probs(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The exact mapped distributions; arguments and results as of `Support.log_probs`.

        Returns:
            [N, V_s] float64 nats, and [N], the log of the mass that has no student id.
        """
        below, _ = self.teacher.below_max(logits)
        return project_logits(
            below.double() / temperature, self.student_ids.to(below.device), num_rows=self.size
        )


AnySupport = Support | MappedSupport


def files_of(support: AnySupport) -> Mapping[str, Callable[[Path], None]]:
    """What of a support lies in the cache's `teacher` folder: of an aligned one its map."""
    if not isinstance(support, CutSupport | MappedSupport):
        return {}
    vocabulary_map = support.vocabulary_map
    return {MAP_FILE: lambda folder: write_map(folder, vocabulary_map)}


def states_support(support: AnySupport) -> Support:
    """The support of cached states, which are never mapped.

    Raises:
        ValueError: for a mapped one, which the options refuse before.
    """
    if isinstance(support, MappedSupport):
        raise ValueError("states go through the teacher's head: their support cannot be mapped")
    return support


def support_of_cache(
    cache: Path, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, num_logits: int
) -> AnySupport:
    """The support of a cache, beside the teacher that made it.

    Args:
        cache: its folder.
        manifest: its manifest.
        tokenizer: of the teacher.
        num_logits: of the teacher's head.

    Raises:
        UserError: if the map of an aligned cache is missing.
        CheckFailed: if it is not the one of the manifest.
    """
    support = Support.of_tokenizer(tokenizer, num_logits)
    vocabulary_map = recorded_map(cache, manifest)
    if vocabulary_map is None:
        return support
    if manifest.settings["support"]["align"] == "truncate":
        return CutSupport.by(vocabulary_map)
    return MappedSupport(teacher=support, vocabulary_map=vocabulary_map)


def _settings(align: str, vocabulary_map: VocabularyMap, outcomes: Support) -> dict[str, Any]:
    """`outcomes`: the ids among which the teacher's mass lies."""
    return {
        "kind": ALIGNED,
        "align": align,
        "aligned": vocabulary_map.support,
        "student_sha256": vocabulary_map.student_sha256,
        "size": vocabulary_map.num_student_ids,
        "unused": fingerprint({"size": outcomes.size, "ids": outcomes.unused}),
    }
