"""The teacher whose layers a student starts from: found by the cache, and checked to be its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.student.from_teacher import copy_teacher, shape_of
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.pretrained import read_config
from teacher_cache.stages.student.teacher_weights import TeacherWeights
from teacher_cache.stages.training.config import ArchitectureConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CopiedTeacher:
    """A teacher whose weights are those that made the cache.

    Attributes:
        weights: of its folder, of which a layer at a time is read.
        architecture: of the student, with the teacher's sizes.
    """

    weights: TeacherWeights
    architecture: ArchitectureConfig

    @property
    def shape(self) -> dict[str, Any]:
        """What makes the student, by `MambaStudentConfig`'s names."""
        kept = {"attn_layer_idx": self.architecture.attention_layers}
        return {"arch": self.architecture.arch} | shape_of(self.weights) | kept

    @property
    def settings(self) -> dict[str, str]:
        """What a run's settings record besides."""
        return {"init": "teacher"}

    def copy_into(self, student: MambaStudentForCausalLM, *, is_same: bool) -> None:
        """Give a fresh student the teacher's weights.

        Args:
            student: of `shape`.
            is_same: whether ids mean the same to both.

        Raises:
            UserError: if they do not.
        """
        if not is_same:
            raise UserError(
                "--init teacher copies the teacher's table, and the student's ids mean other "
                "strings: use the cache's own tokenizer, or leave the option out"
            )
        copy_teacher(student, self.weights)
        num_kept = len(self.architecture.attention_layers)
        logger.info(
            "%d layers start from %s: attention kept in %d, made a Mamba-2 mixer in %d",
            self.weights.num_layers,
            self.weights.folder,
            num_kept,
            self.weights.num_layers - num_kept,
        )


def teacher_to_copy(config: ArchitectureConfig, reader: CacheReader) -> CopiedTeacher | None:
    """The teacher of the cache, where its layers are asked for.

    Args:
        config: the student's.
        reader: of the cache.

    Raises:
        UserError: if it is not there, is of a family that cannot be copied, or has other weights
            than made the cache.
    """
    if not config.copies_teacher:
        return None
    manifest = reader.manifest
    folder = config.teacher_folder or Path(manifest.about["teacher"])
    if not folder.is_dir():
        raise UserError(
            f"--init teacher needs the folder of the teacher, and {folder} is none: give it with "
            "--teacher-folder"
        )
    weights = TeacherWeights(folder, read_config(str(folder)))
    if weights.sha256 != manifest.settings["teacher"]["weights_sha256"]:
        raise UserError(
            f"{folder} holds other weights than those that made {reader.cache}: give the folder of "
            "that teacher with --teacher-folder, or make a cache of this one"
        )
    beyond = [last for _, _, last in config.layers if last >= weights.num_layers]
    if beyond:
        raise UserError(
            f"--layers names layer {beyond[0]}, and {folder} has {weights.num_layers}, 0 to "
            f"{weights.num_layers - 1}: name one of these"
        )
    sizes = {"num_layers": weights.num_layers, "d_model": weights.d_model}
    return CopiedTeacher(weights=weights, architecture=config.model_copy(update=sizes))
