"""Listen to a teacher's layers during its forward passes and hand on what is asked of them.

Nothing is kept here: each map or state of a piece goes to the listener as soon as its layer has
made it, so beside the model there is one layer's maps of one batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.attention import AttentionCodec, PooledAt, attention_field, row_kl
from teacher_cache.cache.codecs.hidden import HIDDEN
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import Fields, FieldSpec, Ragged, Schema
from teacher_cache.stages.models.batching import MODEL_FAILURES
from teacher_cache.stages.models.causal import PlacedPiece
from teacher_cache.stages.models.pretrained import EAGER, base_of
from teacher_cache.stages.teacher.config import LayersConfig
from teacher_cache.stages.teacher.load import Teacher
from teacher_cache.stages.teacher.options import (
    HiddenOptions,
    chosen_layers,
    hidden_options,
    require_states,
)

HEARD_AT_LAYERS = "layers"
LARGEST_HALF = float(np.finfo(np.float16).max)  # 65,504


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Maps and states to cache; of neither, where none is asked for.

    Attributes:
        attention: how maps are stored; None where none are.
        source: where the model makes them; None where none are stored.
        hidden: states that are asked for; pooled ones are a classifier's, and not of this plan.
        widths: D of each field of states, by its name.
        at_layers: modules of layers whose output is no state that the model gives out: of the last
            one it gives the state behind its final norm (which is `last`), and Mamba's and RWKV's
            states begin behind the first layer.
    """

    attention: AttentionCodec | None
    source: AttentionSource | None
    hidden: HiddenOptions
    widths: Mapping[str, int]
    at_layers: Mapping[int, nn.Module]

    @classmethod
    def prepared(
        cls,
        config: LayersConfig,
        teacher: Teacher,
        *,
        is_packed: bool = False,
        hears_layers: bool = True,
    ) -> LayerPlan:
        """Look at the teacher and settle what the options mean for it.

        Args:
            config: that `check_options` let pass.
            teacher: on its device.
            is_packed: samples hold several documents.
            hears_layers: states are those behind the layers; older caches have the model's list.

        Raises:
            UserError: if the teacher gives no maps or states, or not those of a layer asked for.
        """
        source = None if config.attention == "none" else find_attention(teacher)
        text_config = teacher.model.config.get_text_config()
        hidden = hidden_options(config).numbered(getattr(text_config, "num_hidden_layers", 0))
        widths, at_layers = _states_of(hidden, teacher)
        return cls(
            attention=None
            if source is None
            else _attention_codec(config, teacher, source, is_packed=is_packed),
            source=source,
            hidden=hidden,
            widths=widths,
            at_layers=at_layers if hears_layers else {},
        )

    @property
    def fields(self) -> Schema:
        """What a sample gets of it."""
        states = tuple(
            FieldSpec(name=name, dtype="float16", shape=("S", width))
            for name, width in self.widths.items()
        )
        return states if self.attention is None else (*self.attention.fields, *states)

    @property
    def states(self) -> dict[str, int | None]:
        """The layer of each field of states; None for the last states."""
        last: dict[str, int | None] = {HIDDEN: None} if self.hidden.last else {}
        return last | {hidden_field(layer): layer for layer in self.hidden.layers}

    def settings(self) -> dict[str, Any]:
        """For the fingerprint; absent where nothing is asked for, so older caches keep theirs."""
        named = self.hidden.named()
        found: dict[str, Any] = {} if named is None else {"hidden": named}
        if self.at_layers:
            found["hidden_of"] = HEARD_AT_LAYERS
        if self.attention is not None:
            found["attention"] = self.attention.settings | {"implementation": EAGER}
        return found

    def num_bytes(self, lengths: Sequence[int]) -> int:
        """Of a sample's fields, and of their ends.

        Args:
            lengths: of its pieces: one, but where several documents are packed.
        """
        maps = 0 if self.attention is None else self.attention.num_bytes(lengths)
        states = 2 * sum(self.widths.values()) * sum(lengths)
        return maps + states + 4 * len(self.fields)

    def encode(self, name: str, values: Tensor) -> np.ndarray:
        """One piece of a field as it is stored.

        Args:
            name: of the field.
            values: a map as `AttentionCodec.encode` takes it, or states [n, D].

        Raises:
            UserError: if a state has a value that float16 does not hold.
        """
        if name in self.widths:
            exact = values.float().cpu().numpy()
            return half(exact, what="states", option=f"--hidden {self.hidden.named()}")
        assert self.attention is not None, "no other field is of a plan"
        return self.attention.encode(values)


