"""What the chunked distillation head costs beside the chunked cross-entropy and its three products.

    python -m benchmarks.linear_head

CPU time of one thread, interleaved repeats, medians of ratios taken within a repeat; loss and
gradients of states and head, the default objective (temperature 2, half of it next tokens). `all
logits` is the path that small vocabularies and other terms take.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.goal import Goal, goal_table
from benchmarks.reduction import cpu_seconds
from benchmarks.timing import interleaved
from teacher_cache.stages.losses import linear_head
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.draws import WeightedTargets
from teacher_cache.stages.losses.linear_head import linear_cross_entropy, linear_objective
from teacher_cache.stages.losses.objective import StepTotals

RESULTS = Path("benchmarks/results/linear-head.json")
WIDTH = 120
NUM_IDS, TOP_K = 151_936, 64
CONFIG = ObjectiveConfig()


def teachers(num: int) -> dict[str, Any]:
    """Heads of random ids, as `topk` and `sampled` give them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(NUM_IDS, generator=generator)[:TOP_K] for _ in range(num)])
    log_probs = torch.randn(num, TOP_K + 1, generator=generator).log_softmax(dim=1)
    head = TeacherDistribution(
        log_probs=log_probs[:, :-1],
        head_ids=ids,
        tail_log_prob=log_probs[:, -1],
        temperature=CONFIG.temperature,
    )
    few = head.log_probs[:, :32].log_softmax(dim=1)
    drawn = WeightedTargets(
        ids=ids[:, :32],
        log_probs=few - 0.1,
        shares=few.exp(),
        num_heads=torch.full((num,), 10),
        head=TeacherDistribution(
            log_probs=few - 0.1,
            head_ids=ids[:, :32],
            tail_log_prob=torch.full((num,), -2.35),
            temperature=CONFIG.temperature,
        ),
    )
    return {"topk": head, "sampled": drawn}


def runs(num: int, width: int) -> dict[str, Callable[[], Any]]:
    """Each way, forwards and backwards."""
    torch.manual_seed(0)
    hidden = torch.randn(num, width).requires_grad_()
    weight = (0.05 * torch.randn(NUM_IDS, width)).requires_grad_()
    labels = torch.randint(NUM_IDS, (num,))
    totals = StepTotals(num_labeled=num, num_labels=num)

    def products() -> None:
        states, head = hidden.detach(), weight.detach()
        for chunk in linear_head._chunks(num, NUM_IDS, linear_head.MAX_LOGITS):
            logits = states[chunk] @ head.T
            _ = logits @ head
            torch.zeros_like(head).addmm_(logits.T, states[chunk])

    def distilled(targets: Any, *, from_many: int) -> Callable[[], None]:
        def run() -> None:
            with patch.object(linear_head, "MANY_OUTCOMES", from_many):
                loss = linear_objective(
                    hidden, weight, targets, labels, config=CONFIG, totals=totals
                ).loss
            torch.autograd.grad(loss, [hidden, weight])

        return run

    found: dict[str, Callable[[], Any]] = {
        "three products": products,
        "cross-entropy": lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, weight, labels), [hidden, weight]
        ),
    }
    for name, targets in teachers(num).items():
        found[f"{name}, all logits"] = distilled(targets, from_many=2**62)
        found[f"{name}, one pass"] = distilled(targets, from_many=0)
    return found


def measured(num: int, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Ratios to the cross-entropy and to the products."""
    timed = {name: cpu_seconds(run) for name, run in runs(num, width).items()}
    for run in timed.values():
        run()
    times = interleaved(timed, dict.fromkeys(timed, repeats))
    bases = {"over_cross_entropy": "cross-entropy", "over_products": "three products"}
    return {
        name: {
            ratio: statistics.median(
                own / other for own, other in zip(one, times[base], strict=True)
            )
            for ratio, base in bases.items()
        }
        | {"ms_a_position": 1e3 * statistics.median(one) / num}
        for name, one in times.items()
    }


def main(
    positions: Annotated[int, typer.Option(min=1)] = 220,
    widths: Annotated[str, typer.Option(help="Of the student.")] = "256,1024",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    results: Annotated[Path, typer.Option(help="What was measured.")] = RESULTS,
) -> None:
    """What the chunked distillation head costs beside the chunked cross-entropy."""
    torch.set_num_threads(1)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    described = machine.describe(torch.device("cpu"))
    found = {int(one): measured(positions, int(one), repeats) for one in widths.split(",")}
    table = Table(*("width", "way", "over cross-entropy", "over three products"))
    goals = []
    for width, rows in found.items():
        for name, one in rows.items():
            table.add_row(
                str(width),
                name,
                f"{one['over_cross_entropy']:.2f}",
                f"{one['over_products']:.2f}",
            )
        for name in ("topk", "sampled"):
            one = rows[f"{name}, one pass"]
            what = f"{name}, width {width}: over cross-entropy"
            goals.append(Goal(what, one["over_cross_entropy"], 1.05))
            goals.append(Goal(f"{name}, width {width}: over products", one["over_products"], 1.5))
    console.print(table)
    console.print(goal_table(goals))
    results.write_text(json.dumps({"machine": described, "widths": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
