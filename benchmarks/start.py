"""What a student gains from starting where its teacher stands.

    python -m benchmarks.start [--small]

A Llama is trained here on five of Austen's novels (as for the table of codecs), and what it says
and its states behind every layer are cached once. All students have as many layers, the same width
and an MLP in each, and learn next tokens and the teacher alike from the cache alone, from the same
batches in a row of steps. They are judged on held-out chapters of the same novels as they go. A
stage in which layers learn alone counts among the steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.codec_table import teacher
from benchmarks.codec_table.rows import FULL, TEACHER, Scale
from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.pipeline.reporting import quiet_libraries, reported
from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.training.config import TrainStudentConfig

RESULTS, WORK = Path("benchmarks/results"), Path("runs/start")
WIDTH, HEADS = TEACHER["hidden_size"], TEACHER["num_attention_heads"]
FRESH: dict[str, Any] = {
    "d_model": WIDTH,
    "num_layers": TEACHER["num_hidden_layers"],
    "expand": 1,
    "d_state": WIDTH // HEADS,
    "head_dim": WIDTH // HEADS,
    "d_intermediate": TEACHER["intermediate_size"],
}
COPIED: dict[str, Any] = {"init": "teacher"}
ALONE: dict[str, Any] = {
    "hidden_weight": 1.0, "transfer_schedule": "layerwise", "transfer_shares": "0,0.25",
}  # fmt: skip
KEPT = {"layers": "attention:1"}
ROWS: Mapping[str, dict[str, Any]] = {
    "random start": FRESH,
    "teacher's embeddings": FRESH | {"embeddings": "teacher"},
    "teacher's layers": COPIED,
    "layers, alone first": COPIED | ALONE,
    "layers, one of three kept": COPIED | KEPT,
    "layers, one kept, alone first": COPIED | KEPT | ALONE,
}
BASELINE = "random start"

app = typer.Typer(add_completion=False)
console = Console(width=200)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of everything.

    Attributes:
        teacher: its scale.
        num_chapters: cached.
        num_steps: of each student.
        num_points: at which it is judged.
        seeds: of each row.
    """

    teacher: Scale
    num_chapters: int
    num_steps: int
    num_points: int
    seeds: int


STANDARD = Effort(teacher=FULL, num_chapters=50, num_steps=400, num_points=20, seeds=3)
SMALL = Effort(teacher=FULL, num_chapters=24, num_steps=160, num_points=16, seeds=1)


def cached(folder: Path, effort: Effort, work: Path) -> Path:
    """What the teacher says of the chapters, and its states behind every layer."""
    chapters = teacher.novels("train", effort.num_chapters)
    config = CacheTeacherConfig.of(
        task="lm",
        name="austen",
        teacher=str(folder),
        device="cpu",
        labeled=chapters.model_copy(update={"labeled": True}),
        max_length=128,
        hidden="all",
        out=work / "cache",
    )
    return cache_teacher.run(config).cache


def trained(cache: Path, name: str, seed: int, effort: Effort, work: Path) -> dict[str, Any]:
    """The held-out cross-entropy of a row's student of one seed, step by step."""
    config = TrainStudentConfig.of(
        cache=cache,
        out=work / f"{name.replace(' ', '-').replace(',', '')}-{seed}",
        seed=seed,
        device="cpu",
        batch_size=4,
        lr=2e-3,
        temperature=1.0,
        alpha=0.5,
        eval_fraction=0.1,
        max_steps=effort.num_steps,
        checkpoint_steps=effort.num_steps // effort.num_points,
        **ROWS[name],
    )
    record = train_student.run(config).record
    assert record.result is not None, "it is complete"
    judged = [line for line in record.result["log"] if "eval_ce" in line]
    last = record.result["evaluation"]
    return {
        "seed": seed,
        "steps": [line["step"] for line in judged],
        "ce": [line["eval_ce"] for line in judged],
        "teacher_ce": float(np.log(last["eval_teacher_perplexity"])),
        "seconds": record.result["seconds"],
    }


def table(rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Final cross-entropy, what it is above the teacher's, and the steps to the baseline's."""
    lines = [
        "| student starts from | held-out CE | above the teacher's | share of the steps to the "
        "random start's last CE, by seed | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        ce = np.mean([one["ce"][-1] for one in found])
        above = np.mean([one["ce"][-1] - one["teacher_ce"] for one in found])
        pairs = zip(found, rows[BASELINE], strict=False)
        shares = ", ".join(_share(one, other["ce"][-1]) for one, other in pairs)
        seconds = np.mean([one["seconds"] for one in found])
        lines.append(f"| {name} | {ce:.3f} | {above:.3f} | {shares} | {seconds:.0f} |")
    return lines


def _share(found: dict[str, Any], wanted: float) -> str:
    there = [step for step, ce in zip(found["steps"], found["ce"], strict=True) if ce <= wanted]
    return f"{there[0] / found['steps'][-1]:.2f}" if there else "never"


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Where teacher, cache and runs go.")] = WORK,
    small: Annotated[bool, typer.Option(help="Fewer steps and chapters, and one seed.")] = False,
) -> None:
    """Train the teacher, cache it, train every row, and write the figures."""
    effort = SMALL if small else STANDARD
    with reported():
        quiet_libraries()
        described = machine.describe(torch.device("cpu"))
        say = console.print
        folder = teacher.train(work / "teacher", effort.teacher, say)
        cache = cached(folder, effort, work)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        for seed in range(effort.seeds):
            for name, found in rows.items():
                found.append(trained(cache, name, seed, effort, work))
                console.print(f"{name}, seed {seed}: CE {found[-1]['ce'][-1]:.3f}")
        lines = table(rows)
        console.print("\n".join(lines))
        settings = {"steps": effort.num_steps, "chapters": effort.num_chapters, "rows": ROWS}
        write_json_atomically(
            RESULTS / "start.json", {"machine": described, "settings": settings, "rows": rows}
        )
        write_bytes_atomically(RESULTS / "start.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