NO_LAYERS = LayerPlan(attention=None, source=None, hidden=HiddenOptions(), widths={}, at_layers={})
"""Neither maps nor states."""


def hidden_field(layer: int) -> str:
    """The name of a layer's states."""
    return f"{HIDDEN}_{layer}"


def half(states: np.ndarray, *, what: str, option: str) -> np.ndarray:
    """States [N, D] in float16.

    Args:
        states: float32.
        what: they are called in a message.
        option: that asked for them.

    Raises:
        UserError: if a value is too large for it, or no number.
    """
    fits = (np.abs(states) <= LARGEST_HALF).all(axis=1)
    if not fits.all():
        raise UserError(
            f"{int((~fits).sum())} of the teacher's {what} have values beyond {LARGEST_HALF:,.0f}, "
            f"the most that float16 holds: make the cache without {option}"
        )
    return states.astype(np.float16)


def _attention_codec(
    config: LayersConfig, teacher: Teacher, source: AttentionSource, *, is_packed: bool
) -> AttentionCodec:
    layers = chosen_layers(config.attention_layers, source.layers, teacher.name)
    heads = {h for layer, h in zip(source.layers, source.num_heads, strict=True) if layer in layers}
    if len(heads) > 1:
        raise UserError(
            f"layers of {teacher.name} have {' and '.join(map(str, sorted(heads)))} heads: give "
            "--attention-layers that have as many"
        )
    assert config.attention != "none", "asked before"
    return AttentionCodec(
        mode=config.attention,
        layers=layers,
        num_heads=heads.pop(),
        is_causal=source.is_causal,
        is_packed=is_packed,
        pooled_at=_pooled_at(teacher, source) if config.attention == "cls" else None,
    )


def _pooled_at(teacher: Teacher, source: AttentionSource) -> PooledAt:
    """A causal model pools at its last token, others at the tokenizer's [CLS].

    Raises:
        UserError: if there is no such token.
    """
    if source.is_causal:
        return "last"
    ids = teacher.tokenizer(TRIED_TEXT)["input_ids"]
    cls_id = teacher.tokenizer.cls_token_id
    if cls_id in (ids[0], ids[-1]):
        return "first" if cls_id == ids[0] else "last"
    raise UserError(
        f"--attention cls needs a pooled position, and the tokenizer of {teacher.name} begins or "
        "ends no text with a [CLS] token: give --attention mean"
    )


