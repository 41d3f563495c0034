"""What a classification teacher makes of every token by itself: a table of its pooled states.

The teacher reads each token of its vocabulary as a text of its own and leaves its pooled state
(`forward.py`), which holds what its layers have learned of the token for this very task. Its input
embeddings hold little of that: fine-tuning hardly moves the rows of rare tokens. A student whose
embeddings start from both knows, of tokens that no cached text holds, what the teacher knows.
Static embeddings made so from sentence encoders are known as Model2Vec (Tulkens and van Dongen
2024, https://github.com/MinishLab/model2vec).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.schema import POOLED
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.load import ClassificationTeacher
from teacher_cache.stages.teacher.stored_tables import StoredTable, file_of, read_table

STATES = "token_states"
"""The table's name, and key of the manifest's `about` that says how large it is, or None."""
STATES_FILE = file_of(STATES)

logger = logging.getLogger(__name__)


def token_states(
    teacher: ClassificationTeacher, *, num_ids: int, pooled_width: int, batch_tokens: int
) -> StoredTable:
    """Run the teacher over each token by itself, between the special tokens of any text.

    Special tokens, and ids without a token, are no text: their rows are 0. So are those of tokens
    at which the teacher's number format overflows; the log says how many.

    Args:
        teacher: on its device.
        num_ids: R; tokens from there on are left out, the teacher has no embeddings of them.
        pooled_width: D.
        batch_tokens: positions in a forward batch.

    Raises:
        UserError: if not even one such text fits into memory.
    """
    before, after = _frame(teacher.tokenizer)
    special = _special_ids(teacher.tokenizer)
    ids = sorted(teacher.tokenizer.get_vocab().values())
    known = [token_id for token_id in ids if token_id < num_ids and token_id not in special]
    logger.info("the teacher reads each of %s tokens by itself", f"{len(known):,}")
    texts = [np.array([*before, token_id, *after], np.uint32) for token_id in known]
    outputs = run_teacher(
        teacher, texts, batch_tokens=batch_tokens, pooled_width=pooled_width, on_batch=None
    )
    states = torch.from_numpy(outputs.vectors[POOLED])
    is_finite = states.isfinite().all(dim=1)
    if not is_finite.all():
        logger.warning(
            "the teacher's states of %d tokens are not finite in its number format: these tokens "
            "are left out of its table of states",
            int((~is_finite).sum()),
        )
        states[~is_finite] = 0.0
    rows = torch.zeros(num_ids, pooled_width)
    rows[known] = states
    return StoredTable.of(STATES, rows)


def read_token_states(cache: Path, manifest: Manifest) -> Tensor:
    """The table [R, D], row i of token id i, in the number format of the file.

    Raises:
        UserError: if the cache has none.
        CheckFailed: if the file is damaged or missing.
    """
    if STATES_FILE not in manifest.teacher_files:
        asked = POOLED in manifest.settings.get("hidden", "").split(",")
        remedy = (
            "run the same `pipe cache-teacher` again, it adds them and computes no shard again"
            if asked
            else "make a cache with `pipe cache-teacher --hidden pooled`"
        )
        raise UserError(
            "--embeddings teacher-states needs the teacher's pooled state of each token, which "
            f"{cache} was made without: {remedy}"
        )
    return read_table(cache, manifest, STATES)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """With a role (`cls_token`, ...) or without one, as a decoder's reserved tokens are."""
    without_role = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return without_role | set(tokenizer.all_special_ids)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = list(found["input_ids"]), list(found["special_tokens_mask"])
    if 0 not in is_special:
        return ids, []
    first, last = is_special.index(0), len(ids) - is_special[::-1].index(0)
    return ids[:first], ids[last:]
