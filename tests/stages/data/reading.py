"""What a source's documents and labels are, in its own order, as the one loader gives them."""

from __future__ import annotations

from pathlib import Path

from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus


def read(source: Path | str, **settings: object) -> list[tuple[str, str | None]]:
    """Texts with their labels as the source writes them."""
    config = CorpusConfig.model_validate({"source": str(source), **settings})
    corpus = load_corpus(config)
    names = corpus.label_names

    def label(found: int | None) -> str | None:
        return None if found is None else str(found) if names is None else names[found]

    documents = sorted(corpus.documents(0, len(corpus)), key=lambda one: one.position)
    return [(document.text, label(document.label)) for document in documents]
