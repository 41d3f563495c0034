"""Attention maps, and pictures of them with matplotlib, if it is there.

Maps stand side by side, a student's mixing matrices beside its teacher's: one colour scale, tokens
on the axes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.cache.codecs.attention import AttentionCodec, attention_field, attention_from
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.reader import CacheReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.stages.evaluation.matched_attention import AttentionOfSample

DOTS_AN_INCH = 150
MOST_LABELS = 72  # of an axis; of a longer sample every second, third, ... token is named
MOST_COLUMNS = 3
PAIRS = 2  # columns: the teacher's panel and the student's
INCHES_A_LABEL = 0.15
FONT_POINTS = 7
MARGIN_INCHES = 1.8  # of a panel: title, labels, names
LEAST_HEIGHT = 0.12  # of a panel, as a share of its width


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose square panels leave room for what is written around them.

    No window, no global state.

    Raises:
        UserError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "pictures are drawn with matplotlib, which is not installed: "
            "`pip install 'teacher-cache[report]'`"
        ) from error
    return Figure(figsize=(width, height), layout="compressed")


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as a file's bytes.

    Args:
        figure: drawn.
        kind: a format that matplotlib knows: png, svg, pdf, ...
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of scripts that the font lacks
        figure.savefig(buffer, format=kind, dpi=DOTS_AN_INCH)
    return buffer.getvalue()


def write_figure(figure: Figure, path: Path, *, option: str) -> None:
    """Write a figure in the format that the file's ending names.

    Args:
        figure: drawn.
        path: of the picture.
        option: that gave the path, for a message.

    Raises:
        UserError: if matplotlib knows no such format, or the file cannot be written.
    """
    kind = path.suffix.removeprefix(".").lower() or "none"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(
            f"{option} {path} has the ending {kind!r}, expected one of {', '.join(sorted(known))}"
        )
    write_bytes_atomically(path, rendered(figure, kind))


@dataclass(frozen=True, kw_only=True)
class NamedMap:
    """One panel.

    Attributes:
        title: above it.
        values: [R, S] float, each row's shares; NaN where a row cannot look.
        row_labels: R of them.
    """

    title: str
    values: np.ndarray
    row_labels: Sequence[str]


def codec_of(manifest: Manifest) -> AttentionCodec:
    """How a cache's maps are stored.

    Raises:
        UserError: if it holds none.
    """
    codec = attention_from(manifest.settings)
    if codec is None:
        raise UserError(
            "--attention-image needs attention maps, and the cache was made without: make one "
            "with `pipe cache-teacher --attention mean`"
        )
    return codec


def teacher_maps(
    manifest: Manifest, sample: Mapping[str, np.ndarray], tokens: Sequence[str]
) -> list[NamedMap]:
    """The cached maps of a sample, a panel a layer; of mode cls one for all, a row a layer.

    Args:
        manifest: of the cache.
        sample: as the reader gives it.
        tokens: of the sample, as they are to be read.

    Raises:
        UserError: if the cache holds no maps.
    """
    codec = codec_of(manifest)
    segment = sample.get("segment")
    lengths = [len(tokens)] if segment is None else np.bincount(segment).tolist()
    found = {
        layer: codec.decode_sample(sample[attention_field(layer)], lengths)
        for layer in codec.layers
    }
    if codec.mode == "cls":
        place = 0 if codec.pooled_at == "first" else -1
        return [
            NamedMap(
                title=f"teacher, what {tokens[place]} looks at",
                values=np.stack(list(found.values())),
                row_labels=[f"layer {layer}" for layer in found],
            )
        ]
    seen = _reach(codec, lengths)
    heads = f"mean of {codec.num_heads} heads"
    return [
        NamedMap(
            title=f"teacher, layer {layer}, {heads}",
            values=np.where(seen, one.mean(axis=0) if codec.mode == "full" else one, np.nan),
            row_labels=tokens,
        )
        for layer, one in found.items()
    ]


def readable_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token's own text, its spaces and line ends made visible."""
    texts = [str(tokenizer.decode([token_id])) for token_id in ids]
    return [text.replace(" ", "\N{OPEN BOX}").replace("\n", "\\n") or "''" for text in texts]


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Maps over the same tokens, in reading order.

    Attributes:
        maps: at least one.
        tokens: S of them, looked at.
        most_columns: panels in a row of the picture.
    """

    maps: Sequence[NamedMap]
    tokens: Sequence[str]
    most_columns: int = MOST_COLUMNS

    def figure(self) -> Figure:
        """The picture; all maps have one colour scale.

        Raises:
            UserError: if matplotlib is missing.
        """
        return _figure(self.maps, self.tokens, self.most_columns)


def both_sides(
    reader: CacheReader, sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase, run: Path
) -> Panels:
    """Each matched layer's two maps of a sample, the tokens in the student's order.

    Args:
        reader: of the cache.
        sample: as it gives it.
        tokenizer: of the cache.
        run: a finished student's.

    Raises:
        UserError: as `InsideOfRun.of`.
    """
    from teacher_cache.stages.evaluation.matched_attention import InsideOfRun  # imports torch

    codec_of(reader.manifest)  # refuses a cache without maps
    maps = InsideOfRun.of(run, reader).matched_attention(sample)
    appended = -1 if maps.appended_id is None else maps.appended_id  # none has no such source
    ids = [appended if source < 0 else int(sample["input_ids"][source]) for source in maps.sources]
    tokens = readable_tokens(tokenizer, ids)
    return Panels(maps=both_maps(maps, tokens), tokens=tokens, most_columns=PAIRS)


def both_maps(maps: AttentionOfSample, tokens: Sequence[str]) -> list[NamedMap]:
    """A panel of the teacher and one of the student for each matched layer.

    Of caches that hold the pooled position's row alone there are two panels, a row a layer.

    Args:
        maps: of a sample.
        tokens: at the student's positions, as they are to be read.
    """
    if maps.teacher_row is not None:
        places = {"teacher": int(np.flatnonzero(maps.sources == maps.teacher_row)[0])}
        places["student"] = int(maps.rows[0])
        return [
            NamedMap(
                title=f"{side}, what {tokens[places[side]]} looks at",
                values=np.concatenate([getattr(one, side) for one in maps.layers]),
                row_labels=[f"layer {getattr(one.pair, side)}" for one in maps.layers],
            )
            for side in ("teacher", "student")
        ]
    row_labels = [tokens[int(row)] for row in maps.rows]
    return [
        NamedMap(
            title=f"{side}, layer {getattr(one.pair, side)}",
            values=getattr(one, side),
            row_labels=row_labels,
        )
        for one in maps.layers
        for side in ("teacher", "student")
    ]


def _figure(maps: Sequence[NamedMap], tokens: Sequence[str], most_columns: int) -> Figure:
    columns = min(most_columns, len(maps))
    rows = math.ceil(len(maps) / columns)
    side = INCHES_A_LABEL * min(MOST_LABELS, max(len(tokens), 12))
    share = max(LEAST_HEIGHT, *(len(one.values) / len(tokens) for one in maps))
    size = (columns * (side + MARGIN_INCHES) + 1.0, rows * (side * share + MARGIN_INCHES))
    figure = new_figure(*size)
    from matplotlib.colors import PowerNorm

    # Few large shares and many small ones: the root shows both.
    norm = PowerNorm(0.5, vmin=0.0, vmax=float(max(np.nanmax(one.values) for one in maps)))
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    image = None
    for axes, one in zip(grid, maps, strict=False):
        is_square = len(one.values) == len(tokens)
        image = axes.imshow(
            one.values, norm=norm, cmap="viridis", aspect="equal" if is_square else "auto"
        )
        axes.set_facecolor("0.9")  # where no row looks
        axes.set_title(one.title, fontsize=FONT_POINTS + 3)
        axes.set_xlabel("looked at", fontsize=FONT_POINTS + 1)
        if is_square:
            axes.set_ylabel("looking", fontsize=FONT_POINTS + 1)
        _name(axes.xaxis, tokens, rotation=90)
        _name(axes.yaxis, one.row_labels, rotation=0)
    for axes in grid[len(maps) :]:
        axes.set_visible(False)
    assert image is not None, "at least one map"
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8, pad=0.01)
    bar.set_label("share of the row (root scale)", fontsize=FONT_POINTS + 1)
    bar.ax.tick_params(labelsize=FONT_POINTS)
    return figure


def _reach(codec: AttentionCodec, lengths: Sequence[int]) -> np.ndarray:
    """[S, S] bool: what is stored of a sample's map."""
    seen = np.zeros((sum(lengths), sum(lengths)), bool)
    start = 0
    for length in lengths:
        inside = slice(start, start + length)
        seen[inside, inside] = codec.reach(length)
        start += length
    return seen


def _name(axis: Any, labels: Sequence[str], *, rotation: int) -> None:
    """Put labels at an axis's ticks, as many as can be read."""
    step = math.ceil(len(labels) / MOST_LABELS)
    places = range(0, len(labels), step)
    axis.set_ticks(places, [labels[i] for i in places], fontsize=FONT_POINTS, rotation=rotation)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)  # a dollar is a token like any other
