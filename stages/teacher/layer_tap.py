"""Listen to a teacher's layers during its forward passes and hand on what is asked of them.

Nothing is kept here: each map or state of a piece goes to the listener as soon as its layer has
made it, so beside the model there is one layer's maps of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import Fields, Ragged
from teacher_cache.stages.teacher.layer_plan import LayerPlan, maps_of

Listener = Callable[[str, int, int, Tensor], None]
"""Told a field's name, sample and piece, and the values: a map [n], [n, n] or [H, n, n] in float32,
or states [n, D]."""


@dataclass(frozen=True, kw_only=True)
class PlacedPiece:
    """Where a piece of a sample stands in a batch.

    Attributes:
        row: of the batch.
        start: its first position in the row.
        stop: one past its last.
        sample: its index among all samples.
        piece: its index in the sample.
    """

    row: int
    start: int
    stop: int
    sample: int
    piece: int


def packed_in_rows(
    sample_idxs: Sequence[int], lengths: Sequence[Sequence[int]]
) -> list[PlacedPiece]:
    """Where pieces stand in a batch with a sample in each row.

    Args:
        sample_idxs: of the rows' samples.
        lengths: of the pieces of each, end to end.
    """
    placed: list[PlacedPiece] = []
    for row, (sample, of_one) in enumerate(zip(sample_idxs, lengths, strict=True)):
        ends = np.cumsum(of_one).tolist()
        placed += [
            PlacedPiece(row=row, start=end - length, stop=end, sample=sample, piece=piece)
            for piece, (end, length) in enumerate(zip(ends, of_one, strict=True))
        ]
    return placed


def one_a_row(
    sample_idxs: Sequence[int], lengths: Sequence[Sequence[int]], chosen: Sequence[int] | np.ndarray
) -> list[PlacedPiece]:
    """Where pieces stand in a batch with a piece in each row.

    Args:
        sample_idxs: of some samples.
        lengths: of the pieces of each.
        chosen: the pieces of the rows, as indices into all pieces of these samples in order.
    """
    every = [
        (sample, piece, length)
        for sample, of_one in zip(sample_idxs, lengths, strict=True)
        for piece, length in enumerate(of_one)
    ]
    rows = enumerate(every[i] for i in chosen)
    return [
        PlacedPiece(row=row, start=0, stop=length, sample=sample, piece=piece)
        for row, (sample, piece, length) in rows
    ]


class LayerTap:
    """A context in which the model's forward passes are listened to.

    Args:
        model: in evaluation mode.
        plan: what is asked for.
        listener: told of every piece that `expect` named, for every field of the plan.
    """

    def __init__(self, model: PreTrainedModel, plan: LayerPlan, listener: Listener):
        self._model = model
        self._plan = plan
        self._listener = listener
        self._stack = ExitStack()
        self._pieces: Sequence[PlacedPiece] = ()
        self._num_calls = 0
        self._names = {} if plan.attention is None else maps_of(plan.attention)

    def __enter__(self) -> LayerTap:
        base = self._model.base_model
        hooks = [base.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if self._plan.widths:
            hooks.append(base.register_forward_hook(self._hear_states))
        if self._plan.source is not None:
            modules = {id(module): module for module in self._plan.source.modules}
            hooks += [one.register_forward_hook(self._hear_map) for one in modules.values()]
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def expect(self, pieces: Sequence[PlacedPiece]) -> None:
        """Say what the next forward pass reads."""
        self._pieces = pieces

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._num_calls = 0
        return (args, kwargs | {"output_hidden_states": True}) if self._plan.widths else None

    def _hear_states(self, _: nn.Module, __: Any, output: Any) -> None:
        for name, layer in self._plan.states.items():
            of_layer = (
                output.last_hidden_state if layer is None else output.hidden_states[layer + 1]
            )
            for one in self._pieces:
                self._tell(name, one, of_layer[one.row, one.start : one.stop])

    def _hear_map(self, _: nn.Module, __: Any, output: Any) -> None:
        source = self._plan.source
        assert source is not None, "only then is there such a hook"
        call, self._num_calls = self._num_calls, self._num_calls + 1
        name = self._names.get(source.layers[call])
        if name is None:
            return
        found = output[source.places[call]] if isinstance(output, tuple) else None
        if found is None:
            raise UserError(
                f"{type(self._model).__name__} gives its attention maps only where all are kept "
                "at once, which takes too much memory: leave --attention out"
            )
        for one in self._pieces:
            inside = slice(one.start, one.stop)
            self._tell(name, one, self._reduced(found[one.row, :, inside, inside]))

    def _reduced(self, heads: Tensor) -> Tensor:
        """What the mode keeps of one layer's maps [H, n, n] of a piece, in float32."""
        attention = self._plan.attention
        assert attention is not None, "only then are maps heard"
        if attention.mode == "full":
            return heads.float()
        if attention.mode == "mean":
            return heads.float().mean(dim=0)
        return heads[:, 0 if attention.pooled_at == "first" else -1].float().mean(dim=0)

    def _tell(self, name: str, one: PlacedPiece, values: Tensor) -> None:
        self._listener(name, one.sample, one.piece, values)


class KeptLayers:
    """A listener that keeps what it hears as it is stored, for the shard.

    Args:
        plan: what is kept.
    """

    def __init__(self, plan: LayerPlan):
        self._plan = plan
        self._parts: dict[str, dict[tuple[int, int], np.ndarray]] = {
            spec.name: {} for spec in plan.fields
        }

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Encode a piece; one that is heard again, after memory ran out, replaces itself."""
        self._parts[name][sample, piece] = self._plan.encode(name, values)

    def fields(self, num_samples: int) -> Fields:
        """The plan's fields of all samples."""
        fields: Fields = {}
        for spec in self._plan.fields:
            pieces: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
            parts = self._parts.pop(spec.name)
            for sample, piece in sorted(parts):
                pieces[sample].append(parts[sample, piece])
            arrays = [one[0] if len(one) == 1 else np.concatenate(one) for one in pieces]
            fields[spec.name] = Ragged.from_arrays(arrays, spec.dtype, spec.inner_shape)
        return fields
