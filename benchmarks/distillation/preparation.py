"""What students learn from: corpora that are apart, teachers, and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.distillation import leakage
from benchmarks.distillation.corpora import (
    CORPUS_OF,
    MovieCorpus,
    Name,
    Stage,
    block_of,
    corpus_config,
    read_corpora,
)
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.leakage import Overlap
from benchmarks.distillation.predictions import HeldOut
from benchmarks.distillation.rows import Block, Row
from benchmarks.distillation.scale import Scale
from benchmarks.distillation.training import (
    BASE_MODEL,
    cache_config,
    teacher_config,
    teacher_corpus,
)
from teacher_cache.pipeline.progress import StageOneProgress, TrainingProgress
from teacher_cache.stages import cache_teacher, finetune_teacher
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.tokens.tokenizers import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is there before the first student.

    Attributes:
        stage: tuning or final.
        corpora: by name.
        held_out: the reviews that judge a block.
        overlaps: of what is learned from with what judges.
        teachers: by the corpus whose labels they learned from.
        caches: by the corpus that they hold and that of their teacher.
    """

    stage: Stage
    corpora: dict[Name, MovieCorpus]
    held_out: dict[Block, HeldOut]
    overlaps: list[Overlap]
    teachers: dict[Name, Path]
    caches: dict[tuple[Name, Name], Path]

    def corpus(self, row: Row) -> MovieCorpus:
        """The corpus that a row learns from."""
        return self.corpora[CORPUS_OF[row.block, self.stage]]

    def teacher(self, row: Row) -> Path:
        """The teacher whose logits a row learns from, or is compared with."""
        return self.teachers[teacher_corpus(row, self.stage)]

    def cache(self, row: Row) -> Path:
        """The cache that a row's students are trained from."""
        return self.caches[self.corpus(row).name, teacher_corpus(row, self.stage)]


def prepare(
    stage: Stage, rows: Sequence[Row], scale: Scale, folders: Folders, console: Console
) -> Prepared:
    """Write corpora, see that they are apart, fine-tune teachers, fill caches.

    What an earlier run has made is found again; what it left unfinished is gone on with.

    Args:
        stage: tuning never trains on, nor is judged by, a review of a test movie.
        rows: that need something to learn from.
        scale: how much of everything.
        folders: where it goes.
        console: for progress.

    Raises:
        CheckFailed: if a text that judges would be learned from.
    """
    corpora = read_corpora(scale)
    sources = {(CORPUS_OF[row.block, stage], teacher_corpus(row, stage)) for row in rows}
    used = sorted({name for pair in sources for name in pair})
    for name in used:
        corpora[name].write(folders.corpus(name))
    cached = sorted({corpus for corpus, _ in sources})
    overlaps = _check(stage, corpora, used, cached, scale, folders, console)
    teachers = {
        name: _fine_tuned(name, folders, scale, console)
        for name in sorted({teacher for _, teacher in sources})
    }
    return Prepared(
        stage=stage,
        corpora=corpora,
        held_out={row.block: _held_out(corpora, row.block, stage, folders) for row in rows},
        overlaps=overlaps,
        teachers=teachers,
        caches={
            (corpus, teacher): _cached(corpus, teachers[teacher], folders, scale, console)
            for corpus, teacher in sorted(_cached_sources(rows, stage))
        },
    )


def _cached_sources(rows: Sequence[Row], stage: Stage) -> set[tuple[Name, Name]]:
    """Corpora with their teachers, but for those that no student learns from."""
    return {
        (CORPUS_OF[row.block, stage], teacher_corpus(row, stage))
        for row in rows
        if row.kind == "student" or row.teacher == "own"
    }


def _check(
    stage: Stage,
    corpora: dict[Name, MovieCorpus],
    used: Sequence[Name],
    cached: Sequence[Name],
    scale: Scale,
    folders: Folders,
    console: Console,
) -> list[Overlap]:
    judging: list[Name] = ["full"] if stage == "final" else ["tuning", "full"]
    held_out = {
        f"the {corpora[name].held_out_split} movies": _texts(corpora[name].held_out)
        for name in judging
    }
    parts = {f"{name}'s reviews": _texts(corpora[name].train) for name in used}
    parts |= {f"{name}'s unlabelled texts": _texts(corpora[name].unlabeled) for name in used}
    overlaps = leakage.check(parts, held_out)
    for name, texts in held_out.items():
        num = sum(len(part) for part in parts.values())
        console.print(f"✓ none of {len(texts):,} texts of {name} is among {num:,} to learn from")
    with_views = [name for name in cached if scale.views[block_of(name)]]
    views = [one for name in with_views for one in _view_overlaps(name, held_out, scale, folders)]
    for one in views:
        console.print(
            f"{one.part}: {one.num_normalised} of {one.num_texts:,} read like a text of "
            f"{one.held_out}"
        )
    return overlaps + views


def _view_overlaps(
    corpus: Name, held_out: dict[str, list[str]], scale: Scale, folders: Folders
) -> list[Overlap]:
    tokenizer = load_tokenizer(str(fetch(BASE_MODEL)), option="--model")
    return leakage.view_overlaps(
        {
            f"{corpus}'s {what}": corpus_config(folders.corpus(corpus), split)
            for what, split in (("reviews", "train"), ("unlabelled texts", "unlabeled"))
        },
        held_out,
        num_views=scale.views[block_of(corpus)],
        reading=Reading.of(tokenizer, max_length=scale.max_length),
    )


def _texts(rows: Sequence[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def _held_out(
    corpora: dict[Name, MovieCorpus], block: Block, stage: Stage, folders: Folders
) -> HeldOut:
    corpus = corpora[CORPUS_OF[block, stage]]
    config = corpus_config(folders.corpus(corpus.name), corpus.held_out_split)
    return HeldOut.load(config, [row["movie_name"] for row in corpus.held_out])


def _fine_tuned(corpus: Name, folders: Folders, scale: Scale, console: Console) -> Path:
    with TrainingProgress(console, f"teacher of {corpus}") as progress:
        result = finetune_teacher.run(teacher_config(corpus, folders, scale), progress)
    console.print(f"✓ teacher of {corpus}: {result.teacher}")
    return result.teacher


def _cached(corpus: Name, teacher: Path, folders: Folders, scale: Scale, console: Console) -> Path:
    with StageOneProgress(console) as progress:
        result = cache_teacher.run(cache_config(corpus, teacher, folders, scale), progress)
    console.print(f"✓ {corpus}: {result.cache}")
    return result.cache
