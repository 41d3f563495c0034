"""What a teacher of another tokenizer gives a small Mamba, by each way of aligning the two.

    python -m benchmarks.alignment

The distributions of SmolLM2 over chapters of Austen are cached once. Students with GPT-2's
tokenizer learn from the cache alone: on the text only, and with the teacher, all for as many steps,
with the same seeds and so the same weights at first and the same batches. They are judged by their
mean cross-entropy on held-out samples of the same chapters. What was trained is found again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.smollm2 import smollm2_folder
from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.pipeline.reporting import quiet_libraries, reported
from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.data.packaged.austen import NAME as AUSTEN
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.tokens.tokenizers import save_tokenizer
from teacher_cache.stages.training.config import TrainStudentConfig

RESULTS = Path("benchmarks/results")
WORK = Path("runs/alignment")
NUM_CHAPTERS, MAX_LENGTH = 8, 128
# Name of a row -> what differs in its settings. The first takes nothing from the teacher.
ROWS: dict[str, dict[str, Any]] = {
    "the text alone": {"align": "map", "alpha": 0.0},
    "map": {"align": "map"},
    "spans": {"align": "spans"},
    "projection": {"align": "projection"},
}
STUDENT: dict[str, Any] = {
    "d_model": 64, "num_layers": 2, "expand": 2, "d_state": 16, "head_dim": 32,
    "batch_size": 2, "lr": 5e-3, "alpha": 0.5, "temperature": 1.0, "eval_fraction": 0.1,
    "max_steps": 100, "checkpoint_steps": 100, "device": "cpu",
}  # fmt: skip

app = typer.Typer(add_completion=False)
console = Console()


def cached(teacher: Path, work: Path) -> Path:
    """The cache, made if it is not there."""
    config = CacheTeacherConfig.of(
        task="lm",
        name=AUSTEN,
        teacher=str(teacher),
        device="cpu",
        max_length=MAX_LENGTH,
        batch_tokens=1024,
        labeled=CorpusConfig(
            source=AUSTEN, split="train", text_column="text", labeled=False,
            max_samples=NUM_CHAPTERS, seed=0,
        ),
        out=work / "cache",
    )  # fmt: skip
    return cache_teacher.run(config).cache


def gpt2_tokenizer(folder: Path) -> Path:
    """The packaged GPT-2 tokenizer as a folder that transformers loads."""
    from transformers import GPT2Tokenizer

    save_tokenizer(folder, GPT2Tokenizer.from_pretrained(fetch("gpt2-tokenizer")))
    return folder


def trained(cache: Path, tokenizer: Path, work: Path, name: str, seed: int) -> dict[str, Any]:
    """A row's student of one seed: its held-out figures, coverage and seconds."""
    settings = STUDENT | ROWS[name]
    config = TrainStudentConfig.of(
        cache=cache,
        student_tokenizer=str(tokenizer),
        out=work / f"{name.replace(' ', '-')}-{seed}",
        seed=seed,
        **settings,
    )
    record = train_student.run(config).record
    assert record.result is not None, "it is complete"
    found = record.result["evaluation"]
    kept = ("eval_ce", "eval_perplexity", "eval_bits_per_byte", "eval_teacher_bits_per_byte")
    return {
        "seed": seed,
        **{one.removeprefix("eval_"): found[one] for one in kept},
        "coverage": record.about["coverage"],
        "seconds": record.result["seconds"],
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Means over the seeds that all rows have, and each seed's distance to the first row."""
    first, *_ = rows.values()
    lines = [
        "| student | held-out CE | perplexity | bits a byte | CE less that of the text alone, "
        "by seed | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        pairs = zip(found, first, strict=False)
        apart = ", ".join(f"{one['ce'] - other['ce']:+.3f}" for one, other in pairs)
        ce, bits = (float(np.mean([one[key] for one in found])) for key in ("ce", "bits_per_byte"))
        seconds = np.mean([one["seconds"] for one in found])
        lines.append(
            f"| {name} | {ce:.3f} | {np.exp(ce):.0f} | {bits:.3f} | {apart} | {seconds:.0f} |"
        )
    return lines


@app.command()
def main(
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of SmolLM2. Default: the packaged one, converted.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where caches and runs go.")] = WORK,
    seeds: Annotated[int, typer.Option(help="How many.")] = 2,
) -> None:
    """Cache, train every row with every seed, and write the figures."""
    with reported():
        quiet_libraries()
        described = machine.describe(torch.device("cpu"))
        instead = "give --teacher and its folder"
        cache = cached(teacher or smollm2_folder(work / "smollm2", instead=instead), work)
        tokenizer = gpt2_tokenizer(work / "gpt2-tokenizer")
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        for seed in range(seeds):
            for name, found in rows.items():
                found.append(trained(cache, tokenizer, work, name, seed))
                console.print(f"{name}, seed {seed}: CE {found[-1]['ce']:.3f}")
                write(described, {one: kept for one, kept in rows.items() if kept})


def write(described: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    """The figures so far, as a table and in full."""
    lines = table(rows)
    console.print("\n".join(lines))
    write_json_atomically(
        RESULTS / "alignment.json",
        {"machine": described, "student": STUDENT, "settings": ROWS, "rows": rows},
    )
    write_bytes_atomically(RESULTS / "alignment.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
