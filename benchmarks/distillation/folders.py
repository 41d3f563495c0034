"""Where a run keeps what it makes: every folder is called by what its contents depend on.

So a changed recipe makes new folders beside the old ones, an unchanged one finds its own again, and
rows that ask for the same training share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.stages.training.config import NOT_RESULTS, TrainStudentConfig


@dataclass(frozen=True)
class Folders:
    """Folders below the work folder."""

    work: Path

    def corpus(self, name: str) -> Path:
        """Of a written corpus."""
        return self.work / "corpora" / name

    def teacher(self, corpus: str, settings: dict[str, Any]) -> Path:
        """Of the teacher that learns from a corpus's labels."""
        return self.work / "teachers" / f"{corpus}-{fingerprint(settings)[:8]}"

    def cache(self, corpus: str, teacher: Path, settings: dict[str, Any]) -> Path:
        """Of a teacher's cache over a corpus."""
        return self.work / "caches" / f"{corpus}-by-{teacher.name}-{fingerprint(settings)[:8]}"

    def student(self, config: TrainStudentConfig, cache: Path) -> Path:
        """Of a student's run."""
        settings = config.model_dump(mode="json")
        for name in ("cache", *NOT_RESULTS):
            del settings[name]
        return self.work / "runs" / f"{cache.name}-{fingerprint(settings)[:8]}"
