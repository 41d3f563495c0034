"""How a student's speed compares with that of another checkout of this project.

    git worktree add ../before COMMIT
    python -m benchmarks.revisions ../before [--repeats 5]

The default language-model student of each kind trains (forward, loss, backward) and decodes token
by token. A process of either checkout at a time, in turns; figures are seconds of CPU time of one
thread, so what else the machine does matters little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe

ROOT = Path(__file__).parents[1]
TOP = ("pipeline", "stages", "cache", "configs")
NUM_IDS, BATCH, LENGTH = 5000, 4, 512
NUM_TOKENS = 64
NUM_STEPS = 2

# Runs in either checkout, so it keeps to what both have.
MEASURED = f"""
import json, time, torch
import teacher_cache.stages.student as students
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {{}}
for arch in ("mamba", "mamba2"):
    torch.manual_seed(0)
    config = students.MambaStudentConfig(vocab_size={NUM_IDS}, arch=arch)
    student = AutoModelForCausalLM.from_config(config)
    ids = torch.randint({NUM_IDS}, ({BATCH}, {LENGTH}))
    def train():
        student(ids, labels=ids).loss.backward()
    train()
    began = time.process_time()
    for _ in range({NUM_STEPS}):
        train()
    found[arch + " training"] = (time.process_time() - began) / {NUM_STEPS}
    student.eval()
    student.generation_config.eos_token_id = None
    began = time.process_time()
    student.generate(ids[:1, :8], max_new_tokens={NUM_TOKENS}, do_sample=False)
    found[arch + " decoding a token"] = (time.process_time() - began) / {NUM_TOKENS}
print(json.dumps(found))
"""


def seconds(checkout: Path) -> dict[str, float]:
    """CPU seconds of each measure in a fresh process that imports that checkout's package."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=checkout, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(outcome.stdout.splitlines()[-1])


def importable(checkout: Path, scratch: Path) -> Path:
    """A folder with that checkout's `teacher_cache`; early commits have none of that name."""
    if (checkout / "teacher_cache").is_dir():
        return checkout
    package = scratch / "teacher_cache"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in TOP:
        (package / name).symlink_to(checkout.resolve() / name)
    return scratch


def main() -> None:
    """Print a ratio a measure: this checkout by the other, the median of the turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    given = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        other = importable(given.other, Path(scratch))
        turns = [(seconds(ROOT), seconds(other)) for _ in range(given.repeats)]
    print(describe(torch.device("cpu")))
    for name in turns[0][0]:
        ratios = [ours[name] / theirs[name] for ours, theirs in turns]
        ours, theirs = (min(turn[side][name] for turn in turns) for side in (0, 1))
        print(
            f"{name}: {statistics.median(ratios):.2f} of the other's ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); the best {1000 * ours:.1f} and {1000 * theirs:.1f} ms"
        )
    print(f"{given.repeats} turns in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
