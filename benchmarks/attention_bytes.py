"""Bytes and losses of cached attention maps, on real teachers and real text.

    python -m benchmarks.attention_bytes --json FILE

A bidirectional transformer (MiniLM) reads movie reviews, a causal language model (SmolLM2) Austen's
chapters; `--encoder` and `--decoder` are folders of others.
Every text runs alone; each of its maps is stored in every mode and read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks import machine
from benchmarks.goal import Goal, goal_table
from benchmarks.smollm2 import smollm2_folder
from teacher_cache.cache.codecs.attention import AttentionCodec, row_kl
from teacher_cache.pipeline.reporting import reported
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.packaged import austen, reviews
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.data.tokenization import tokenize
from teacher_cache.stages.models.batching import PADDED
from teacher_cache.stages.models.causal import packed_in_rows
from teacher_cache.stages.models.pretrained import EAGER
from teacher_cache.stages.teacher.config import LayersConfig
from teacher_cache.stages.teacher.layers import LayerPlan, LayerTap
from teacher_cache.stages.teacher.load import Teacher

Mode = Literal["cls", "mean", "full"]
WORK = Path("runs/attention-bytes")
FEWEST_HEADS = 10  # from which the goal of the mean over heads holds
KL_GOAL = 1e-3
SMALLER_GOAL = 20.0


@dataclass
class Row:
    """One teacher's maps in one mode, all layers.

    Attributes:
        teacher: folder's name.
        mode: of `--attention`.
        num_heads: H.
        num_layers: L.
        is_causal: only lower triangles are stored.
        positions: mean length of a sample.
        stored: mean bytes a sample.
        half: of all layers and heads in float16, mean bytes a sample.
        kl: nats, mean over rows, from the mode's own exact map to what is read again.
        largest_kl: of a row.
        other_kl: the mean with other ways of storing a byte an entry.
    """

    teacher: str
    mode: Mode
    num_heads: int
    num_layers: int
    is_causal: bool
    positions: float
    stored: float = 0.0
    half: float = 0.0
    kl: float = 0.0
    largest_kl: float = 0.0
    other_kl: dict[str, float] = field(default_factory=dict)

    @property
    def times_smaller(self) -> float:
        """Than float16 maps of all layers and heads."""
        return self.half / self.stored


class Measured:
    """A listener of whole maps that stores them in every mode and compares.

    Args:
        full: the codec of whole maps.
    """

    def __init__(self, full: AttentionCodec, pooled_at: Literal["first", "last"]):
        modes: tuple[Mode, ...] = ("cls", "mean", "full")
        self.codecs = {mode: replace(full, mode=mode, pooled_at=pooled_at) for mode in modes}
        self.bytes = dict.fromkeys(modes, 0)
        self.kls: dict[Mode, list[np.ndarray]] = {mode: [] for mode in modes}
        self.others: dict[str, list[np.ndarray]] = {name: [] for name in OTHERS}

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Store one layer's heads [H, n, n] in every mode."""
        heads = values.numpy()
        place = 0 if self.codecs["cls"].pooled_at == "first" else -1
        mean = heads.mean(0)
        exact_by_mode: dict[Mode, np.ndarray] = {"cls": mean[place], "mean": mean, "full": heads}
        for mode, exact in exact_by_mode.items():
            codec = self.codecs[mode]
            stored = codec.encode(exact)
            self.bytes[mode] += stored.nbytes
            again = codec.decode(stored, heads.shape[-1])
            self.kls[mode].append(np.ravel(row_kl(exact, again)))
        reach = self.codecs["mean"].reach(len(mean))
        for other, decoded in OTHERS.items():
            self.others[other].append(row_kl(mean, np.where(reach, decoded(mean), 0.0)))


def linear(rows: np.ndarray) -> np.ndarray:
    """Equal steps of the entry; a code of 0 is read as the middle of its half step."""
    codes = np.rint(rows * 255.0)
    return np.where(codes == 0, 0.25, codes)


def root_of_one(rows: np.ndarray) -> np.ndarray:
    """Equal steps of the root, 255 of them up to 1 whatever the row's largest entry."""
    return np.rint(np.sqrt(rows) * 255.0) ** 2 + 1 / 12


OTHERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "steps of the entry": linear,
    "steps of the root, up to 1": root_of_one,
}


