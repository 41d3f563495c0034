"""How near the two kinds of draws of `--codec sampled` are to the teacher, for how many bytes.

    python -m benchmarks.draws

SmolLM2-135M reads the beginning of a novel's chapter, every position is cached by each codec with
numbers of its own, a few times over, and what the cache gives back as weights is compared with the
exact distribution: the mean of the squared distance, which for a right mean is the variance. No
students: `benchmarks.codecs` has those.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import machine
from benchmarks.codec_table.teacher import novels
from benchmarks.goal import Goal, goal_table
from benchmarks.smollm2 import smollm2_folder
from teacher_cache.cache.codecs.sampled import DistinctCodec, SampledCodec
from teacher_cache.cache.schema import NO_LABEL, bytes_per_position
from teacher_cache.pipeline.reporting import reported
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.data.corpus import load_corpus
from teacher_cache.stages.losses.draws import SampledTargets, WeightedTargets
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.training.targets import CachedTargets

RESULTS = Path("benchmarks/results/draws.json")
NUM_DRAWS = 50
SIZES = (12, 14, 15, 16, 18, 20, 24, 32, 34, 40)
WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Row:
    """One codec's draws.

    Attributes:
        title: of the codec.
        num_ids: distinct ids of a position, mean.
        bytes_per_token: of one temperature, without the token itself.
        distance: mean over positions and repeats of the sum of squares of estimate less p.
        mass: mean of the weights' sum.
    """

    title: str
    num_ids: float
    bytes_per_token: float
    distance: float
    mass: float


def weighed(targets: Any, num_outcomes: int) -> Tensor:
    """[N, V] float64, what stands for the teacher's probabilities."""
    assert isinstance(targets, SampledTargets | WeightedTargets)
    ids = torch.where(targets.ids < 0, num_outcomes, targets.ids)
    found = torch.zeros(len(ids), num_outcomes + 1, dtype=torch.float64)
    return found.scatter_add(1, ids, targets.weights().double())[:, :num_outcomes]


def measured(codec: Any, title: str, logits: Tensor, repeats: int) -> Row:
    """One codec, as it is stored and read."""
    num, size = logits.shape
    p = logits.double().softmax(dim=1)
    room, nexts = room_of(codec), torch.full((num,), NO_LABEL)
    distances, masses, counts = [], [], []
    for repeat in range(repeats):
        reduced, _ = reduce_positions(
            codec,
            Support(size=size),
            logits,
            nexts,
            drawn_at=room.draws(codec, b"%d" % repeat, num),
        )
        rows = codec.expand(codec.encode(reduced))
        stored = {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in rows.items()}
        targets: Any = CachedTargets(
            codec=codec, stored=stored, temperature=1.0, num_outcomes=size
        ).at_positions(slice(None))
        found = weighed(targets, size)
        distances.append(float((found - p).square().sum(dim=1).mean()))
        masses.append(float(found.sum(dim=1).mean()))
        counts.append(float((targets.ids >= 0).sum(dim=1).double().mean()))
    num_ids = float(np.mean(counts))
    return Row(
        title=title,
        num_ids=num_ids,
        bytes_per_token=bytes_per_position(codec.fields, num_ids),
        distance=float(np.mean(distances)),
        mass=float(np.mean(masses)),
    )


def smollm2_logits(work: Path, num_positions: int) -> Tensor:
    """[N, V] of the first positions of a chapter."""
    folder = smollm2_folder(work / "teachers" / "smollm2", instead="leave this benchmark out")
    tokenizer = load_tokenizer(str(folder), option="--teacher")
    (document,) = load_corpus(novels("validation", 1)).documents(0, 1)
    ids = torch.tensor([tokenizer(document.text)["input_ids"][:num_positions]])
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]


def goals(rows: list[Row]) -> list[Goal]:
    """The variance of 50 draws at no more than half their bytes, a third of it at equal bytes."""
    old, *new = rows

    def best(num_bytes: float) -> float | None:
        fitting = [one.distance for one in new if one.bytes_per_token <= num_bytes]
        return min(fitting) / old.distance if fitting else None

    return [
        Goal(
            "variance over that of 50 draws, in at most half of their bytes",
            best(0.5 * old.bytes_per_token),
            1.0,
        ),
        Goal("the same at as many bytes", best(old.bytes_per_token), 1 / 3),
    ]


def table_of(rows: list[Row]) -> Table:
    """For people."""
    table = Table(*("kept", "ids", "bytes a token", "E|p̂ - p|²", "over 50 draws", "sum of weights"))
    for one in rows:
        table.add_row(
            one.title,
            f"{one.num_ids:.1f}",
            f"{one.bytes_per_token:.0f}",
            f"{one.distance:.4f}",
            f"{one.distance / rows[0].distance:.2f}",
            f"{one.mass:.4f}",
        )
    return table


def main(
    positions: Annotated[int, typer.Option(min=8, help="Of the text.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Of each codec.")] = 8,
    work: Annotated[Path, typer.Option(help="SmolLM2 goes here.")] = Path("runs/codecs"),
    results: Annotated[Path, typer.Option(help="What was measured.")] = RESULTS,
) -> None:
    """How near draws are to the teacher, for how many bytes."""
    torch.set_num_threads(1)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    with reported():
        logits = smollm2_logits(work, positions)
        size, grid = logits.shape[1], (1.0,)
        rows = [
            measured(
                SampledCodec(support_size=size, num_draws=NUM_DRAWS, temperatures=grid),
                f"{NUM_DRAWS} draws with replacement",
                logits,
                repeats,
            )
        ]
        for num_ids in SIZES:
            codec = DistinctCodec(support_size=size, num_ids=num_ids, temperatures=grid)
            rows.append(measured(codec, f"{num_ids} distinct ids", logits, repeats))
        console.print(table_of(rows))
        found = goals(rows)
        console.print(goal_table(found))
        described = machine.describe(torch.device("cpu"))
        results.write_text(
            json.dumps(
                {
                    "machine": described,
                    "positions": len(logits),
                    "repeats": repeats,
                    "rows": [asdict(one) for one in rows],
                    "goals": [asdict(one) for one in found],
                },
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
