"""A teacher's attention maps, a byte an entry.

Each row of a map is a distribution over the positions that its position looks at. Stored is the
square root of an entry's share of its row's largest one, in 255 equal steps; a row is normalised
when it is decoded, so the largest entry itself need not be stored. Equal steps of the root give
every entry an error of equal variance in the metric of the KL (Anscombe 1948): for rows of n
entries it is about `n p_max / (6 * 255**2)` nats, and at most three times that, whatever their
shape. On real maps, equal steps of the entry itself lose a hundred times as much, and steps of
the root relative to 1 instead of the largest entry three times (docs/attention.md has figures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, namespace
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import SQUARE, TRIANGLE, TRIANGLES, FieldSpec, Schema

LARGEST_CODE = 255
# The mean of x**2, for x within half a step of a code c, is c**2 + 1/12: for 0, too, no entry that
# the softmax left above 0 is decoded as 0, so the KL stays finite.
WITHIN_STEP = 1 / 12
ENCODING = "sqrt-u8"

AttentionMode = Literal["cls", "mean", "full"]
PooledAt = Literal["first", "last"]


def encode_rows(rows: Array) -> Array:
    """Code rows of probabilities.

    Args:
        rows: [..., n], not negative; a row of zeros stays one.

    Returns:
        [..., n] u8, where `rows` lie; the largest of each row is 255.
    """
    xp = namespace(rows)
    exact = cast(rows, "float32")
    largest = xp.amax(exact, -1)[..., None]
    share = exact / xp.where(largest > 0, largest, 1.0)
    return cast(xp.round(xp.sqrt(share) * LARGEST_CODE), "uint8")


def decode_rows(codes: Array, reach: Array) -> Array:
    """Rows of probabilities that sum to 1.

    Args:
        codes: [..., n] u8.
        reach: [..., n] bool, what each row looks at; a row that looks at nothing is all zeros.

    Returns:
        [..., n] float32, 0 out of reach.
    """
    xp = namespace(codes)
    roots = cast(codes, "float32")
    weights = xp.where(reach, roots * roots + WITHIN_STEP, 0.0)
    total = weights.sum(-1)[..., None]
    return weights / xp.where(total > 0, total, 1.0)


def largest_kl(rows: np.ndarray) -> np.ndarray:
    """What storing rows can lose at most, [...] nats.

    With `s` the exact roots in steps, `c` their codes and `w = c**2 + 1/12`, the KL is at most the
    sum of `s**2 log(s**2 / w) - s**2 + w` over that of `s**2`, which is `255**2 / p_max`; and each
    term is below 0.51 for `|s - c| <= 1/2`.

    Args:
        rows: [..., n] probabilities.
    """
    return 0.51 * rows.shape[-1] * rows.max(-1) / LARGEST_CODE**2


@dataclass(frozen=True, kw_only=True)
class AttentionCodec:
    """What is kept of the maps of some layers; a field for each.

    Attributes:
        mode: the pooled position's row of the mean over heads (cls), all rows of it (mean), or
            every head by itself (full).
        layers: from 0, ascending.
        num_heads: H, of each of them.
        is_causal: no position looks behind itself: only lower triangles are stored.
        is_packed: samples hold several documents, and none looks at another.
        pooled_at: where the pooled position stands; for cls.
    """

    mode: AttentionMode
    layers: tuple[int, ...]
    num_heads: int
    is_causal: bool
    is_packed: bool = False
    pooled_at: PooledAt | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the stored values, for manifest and fingerprint."""
        return {"encoding": ENCODING, **asdict(self), "layers": list(self.layers)}

    @property
    def fields(self) -> Schema:
        """`attention_<layer>` of each layer."""
        if self.mode == "cls":
            first = "S"
        elif not self.is_causal:
            first = SQUARE
        else:
            first = TRIANGLES if self.is_packed else TRIANGLE
        shape = (first, self.num_heads) if self.mode == "full" else (first,)
        return tuple(
            FieldSpec(name=attention_field(layer), dtype="uint8", shape=shape)
            for layer in self.layers
        )

    def num_bytes(self, lengths: Sequence[int]) -> int:
        """Of the fields of a sample.

        Args:
            lengths: of its pieces: one, but where several documents are packed.
        """
        entries = sum(self._num_entries(length) for length in lengths)
        return len(self.layers) * entries * (self.num_heads if self.mode == "full" else 1)

    def encode(self, maps: Array) -> np.ndarray:
        """The stored entries of one piece.

        Args:
            maps: probabilities of one layer, numpy or torch: [n] in mode cls, [n, n] in mode mean,
                row i what position i looks at, [H, n, n] in mode full.

        Returns:
            [entries] u8, or [entries, H].
        """
        codes: Any = encode_rows(maps)
        if not isinstance(codes, np.ndarray):
            codes = codes.cpu().numpy()
        if self.mode == "cls":
            return codes
        kept = codes[..., self.reach(codes.shape[-1])]  # row by row
        return np.ascontiguousarray(np.moveaxis(kept, -1, 0))

    def split(self, stored: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
        """A sample's stored entries by piece.

        Args:
            stored: one field of one sample.
            lengths: of its pieces.
        """
        ends = np.cumsum([self._num_entries(length) for length in lengths])
        return np.split(stored, ends[:-1])

    def expand(self, stored: np.ndarray, length: int) -> np.ndarray:
        """One piece's codes as `decode_rows` wants them: [n], [n, n] or [H, n, n] u8."""
        if self.mode == "cls":
            return stored
        shape = (*stored.shape[1:], length, length)
        codes = np.zeros(shape, np.uint8)
        codes[..., self.reach(length)] = np.moveaxis(stored, 0, -1)
        return codes

    def decode(self, stored: np.ndarray, length: int) -> np.ndarray:
        """One piece's map, [n], [n, n] or [H, n, n] float32; each row sums to 1."""
        return decode_rows(self.expand(stored, length), self.reach(length))

    def decode_sample(self, stored: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """A sample's map, as `decode` gives a piece's; 0 between pieces.

        Args:
            stored: one field of one sample.
            lengths: of its pieces.
        """
        pieces = self.split(stored, lengths)
        maps = [self.decode(one, length) for one, length in zip(pieces, lengths, strict=True)]
        if len(maps) == 1:
            return maps[0]
        whole = np.zeros((*maps[0].shape[:-2], sum(lengths), sum(lengths)), np.float32)
        start = 0
        for one, length in zip(maps, lengths, strict=True):
            whole[..., start : start + length, start : start + length] = one
            start += length
        return whole

    def reach(self, length: int) -> np.ndarray:
        """What each row looks at: [n] bool in mode cls, [n, n] in others."""
        if self.mode == "cls":  # of a causal teacher it is the last row
            return np.ones(length, bool)
        every = np.ones((length, length), bool)
        return np.tril(every) if self.is_causal else every

    def _num_entries(self, length: int) -> int:
        if self.mode == "cls":
            return length
        return length * (length + 1) // 2 if self.is_causal else length**2


def attention_field(layer: int) -> str:
    """The name of a layer's map."""
    return f"attention_{layer}"


def attention_from(settings: Mapping[str, Any]) -> AttentionCodec | None:
    """The codec of a cache's maps, by its manifest's settings; None where it holds none.

    Raises:
        UserError: if this release does not know their encoding.
    """
    recorded = settings.get("attention")
    if recorded is None:
        return None
    values: dict[str, Any] = {
        name: value for name, value in recorded.items() if name != "implementation"
    }
    if (encoding := values.pop("encoding")) != ENCODING:
        raise UserError(
            f"the attention maps have the encoding {encoding!r}, this release reads {ENCODING!r}: "
            "upgrade teacher-cache, or make the cache again"
        )
    values["layers"] = tuple(values["layers"])
    return AttentionCodec(**values)


def row_kl(exact: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """[...] nats, from exact rows [..., n] to decoded ones, in float64.

    Exact rows are normalised first: in half precision they do not sum to 1, and those of heads with
    a learned sink never do.
    """
    p = exact.astype(np.float64)
    p = p / p.sum(-1, keepdims=True)
    q = decoded.astype(np.float64)
    q = q / q.sum(-1, keepdims=True)
    is_zero = p == 0
    with np.errstate(divide="ignore"):  # a q of 0 below a p of more is an infinite KL
        log_ratio = np.log(np.where(is_zero, 1.0, p)) - np.log(np.where(is_zero, 1.0, q))
    return (p * log_ratio).sum(-1)
