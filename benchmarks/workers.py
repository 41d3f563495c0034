"""How much faster two workers make a cache than one: `python -m benchmarks.workers`.

Each worker's teacher has one thread. What is timed is the making of shards, by the times of their
files: loading libraries and teacher takes the same however long the run, and is told apart.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from teacher_cache.stages.data.packaged.packages import fetch

BIN = Path(sys.executable).parent
NUM_WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a run, in seconds: all of it, and from its first shard to its last."""

    whole_s: float
    shards_s: float
    num_shards: int

    @property
    def rate(self) -> float:
        """Shards a second, those not counted whose beginning is not seen: the first."""
        return (self.num_shards - 1) / self.shards_s


def write_teacher(folder: Path) -> Path:
    """MiniLM with an untrained head: what it says takes as long as what a trained one says."""
    minilm = fetch("minilm")
    names = {0: "rotten", 1: "fresh"}
    model = AutoModelForSequenceClassification.from_pretrained(minilm, id2label=names)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


def timed(launcher: tuple[str, ...], teacher: Path, max_samples: int) -> Timing:
    """Make a cache and throw it away."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        command = (
            *(*launcher, str(BIN / "pipe"), "cache-teacher", "--data", "demo"),
            *(
                "--teacher",
                str(teacher),
                "--out",
                str(cache),
                "--unlabeled",
                "none",
                "--device",
                "cpu",
            ),
            *("--max-samples", str(max_samples), "--shard-documents", "8", "--threads", "1"),
        )
        started = time.monotonic()
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        whole_s = time.monotonic() - started
        times = sorted(path.stat().st_mtime for path in cache.glob("*/000/*.json"))
    return Timing(whole_s=whole_s, shards_s=times[-1] - times[0], num_shards=len(times))


def main() -> None:
    """Time one process and torchrun's, in turn, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-samples", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torchrun = (str(BIN / "torchrun"), "--nproc-per-node", str(NUM_WORKERS), "--no-python")
    table = Table("round", "process", "whole run, s", "shards, s", "shards a second", "times one")
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder))
        for number in range(given.rounds):
            one, two = (timed(one, teacher, given.max_samples) for one in ((), torchrun))
            for name, found in (("one", one), (f"{NUM_WORKERS} ranks", two)):
                table.add_row(
                    *(str(number + 1), name, f"{found.whole_s:.1f}", f"{found.shards_s:.1f}"),
                    *(f"{found.rate:.2f}", f"{found.rate / one.rate:.2f}"),
                )
    Console(width=100).print(table)
    print(f"load of the machine in the last minute: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
