"""A language model and the projection that takes the teacher's ids to its own, in one module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.stages.join.learned_projection import LearnedProjection
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.packed_language_model import PackedLanguageModel
from teacher_cache.stages.student.tied_weights import hold_tied_weights_once

PROJECTION_FILE = "projection.safetensors"


class StudentWithProjection(nn.Module):
    """What is trained with a learned projection, so that checkpoints and optimizer hold both.

    Only the student runs in `forward`; the projection makes targets. The state has each tied weight
    once.

    Args:
        student: to be trained, as it is without a projection; shared, not copied.
        projection: trained with it.
    """

    def __init__(
        self, student: MambaStudentForCausalLM | PackedLanguageModel, projection: LearnedProjection
    ):
        super().__init__()
        self.student = student
        self.projection = projection
        hold_tied_weights_once(self)

    @property
    def output_head(self) -> LinearHead:
        """The student's."""
        return self.student.output_head

    def forward(self, **inputs: Any) -> Any:
        """The student's."""
        return self.student(**inputs)

    def get_input_embeddings(self) -> nn.Module:
        """The student's."""
        return self.student.get_input_embeddings()


def write_projection(folder: Path, projection: LearnedProjection) -> None:
    """Commit what was learned: `student_ids` and `weights`, [V_t, M], a row a teacher id.

    Raises:
        UserError: where the file system refuses.
    """
    tensors = {
        "student_ids": projection.student_ids.cpu().contiguous(),
        "weights": projection.learned_log_weights().detach().exp().cpu().contiguous(),
    }
    write_bytes_atomically(folder / PROJECTION_FILE, save(tensors))