def measure(folder: Path, source: str, samples: int, max_length: int) -> list[Row]:
    """A row a mode, for one teacher."""
    model = AutoModel.from_pretrained(folder, attn_implementation=EAGER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = Teacher(
        name=folder.name, model=model.eval(), tokenizer=tokenizer, pad_id=0,
        batching=PADDED, device=torch.device("cpu"), dtype=torch.float32, weights_sha256="",
        config_sha256="", commit=None, how_read={},
    )  # fmt: skip
    config = LayersConfig(attention="full", attention_layers="all")
    plan = LayerPlan.prepared(config, teacher)
    full = plan.attention
    assert full is not None, "asked for"
    corpus = load_corpus(CorpusConfig(
        source=source, split="train" if source == reviews.NAME else None, labeled=False,
        max_samples=samples,
    ))  # fmt: skip
    texts = corpus.documents(0, len(corpus))
    ids = [one.input_ids for one in tokenize(texts, tokenizer, max_length=max_length)]
    measured = Measured(full, "last" if full.is_causal else "first")
    with LayerTap(model, plan, measured) as tap, torch.inference_mode():
        for idx, one in enumerate(ids):
            tap.expect(packed_in_rows([idx], [[len(one)]]))
            model(input_ids=torch.from_numpy(one.astype(np.int64))[None], use_cache=False)
    lengths = np.array([len(one) for one in ids], np.int64)
    half = 2 * len(full.layers) * full.num_heads * float((lengths**2).mean())
    rows = []
    for mode, kls in measured.kls.items():
        every = np.concatenate(kls)
        rows.append(
            Row(
                teacher=folder.name,
                mode=mode,
                num_heads=full.num_heads,
                num_layers=len(full.layers),
                is_causal=full.is_causal,
                positions=float(lengths.mean()),
                stored=measured.bytes[mode] / len(ids),
                half=half,
                kl=float(every.mean()),
                largest_kl=float(every.max()),
                other_kl={} if mode != "mean" else {
                    name: float(np.concatenate(one).mean()) for name, one in measured.others.items()
                },
            )
        )  # fmt: skip
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """What each row should reach."""
    found: list[Goal] = []
    for row in rows:
        name = f"{row.teacher} {row.mode}"
        bound = {"cls": SMALLER_GOAL, "mean": SMALLER_GOAL, "full": 2.0}[row.mode]
        if row.is_causal and row.mode != "cls":
            # A triangle of n rows is half a square and half a diagonal.
            bound *= 2 if row.mode == "mean" else 1.9
        applies = row.mode != "mean" or row.num_heads >= FEWEST_HEADS
        found.append(Goal(f"{name}: times smaller", row.times_smaller, bound, True, applies))
        found.append(Goal(f"{name}: row KL, 1e-3 nats", row.kl / KL_GOAL, 1.0))
    return found


def main(
    encoder: Annotated[
        Path | None,
        typer.Option(help="Folder of a bidirectional model. Default: MiniLM, packaged."),
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Folder of a causal model. Default: SmolLM2, converted.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where SmolLM2 goes.")] = WORK,
    samples: Annotated[int, typer.Option(min=1, help="Texts a teacher reads.")] = 24,
    max_length: Annotated[int, typer.Option(min=2, help="Longest text in tokens.")] = 256,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Print bytes a sample and the KL of a row for every mode."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    described = machine.describe(torch.device("cpu"))
    with reported():
        instead = "give --decoder and a causal model's folder"
        decoder = decoder or smollm2_folder(work / "smollm2", instead=instead)
        encoder = encoder or fetch("minilm")
    rows = measure(encoder, reviews.NAME, samples, max_length)
    rows += measure(decoder, austen.NAME, samples, max_length)
    console.print(bytes_table(rows))
    for row in rows:
        for name, kl in row.other_kl.items():
            console.print(f"{row.teacher} {row.mode}, {name}: row KL {kl:.1e} nats")
    found = goals(rows)
    console.print(goal_table(found))
    if json_out is not None:
        results: dict[str, Any] = {
            "machine": described,
            "settings": {"samples": samples, "max_length": max_length},
            "rows": [asdict(row) | {"times_smaller": row.times_smaller} for row in rows],
            "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in found],
        }
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=1) + "\n")


def bytes_table(rows: list[Row]) -> Table:
    """Bytes and KL by teacher and mode."""
    table = Table(title="attention maps of all layers", title_justify="left")
    for heading in ("teacher", "mode", "heads × layers", "mean length", "bytes a sample",
                    "float16, all heads", "times smaller", "row KL", "largest"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("teacher", "mode") else "right")
    for row in rows:
        table.add_row(
            row.teacher + (" (causal)" if row.is_causal else ""),
            row.mode,
            f"{row.num_heads} × {row.num_layers}",
            f"{row.positions:.1f}",
            f"{row.stored:,.0f}",
            f"{row.half:,.0f}",
            f"{row.times_smaller:.1f}",
            f"{row.kl:.1e}",
            f"{row.largest_kl:.1e}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
