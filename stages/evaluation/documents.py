"""The text that an evaluation reads."""

from __future__ import annotations

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.documents import Document


def documents_with_text(corpus: Corpus) -> list[Document]:
    """The documents that are not empty.

    Raises:
        UserError: if all are.
    """
    documents = [one for one in corpus.documents(0, len(corpus)) if one.text.strip()]
    if not documents:
        raise UserError(
            f"the {len(corpus)} documents of {corpus.config.source} are all empty: check "
            "--text-column"
        )
    return documents
