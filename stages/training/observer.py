"""Who is told what happens while a model trains."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback


class TrainingObserver:
    """Told what happens while a teacher or a student trains; the base says nothing."""

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        """Training begins, or goes on from a checkpoint."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer: a progress bar, say."""
        return []