def _states_of(
    hidden: HiddenOptions, teacher: Teacher
) -> tuple[dict[str, int], dict[int, nn.Module]]:
    """D of each field of states, and the layers that are heard themselves, from one short text.

    Raises:
        UserError: if the teacher gives none, or not those of a layer asked for.
    """
    if not (hidden.last or hidden.layers):
        return {}, {}
    base = base_of(teacher.model)
    ids = torch.tensor([teacher.tokenizer(TRIED_TEXT)["input_ids"]], device=teacher.device)
    layers = _layer_modules(base)
    behind: dict[int, Tensor] = {}

    def remember(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        behind[layer] = first_tensor(output)

    hooks = [one.register_forward_hook(partial(remember, i)) for i, one in enumerate(layers)]
    try:
        with torch.inference_mode():
            output = base(input_ids=ids, output_hidden_states=True)
    except MODEL_FAILURES:  # encoder-decoders ask for more
        output = None
    finally:
        for hook in hooks:
            hook.remove()
    states = getattr(output, "hidden_states", None)
    last = getattr(output, "last_hidden_state", None)
    if not states or last is None:
        raise UserError(
            f"{teacher.name} ({type(teacher.model).__name__}) gives no hidden states of its "
            f"layers: leave --hidden {hidden.named()} out"
        )
    require_states(hidden, len(states) - 1, teacher.name)
    at_layers = {
        i: layers[i]
        for i in hidden.layers
        if i in behind and not _same_states(behind[i], states[i + 1])
    }
    chosen = {i: behind[i] if i in at_layers else states[i + 1] for i in hidden.layers}
    found = ({HIDDEN: last} if hidden.last else {}) | {hidden_field(i): chosen[i] for i in chosen}
    for name, one in found.items():
        if one.shape[:-1] != ids.shape:
            raise UserError(
                f"the states of {teacher.name} ({type(teacher.model).__name__}) are no vector a "
                f"token ({name} of {ids.shape[1]} tokens has the shape {tuple(one.shape)}): leave "
                f"--hidden {hidden.named()} out"
            )
    return {name: one.shape[-1] for name, one in found.items()}, at_layers


def _layer_modules(base: PreTrainedModel) -> list[nn.Module]:
    """A model's layers in their order; none where it cannot be told which they are."""
    num = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    lists = [one for one in base.modules() if isinstance(one, nn.ModuleList) and len(one) == num]
    return list(lists[0]) if len(lists) == 1 else []


def _same_states(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def leaves(output: Any) -> list[Any]:
    """What a module puts out, however it is nested, in one order."""
    if isinstance(output, Mapping):
        return [leaf for one in output.values() for leaf in leaves(one)]
    if isinstance(output, (tuple, list)):
        return [leaf for one in output for leaf in leaves(one)]
    return [output]


def first_tensor(output: Any) -> Tensor:
    """A layer's states: what it puts out first."""
    return next(one for one in leaves(output) if isinstance(one, Tensor))


def maps_of(attention: AttentionCodec) -> dict[int, str]:
    """The field of each layer's map."""
    return {layer: attention_field(layer) for layer in attention.layers}


TRIED_TEXT = "It was a fine film, and then it was not."
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSource:
    """The calls of a forward pass that make maps, in their order.

    Attributes:
        modules: called; a model that shares its layers calls one several times.
        places: of the map in what each call puts out.
        layers: of each call, from 0.
        num_heads: H of each.
        is_causal: whether no position looks behind itself, in any layer.
        is_asked: whether they are only made where the model is asked for all of them, which it
            then keeps until the batch ends.
    """

    modules: tuple[nn.Module, ...]
    places: tuple[int, ...]
    layers: tuple[int, ...]
    num_heads: tuple[int, ...]
    is_causal: bool
    is_asked: bool


def find_attention(teacher: Teacher) -> AttentionSource:
    """Run the teacher on a short text and look where its maps come from.

    Args:
        teacher: loaded `with_attention`, on its device.

    Raises:
        UserError: if it gives no attention maps, or they cannot be traced to modules.
    """
    base = base_of(teacher.model)
    ids = torch.tensor([teacher.tokenizer(TRIED_TEXT)["input_ids"]], device=teacher.device)
    seen: list[tuple[nn.Module, int, Tensor]] = []

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        found = [(place, one) for place, one in enumerate(leaves(output)) if _is_map(one, ids)]
        # What puts out several has them of others, or makes them when all layers are through.
        seen.extend((module, place, one) for place, one in found if len(found) == 1)

    hooks = [module.register_forward_hook(remember) for module in base.modules()]
    try:
        with torch.inference_mode():
            base(input_ids=ids)
            unasked = {(id(module), place) for module, place, _ in seen}
            seen.clear()
            output = base(input_ids=ids, output_attentions=True)
        maps = [one for one in getattr(output, "attentions", None) or () if _is_map(one, ids)]
    except MODEL_FAILURES:  # of a model that knows no such argument, or asks for more
        maps = []
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise UserError(
            f"{teacher.name} ({type(teacher.model).__name__}) gives no attention maps: leave "
            "--attention out, or give a transformer as the teacher"
        )
    # Inner modules end before those around them, so the first is the innermost.
    found = [next((one for one in seen if one[2] is wanted), None) for wanted in maps]
    calls = [one for one in found if one is not None]
    if len(calls) < len(maps):
        raise UserError(
            f"the attention maps of {teacher.name} ({type(teacher.model).__name__}) cannot be "
            "traced to the parts of it that make them: leave --attention out"
        )
    if not all(_are_weights(one) for _, _, one in calls):
        raise UserError(
            f"what {teacher.name} ({type(teacher.model).__name__}) gives as its attention are no "
            "weights, which are positive and sum to 1 at most: leave --attention out"
        )
    names = {id(module): name for name, module in base.named_modules()}
    return AttentionSource(
        modules=tuple(module for module, _, _ in calls),
        places=tuple(place for _, place, _ in calls),
        layers=_layers([names[id(module)] for module, _, _ in calls]),
        num_heads=tuple(one.shape[1] for _, _, one in calls),
        is_causal=all(not one.triu(diagonal=1).any() for _, _, one in calls),
        is_asked=any((id(module), place) not in unasked for module, place, _ in calls),
    )


def _is_map(one: Any, ids: Tensor) -> bool:
    """[1, H, S, S], of a sequence [1, S]."""
    return isinstance(one, Tensor) and one.ndim == 4 and one.shape[2:] == 2 * ids.shape[1:]


def _are_weights(one: Tensor) -> bool:
    """Rows of a map that are positive and sum to 1, or with a sink to less."""
    return bool((one >= 0).all()) and bool((one.float().sum(dim=-1) <= 1 + 1e-2).all())


def _layers(names: Sequence[str]) -> tuple[int, ...]:
    """By the modules' names, where these number them; hybrids have layers without maps between."""
    matches = [_NUMBER.search(name) for name in names]
    numbers = [int(match.group(1)) for match in matches if match is not None]
    ascend = all(a < b for a, b in pairwise(numbers))
    return tuple(numbers if len(numbers) == len(names) and ascend else range(len(names)))


Listener = Callable[[str, int, int, Tensor], None]
"""Told a field's name, sample and piece, and the values: a map [n], [n, n] or [H, n, n] in float32,
or states [n, D]."""


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
        base = base_of(self._model)
        hooks = [base.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if self._plan.widths:
            hooks.append(base.register_forward_hook(self._hear_states))
        for layer, module in self._plan.at_layers.items():
            hooks.append(module.register_forward_hook(partial(self._hear_layer, layer)))
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
        asked: dict[str, Any] = {"output_hidden_states": True} if self._plan.widths else {}
        if self._plan.source is not None and self._plan.source.is_asked:
            asked["output_attentions"] = True
        return (args, kwargs | asked) if asked else None

    def _hear_states(self, _: nn.Module, __: Any, output: Any) -> None:
        for name, layer in self._plan.states.items():
            if layer is None:
                self._tell_states(name, output.last_hidden_state)
            elif layer not in self._plan.at_layers:
                self._tell_states(name, output.hidden_states[layer + 1])

    def _hear_layer(self, layer: int, _: nn.Module, __: Any, output: Any) -> None:
        self._tell_states(hidden_field(layer), first_tensor(output))

    def _tell_states(self, name: str, states: Tensor) -> None:
        for one in self._pieces:
            self._tell(name, one, states[one.row, one.start : one.stop])

    def _hear_map(self, _: nn.Module, __: Any, output: Any) -> None:
        source = self._plan.source
        assert source is not None, "only then is there such a hook"
        call, self._num_calls = self._num_calls, self._num_calls + 1
        name = self._names.get(source.layers[call])
        if name is None:
            return
        found = leaves(output)[source.places[call]]
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


NUM_POSITIONS = 1024


class HasIds(Protocol):
    """A sample of either task."""

    @property
    def input_ids(self) -> Any:
        """uint32 [S]."""
        ...


AnySample = TypeVar("AnySample", bound=HasIds)


def first_samples(samples: Sequence[AnySample]) -> list[AnySample]:
    """The first few, of `NUM_POSITIONS` positions or just above."""
    chosen: list[AnySample] = []
    num_positions = 0
    for sample in samples:
        if num_positions >= NUM_POSITIONS:
            break
        chosen.append(sample)
        num_positions += len(sample.input_ids)
    return chosen


class RowErrors:
    """A listener that compares each row of a map with what the cache gives back of it.

    Compared is with the exact map of the same mode: what the mean over heads or leaving out rows
    costs is no part of it.

    Args:
        attention: how maps are stored.
    """

    def __init__(self, attention: AttentionCodec):
        self._attention = attention
        self._sum = self._largest = 0.0
        self._num_rows = 0

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Store and read a map again; other fields are stored exactly enough."""
        if name not in {spec.name for spec in self._attention.fields}:
            return
        exact = values.cpu().numpy()
        again = self._attention.decode(self._attention.encode(exact), exact.shape[-1])
        kl = row_kl(exact, again)
        self._sum += float(kl.sum())
        self._largest = max(self._largest, float(kl.max()))
        self._num_rows += kl.size

    def to_json(self) -> dict[str, Any]:
        """For the manifest: rows compared, their mean and largest KL in nats, to four digits."""
        return {
            "num_rows": self._num_rows,
            "row_kl": float(f"{self._sum / max(1, self._num_rows):.4g}"),
            "largest_row_kl": float(f"{self._largest:.4g}"),
        }


# Of a state's length: what float16 rounds off on disk, and what batches of other shapes round.
STATE_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}


def states_apart(again: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """[N] distances between vectors [N, D], each as a share of the cached one's length."""
    wide = cached.astype(np.float64)
    # A vector of zeros is as far from itself as nothing.
    length = np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float64).tiny)
    return np.linalg.norm(again - wide, axis=1) / length
