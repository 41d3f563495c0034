"""A language model's distributions over a student's ids, as `cache-teacher --align` caches them.

Cut (`truncate`): equal ids mean equal strings, so the support is the teacher's under the student's
number of ids. Mapped (`map`): at each temperature T the student's id has the sum of p_T over the
teacher's ids that write the same bytes; what no student id writes is a mass of its own, which
belongs to no id and is never spread over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.join.aligned_cache import ALIGNED, recorded_map
from teacher_cache.stages.join.mapped_teacher import project_logits
from teacher_cache.stages.join.vocabulary_map import MAP_FILE, VocabularyMap, write_map
from teacher_cache.stages.teacher.support import Support


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
        ValueError: for a mapped one, which `alignment.check_alignment` refuses before.
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
