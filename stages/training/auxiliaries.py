"""A student and the projection that takes its pooled state to the teacher's, in one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.classifier import (
    MambaStudentClassifierOutput,
    MambaStudentForSequenceClassification,
)
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.packed_language_model import PackedLanguageModel
from teacher_cache.stages.student.tied_weights import hold_tied_weights_once
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection


@dataclass
class ProjectedStudentOutput(MambaStudentClassifierOutput):
    """What the student says, and its pooled state as the teacher's is compared with it.

    Attributes:
        projected: [B, D] float32 or wider.
    """

    projected: Tensor | None = None


class ProjectedStudent(nn.Module):
    """What is trained where pooled states are matched: the student and a projection.

    One module with one forward, so that checkpoints hold both and data parallelism sees the
    gradients of both. Only `student` is the result.

    Args:
        student: to be trained; shared, not copied.
        teacher_width: D of the teacher's pooled states.
        seed: of the projection's first weights, which depend on it alone; the global random state
            is neither read nor changed.
    """

    def __init__(
        self, student: MambaStudentForSequenceClassification, *, teacher_width: int, seed: int
    ) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projection = nn.Linear(student.config.d_model, teacher_width, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        next_token_loss: bool = False,
        output_hidden_states: bool = False,
        output_mixers: bool = False,
    ) -> ProjectedStudentOutput:
        """Classify a batch and project its pooled states.

        Args:
            input_ids: [B, S], as the student takes them.
            attention_mask: [B, S].
            next_token_loss: as the student's.
            output_hidden_states: as the student's.
            output_mixers: as the student's.
        """
        outputs = self.student(
            input_ids=input_ids,
            attention_mask=attention_mask,
            next_token_loss=next_token_loss,
            pooled_state=True,
            output_hidden_states=output_hidden_states,
            output_mixers=output_mixers,
        )
        # In full precision, as the head.
        with torch.autocast(input_ids.device.type, enabled=False):
            projected = self.projection(outputs.pooled.to(self.projection.weight.dtype))
        return ProjectedStudentOutput(
            logits=outputs.logits,
            next_token_loss_sum=outputs.next_token_loss_sum,
            projected=projected,
            hidden_states=outputs.hidden_states,
            mixers=outputs.mixers,
        )

    def get_input_embeddings(self) -> nn.Module:
        """The student's."""
        return self.student.get_input_embeddings()

    def num_next_tokens(self, attention_mask: Tensor) -> int:
        """As the student counts them."""
        return self.student.num_next_tokens(attention_mask)


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


def with_projected_layers(student: nn.Module, layers: CachedLayers | None) -> nn.Module:
    """The student, in `ProjectedLayers` where hidden states are matched.

    Args:
        student: to be trained.
        layers: what is matched, or none.
    """
    if layers is None or layers.hidden is None:
        return student
    return ProjectedLayers(student, widths=layers.hidden_widths, seed=layers.config.seed)


class ProjectedLayers(nn.Module):
    """What is trained where hidden states are matched: a student and a projection for each layer.

    One module with one forward, as `ProjectedStudent`, which may be inside. Only the student is the
    result.

    Args:
        student: a Mamba student, to be trained; shared, not copied.
        widths: D of the states that a layer's output is matched with, by layer.
        seed: of the projections' first weights, which depend on it alone; the global random state
            is neither read nor changed.
    """

    def __init__(self, student: nn.Module, *, widths: Mapping[int, int], seed: int) -> None:
        super().__init__()
        self.student = student
        d_model = self.get_input_embeddings().embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projections = nn.ModuleDict(
                {
                    str(layer): nn.Linear(d_model, width, bias=False)
                    for layer, width in widths.items()
                }
            )
        hold_tied_weights_once(self)

    def forward(self, **inputs: Any) -> Any:
        """The student's outputs, with `projected_hidden`: [B, S', D] by layer, float32 or wider.

        Args:
            **inputs: as the student takes them.
        """
        outputs = self.student(**inputs, output_hidden_states=True)
        projected: dict[int, torch.Tensor] = {}
        for name, projection in self.projections.items():
            states = outputs.hidden_states[int(name) + 1]  # the first are before all layers
            weight = cast(nn.Linear, projection).weight
            with torch.autocast(states.device.type, enabled=False):  # in full precision
                projected[int(name)] = projection(states.to(weight.dtype))
        outputs["projected_hidden"] = projected  # a key, so that data parallelism finds it
        return outputs

    @property
    def output_head(self) -> LinearHead:
        """A language model's."""
        return cast(LinearHead, self.student.output_head)

    def get_input_embeddings(self) -> nn.Embedding:
        """The student's."""
        return cast(Any, self.student).get_input_embeddings()

    def num_next_tokens(self, attention_mask: torch.Tensor) -> int:
        """As the student counts them."""
        return cast(Any, self.student).num_next_tokens(attention_mask)
