"""What a person sees while a stage runs: rich progress bars fed by the stages' observers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from teacher_cache.cache.plan import Shard, ShardPlan
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_teacher import StageOneObserver
from teacher_cache.stages.join.join import Joined, joined_line
from teacher_cache.stages.train_student import StageTwoObserver

# What stands in a line of the log besides the loss and its terms.
NO_TERMS = ("grad_norm", "learning_rate", "epoch", "step")
EVALUATED = (
    *("eval_micro_f1", "eval_macro_f1", "eval_exact_match"),
    *("eval_mse", "eval_pearson", "eval_mse_to_teacher"),
    *("eval_accuracy", "eval_f1", "eval_perplexity", "eval_teacher_perplexity"),
    *("eval_bits_per_byte", "eval_teacher_bits_per_byte", "eval_chunks"),
    *("eval_agreement", "eval_kl"),
)


class FieldsColumn(ProgressColumn):
    """The free text that the observer keeps up to date."""

    def render(self, task: Task) -> Text:
        """Show the task's `status` field."""
        return Text(str(task.fields.get("status", "")), style="cyan")


def progress_bar(console: Console) -> Progress:
    """A bar with counts, time left and free text."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        FieldsColumn(),
        console=console,
        # Without a terminal a bar is one long line at the end: plain lines are printed instead.
        disable=not console.is_terminal,
    )


class StageOneProgress(StageOneObserver):
    """Samples, samples/s, tokens/s, time left, shards done, bytes written.

    Args:
        console: to show it on.
        description: of the bar.
    """

    def __init__(self, console: Console, description: str = "teacher"):
        self._console = console
        self._description = description
        self._progress = progress_bar(console)
        self._started = 0.0
        self._samples = self._tokens = self._bytes = self._shards = self._num_shards = 0

    def __enter__(self) -> StageOneProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_plan(
        self, cache: Path, plans: dict[str, ShardPlan], kept: list[Sidecar], todo: list[Shard]
    ) -> None:
        """Say where the cache lies and what is kept; start the bar."""
        self._num_shards = len(kept) + len(todo)
        self._shards = len(kept)
        self._bytes = sum(sidecar.num_bytes for sidecar in kept)
        done = sum(sidecar.documents[1] - sidecar.documents[0] for sidecar in kept)
        spans = [plans[split].documents(shard_idx) for split, shard_idx in todo]
        num_shards = sum(len(plan) for plan in plans.values())
        of_slice = "" if self._num_shards == num_shards else f" of {num_shards:,} here"
        self._console.print(
            f"cache {cache}: {self._num_shards:,} shards{of_slice}, {len(kept):,} kept"
        )
        if not todo:
            return
        self._started = time.monotonic()
        self._task = self._progress.add_task(
            self._description,
            total=done + sum(stop - start for start, stop in spans),
            completed=done,
        )
        self._progress.start()

    def on_batch(self, num_samples: int, num_tokens: int) -> None:
        """Advance by a batch."""
        self._samples += num_samples
        self._tokens += num_tokens
        self._progress.update(self._task, advance=num_samples, status=self._status())

    def on_shard(self, sidecar: Sidecar) -> None:
        """Count the shard, and its empty documents as done."""
        self._shards += 1
        self._bytes += sidecar.num_bytes
        empty = sidecar.documents[1] - sidecar.documents[0] - sidecar.num_samples
        self._progress.update(self._task, advance=empty, status=self._status())
        if not self._console.is_terminal:
            self._console.print(self._status())

    def _status(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self._samples / seconds:,.0f} samples/s  {self._tokens / seconds:,.0f} tokens/s  "
            f"{self._shards}/{self._num_shards} shards  {self._bytes / 1e6:,.1f} MB"
        )


class TrainingBar(TrainerCallback):
    """Steps with the latest terms of the loss; evaluations as lines above the bar."""

    def __init__(self, console: Console, description: str):
        self._console = console
        self._description = description
        self._progress = progress_bar(console)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the bar where training starts."""
        self._task = self._progress.add_task(
            self._description, total=state.max_steps, completed=state.global_step
        )
        self._progress.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Advance the bar."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the terms, or print an evaluation."""
        logs = logs or {}
        if "loss" in logs:
            shown = {name: value for name, value in logs.items() if name not in NO_TERMS}
            terms = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            self._progress.update(self._task, status=terms)
            if not self._console.is_terminal and state.global_step % (10 * args.logging_steps) == 0:
                self._console.print(f"step {state.global_step:,}: {terms}")
        found = [f"{name[5:]} {logs[name]:.3f}" for name in EVALUATED if name in logs]
        if found:
            self._console.print(f"step {state.global_step:,}, held out: {', '.join(found)}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the bar."""
        self._progress.stop()

    def close(self) -> None:
        """Close the bar after an interruption."""
        self._progress.stop()


class TrainingProgress(StageTwoObserver):
    """Says what was verified, where the run lies and where it goes on; for student and teacher."""

    def __init__(self, console: Console, description: str):
        self._console = console
        self._bar = TrainingBar(console, description)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_join(self, joined: Joined) -> None:
        """One line: what was compared, or what was let pass."""
        line = joined_line(joined)
        if line is not None:
            self._console.print(line, style="green", highlight=False, soft_wrap=True)
            return
        names = ", ".join(difference.name for difference in joined.report.differences)
        self._console.print(
            f"! tokenization differs ({names}); --on-mismatch warn lets it pass, and the run is "
            "marked",
            style="yellow",
        )

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        """Where the run lies, and the checkpoint it goes on from."""
        resumed = f", going on from {checkpoint.name}" if checkpoint else ""
        self._console.print(f"run {run}: {num_steps:,} steps{resumed}")

    def callbacks(self) -> list[TrainerCallback]:
        """The bar."""
        return [self._bar]
