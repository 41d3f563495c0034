"""What the reduction of `--codec topk` costs beside `logsumexp` and beside the teacher's own pass.

    python -m benchmarks.reduction

CPU time of one thread, interleaved repeats, medians of ratios taken within a repeat: on a machine
with other work the ratios hold reasonably, the times do not. `first` is version 1 of the codec, as
caches of fewer than 8,192 ids and of earlier releases have it, `second` what new ones have.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from benchmarks.goal import Goal, goal_table
from benchmarks.smollm2 import smollm2_folder
from benchmarks.timing import interleaved
from teacher_cache.cache.codecs.sampled import DistinctCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.pipeline.reporting import reported
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.tokens.support import Support

RESULTS = Path("benchmarks/results/reduction.json")
WIDTH = 120
LARGE = 151_936  # ids of Qwen's models


def cpu_seconds(run: Callable[[], Any]) -> Callable[[], float]:
    """What a call takes of this process's CPUs."""

    def timed() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return timed


def reductions_of(logits: Tensor) -> dict[str, Callable[[], Any]]:
    """Each codec's reduction of the logits, and what it is compared with."""
    num, size = logits.shape
    support, nexts = Support(size=size), torch.full((num,), NO_LABEL)

    def reduce(codec: Any) -> Callable[[], Any]:
        at = room_of(codec).draws(codec, b"0" * 16, num)
        return lambda: reduce_positions(codec, support, logits, nexts, drawn_at=at)

    return {
        "logsumexp": lambda: logits.logsumexp(dim=1),
        "topk, first": reduce(TopKCodec(support_size=size)),
        "topk, second": reduce(TopKCodec(support_size=size, version=2)),
        "sampled, 32 ids": reduce(DistinctCodec(support_size=size)),
    }


def tiny_teacher() -> LlamaForCausalLM:
    """Of hardly anything but a head of very many ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LARGE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def measured(model: Any, num_positions: int, repeats: int) -> dict[str, Any]:
    """Ratios of one teacher: to `logsumexp`, and of pass and reduction to the pass alone."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, size=(1, num_positions)))
    with torch.inference_mode():
        logits = model(ids).logits[0].float()
        runs = {"pass": lambda: model(ids).logits, **reductions_of(logits)}
        for run in runs.values():
            run()
        timed = {name: cpu_seconds(run) for name, run in runs.items()}
        times = interleaved(timed, dict.fromkeys(timed, repeats))
    found: dict[str, Any] = {
        "num_ids": logits.shape[1],
        "num_positions": num_positions,
        "ms_a_position": {
            name: 1e3 * statistics.median(one) / num_positions for name, one in times.items()
        },
    }
    for name in runs.keys() - {"pass", "logsumexp"}:
        rows = list(zip(times[name], times["logsumexp"], times["pass"], strict=True))
        found[name] = {
            "over_logsumexp": statistics.median(own / lse for own, lse, _ in rows),
            "with_pass_over_pass": statistics.median(1 + own / bare for own, _, bare in rows),
        }
    return found


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    table = Table(*("teacher", "ids", "reduction", "over logsumexp", "pass and it over the pass"))
    for teacher, one in found.items():
        for name, ratios in sorted(one.items()):
            if isinstance(ratios, dict) and "over_logsumexp" in ratios:
                table.add_row(
                    teacher,
                    f"{one['num_ids']:,}",
                    name,
                    f"{ratios['over_logsumexp']:.2f}",
                    f"{ratios['with_pass_over_pass']:.2f}",
                )
    return table


def main(
    positions: Annotated[int, typer.Option(min=8, help="Of each teacher.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything.")] = 7,
    smollm2: Annotated[bool, typer.Option(help="Measure SmolLM2 too (needs gguf).")] = True,
    work: Annotated[Path, typer.Option(help="SmolLM2 goes here.")] = Path("runs/codecs"),
    results: Annotated[Path, typer.Option(help="What was measured.")] = RESULTS,
) -> None:
    """What the reduction costs beside logsumexp and beside the teacher's own pass."""
    torch.set_num_threads(1)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    with reported():
        described = machine.describe(torch.device("cpu"))
        found = {"tiny": measured(tiny_teacher(), positions, repeats)}
        if smollm2:
            folder = smollm2_folder(work / "teachers" / "smollm2", instead="give --no-smollm2")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found["SmolLM2-135M"] = measured(model, positions, repeats)
        console.print(table_of(found))
        second = {name: one["topk, second"] for name, one in found.items()}
        goals = [
            Goal("reduction over logsumexp, tiny", second["tiny"]["over_logsumexp"], 0.6),
            Goal("stage one over the pass, tiny", second["tiny"]["with_pass_over_pass"], 1.7),
        ]
        if "SmolLM2-135M" in second:
            ratio = second["SmolLM2-135M"]["with_pass_over_pass"]
            goals.append(Goal("stage one over the pass, SmolLM2", ratio, 1.03))
        console.print(goal_table(goals))
        text = json.dumps({"machine": described, "teachers": found}, indent=1, sort_keys=True)
        results.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
