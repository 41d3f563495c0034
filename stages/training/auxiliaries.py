"""What is trained beside the student, and is no part of the result: projections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.models.pretrained import hold_tied_weights_once
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection

PROJECTION_FILE = "projection.safetensors"


class Auxiliary(Protocol):
    """A module that learns beside a student.

    Attributes:
        name: under which checkpoints hold it.
        decays: whether weight decay is good for it.
        requests: what the student's forward is asked for.
    """

    name: ClassVar[str]
    decays: ClassVar[bool]
    requests: ClassVar[Mapping[str, bool]]

    def heard(self, outputs: Any) -> None:
        """Add to the student's outputs what this makes of them.

        As keys, so that data parallelism finds them.
        """
        ...


class PooledProjection(nn.Linear):
    """Takes the student's pooled state to the teacher's width: `projected` [B, D], full precision.

    Args:
        d_model: the student's width.
        teacher_width: D of the teacher's pooled states.
        seed: of the first weights, which depend on it alone; the global random state is neither
            read nor changed.
    """

    name: ClassVar[str] = "projection"
    decays: ClassVar[bool] = True
    requests: ClassVar[Mapping[str, bool]] = {"pooled_state": True}

    def __init__(self, d_model: int, *, teacher_width: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(d_model, teacher_width, bias=False)

    def heard(self, outputs: Any) -> None:
        """Add `projected`."""
        with torch.autocast(outputs.pooled.device.type, enabled=False):
            outputs["projected"] = self(outputs.pooled.to(self.weight.dtype))


class LayerProjections(nn.ModuleDict):
    """Take the outputs of a student's layers to the teacher's width, a linear map a layer.

    `projected_hidden` is [B, S', D] by layer, float32 or wider.

    Args:
        d_model: the student's width.
        widths: D of the states that a layer's output is matched with, by layer.
        seed: as `PooledProjection` takes it.
    """

    name: ClassVar[str] = "projections"
    decays: ClassVar[bool] = True
    requests: ClassVar[Mapping[str, bool]] = {"output_hidden_states": True}

    def __init__(self, d_model: int, *, widths: Mapping[int, int], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(
                {
                    str(layer): nn.Linear(d_model, width, bias=False)
                    for layer, width in widths.items()
                }
            )

    def heard(self, outputs: Any) -> None:
        """Add `projected_hidden`."""
        projected: dict[int, Tensor] = {}
        for name, projection in self.items():
            states = outputs.hidden_states[int(name) + 1]  # the first are before all layers
            weight = cast(nn.Linear, projection).weight
            with torch.autocast(states.device.type, enabled=False):  # in full precision
                projected[int(name)] = projection(states.to(weight.dtype))
        outputs["projected_hidden"] = projected


class WithAuxiliaries(nn.Module):
    """A student and what learns beside it, in one module with one forward.

    So checkpoints and optimizer hold all of it, and data parallelism sees all gradients. Only
    `student` is the result. The state has each tied weight once.

    Args:
        student: to be trained, as it is without them; shared, not copied.
        *auxiliaries: at least one, of different names.
    """

    def __init__(self, student: nn.Module, *auxiliaries: Auxiliary) -> None:
        super().__init__()
        self.student = student
        self.auxiliaries = auxiliaries
        for one in auxiliaries:
            self.add_module(one.name, cast(nn.Module, one))
        self.register_load_state_dict_pre_hook(_flatten_older_names)
        hold_tied_weights_once(self)

    def forward(self, **inputs: Any) -> Any:
        """The student's outputs, with what the auxiliaries make of them.

        Args:
            **inputs: as the student takes them.
        """
        requests = {name: True for one in self.auxiliaries for name in one.requests}
        outputs = self.student(**inputs, **requests)
        for one in self.auxiliaries:
            one.heard(outputs)
        return outputs

    @property
    def undecayed(self) -> list[str]:
        """How the names of parameters begin that weight decay would harm."""
        return [f"{one.name}." for one in self.auxiliaries if not one.decays]

    @property
    def output_head(self) -> LinearHead:
        """A language model's."""
        return cast(LinearHead, self.student.output_head)

    def get_input_embeddings(self) -> nn.Embedding:
        """The student's."""
        return cast(Any, self.student).get_input_embeddings()

    def num_next_tokens(self, attention_mask: Tensor) -> int:
        """As the student counts them."""
        return cast(Any, self.student).num_next_tokens(attention_mask)


def with_auxiliaries(student: nn.Module, *auxiliaries: Auxiliary) -> nn.Module:
    """The student, in `WithAuxiliaries` where anything learns beside it."""
    return WithAuxiliaries(student, *auxiliaries) if auxiliaries else student


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


def _flatten_older_names(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Older checkpoints had one wrapper within another, which named what is in the inner one twice.

    A student that is a wrapper itself has such names of right.
    """
    if isinstance(getattr(module.student, "student", None), nn.Module):
        return
    for name in list(state):
        rest = name.removeprefix(f"{prefix}student.")
        if rest != name and rest.split(".")[0] in ("student", "projection"):
            state[prefix + rest] = state.pop(name)
