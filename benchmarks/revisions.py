"""How the speed of a student, or of the join, compares with another checkout of this project.

    git worktree add ../before COMMIT
    python -m benchmarks.revisions ../before [--what student|join] [--repeats 5]

*student*: the default language-model student of each kind trains (forward, loss, backward) and
decodes token by token. *join*: the tables of two real tokenizers are read, one mapped to the other,
and samples of one aligned with the other's tokens. A process of either checkout at a time, in
turns; figures are seconds of CPU time of one thread, so what else the machine does matters little.
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
from benchmarks.tokenizers import TEXTS, folder_of

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


JOINED = f"""
import json, sys, time
import numpy as np
from teacher_cache.stages.join import rereading
from teacher_cache.stages.join.aligned_sample import SampleAligner
from teacher_cache.stages.tokens.token_bytes import token_bytes
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import exact_map
def reader_of(tokenizer):
    if hasattr(rereading.Reader, "of"):
        return rereading.Reader.of(tokenizer)
    table = token_bytes(tokenizer)
    frame = rereading.Frame.of(tokenizer, table)
    return rereading.Reader(tokenizer=tokenizer, table=table, frame=frame)
found = {{}}
def timed(name, function):
    began = time.process_time()
    result = function()
    found[name] = time.process_time() - began
    return result
texts = json.load(open(sys.argv[1]))
for pair, folders in json.loads(sys.argv[2]).items():
    ours, theirs = (load_tokenizer(one, option="--more") for one in folders)
    teacher = timed(pair + ", the teacher's table", lambda: reader_of(ours))
    student = reader_of(theirs)
    ends = ours.eos_token_id, theirs.eos_token_id
    timed(pair + ", map", lambda: exact_map(teacher.table, student.table, ends=ends))
    samples = []
    for text in texts:
        ids = np.array(ours(text)["input_ids"][:{LENGTH}])
        samples.append({{
            "input_ids": ids, "segment": np.zeros(len(ids), dtype=np.uint16),
            "loss_mask": np.ones(len(ids), dtype=bool), "continues": np.array(False),
            "next_log_prob": np.full(len(ids), -1.0, dtype=np.float32),
        }})
    aligner = SampleAligner(teacher=teacher, student=student)
    aligner(samples[0])
    timed(pair + ", aligning", lambda: [aligner(one) for one in samples])
print(json.dumps(found))
"""
PAIRS = (("smollm2", "gpt2"), ("gemma3", "qwen3"))
NUM_TEXTS = 200


def joined_texts(scratch: Path) -> list[str]:
    """What `JOINED` is told: a file of texts, and folders of tokenizers."""
    prose = " ".join(TEXTS.values())
    step = len(prose) // NUM_TEXTS
    texts = [prose[step * place :] + prose[: step * place] for place in range(NUM_TEXTS)]
    (scratch / "texts.json").write_text(json.dumps(texts))
    folders = {
        " to ".join(pair): [str(Path(folder_of(one)).resolve()) for one in pair] for pair in PAIRS
    }
    return [str(scratch / "texts.json"), json.dumps(folders)]


def seconds(checkout: Path, script: str, told: list[str]) -> dict[str, float]:
    """CPU seconds of each measure in a fresh process that imports that checkout's package."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", script, *told],
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
    parser.add_argument("--what", choices=("student", "join"), default="student")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    given = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        other = importable(given.other, Path(scratch))
        script, told = MEASURED, []
        if given.what == "join":
            script, told = JOINED, joined_texts(Path(scratch))
        turns = [
            (seconds(ROOT, script, told), seconds(other, script, told))
            for _ in range(given.repeats)
        ]
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
