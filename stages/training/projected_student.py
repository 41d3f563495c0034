"""A student and the projection that takes its pooled state to the teacher's, in one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teacher_cache.stages.student.classifier import (
    MambaStudentClassifierOutput,
    MambaStudentForSequenceClassification,
)


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
