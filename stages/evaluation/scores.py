"""Score language models on packed rows: their own next-token log-probs, and the teacher's beside.

Bits a byte are counted by the bytes of text that the predicted tokens stand for.

Every sum is over the positions that count in training, and a model sees one document at a time, so
the figures depend neither on packing nor on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.data.collation import length_sorted_batches
from teacher_cache.stages.data.packing import PackedRow
from teacher_cache.stages.evaluation.models import LanguageModel
from teacher_cache.stages.evaluation.references import TEMPERATURE, Reference
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.objective import Targets, teacher_distances
from teacher_cache.stages.models.inference import for_each_batch
from teacher_cache.stages.tokens.support import Support

SLICE_LOGITS = 2**24  # of one model at a time; 64 MiB in float32, and a few copies

# Forward KL and plain cross-entropy, whatever was trained on.
PLAIN = ObjectiveConfig(temperature=TEMPERATURE)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one model; means over positions.

    Attributes:
        nll: negative log-likelihood of the next token, nats.
        kl: from the teacher's distribution, nats; None without a teacher. Of cached heads it is a
            bound from below, of cached draws an unbiased estimate.
        agreement: share of positions with the teacher's most probable token; None without a
            teacher, and for draws, which may have missed it.
    """

    nll: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """Of a token of the model's own tokenizer; infinite of a model that diverged."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll))


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What was found at each of N positions that count, row by row and in each row's order.

    Attributes:
        row: [N] which row.
        place: [N] tokens of the position's document that stand up to it, itself included.
        document: [N] from 0, over all rows.
        top_prob: [N] the teacher's probability of its most probable token; NaN where none is known.
        top_id: [N] that token, -1 where none is known.
        nll: [M + 1, N] nats; the teacher's last, NaN without one.
        kl: [M, N] from the teacher, nats; NaN without one.
        student_id: [M, N] the model's most probable token.
        student_prob: [M, N] its probability, of all that the model may choose.
    """

    row: np.ndarray
    place: np.ndarray
    document: np.ndarray
    top_prob: np.ndarray
    top_id: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    student_id: np.ndarray
    student_prob: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[PackedRow], num_models: int) -> Positions:
        """With nothing found yet."""
        masks = [row.loss_mask for row in rows]
        num = sum(int(mask.sum()) for mask in masks)
        places, documents, num_documents = [], [], 0
        for row, mask in zip(rows, masks, strict=True):
            which = np.repeat(np.arange(len(row.lengths)), row.lengths)
            within = np.concatenate([np.arange(1, length + 1) for length in row.lengths])
            counted, which = np.unique(which[mask], return_inverse=True)
            places.append(within[mask])
            documents.append(num_documents + which)
            num_documents += len(counted)
        return cls(
            row=np.repeat(np.arange(len(rows)), [int(mask.sum()) for mask in masks]),
            place=np.concatenate(places),
            document=np.concatenate(documents),
            top_prob=np.full(num, np.nan, np.float32),
            top_id=np.full(num, -1, np.int64),
            nll=np.full((num_models + 1, num), np.nan, np.float32),
            kl=np.full((num_models, num), np.nan, np.float32),
            student_id=np.full((num_models, num), -1, np.int64),
            student_prob=np.full((num_models, num), np.nan, np.float32),
        )

    def agrees(self, model: int) -> np.ndarray:
        """[N] whether a model's most probable token is the teacher's; NaN where none is known."""
        return np.where(self.top_id < 0, np.nan, self.student_id[model] == self.top_id)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of several models on the same rows.

    Attributes:
        num_positions: that count.
        models: in their order.
        teacher: its own score; None without a teacher.
        positions: what the scores are means of.
    """

    num_positions: int
    models: tuple[Score, ...]
    teacher: Score | None
    positions: Positions


def score(
    models: Sequence[LanguageModel],
    rows: Sequence[PackedRow],
    reference: Reference | None,
    *,
    batch_tokens: int,
    slice_logits: int = SLICE_LOGITS,
) -> Scores:
    """Score models on rows of one tokenization.

    Args:
        models: all of the rows' tokens; perhaps none.
        rows: at least one position of which counts.
        reference: the teacher on the same rows, or none.
        batch_tokens: padded tokens in a forward batch.
        slice_logits: of a model at a time, but those of one position.

    Raises:
        UserError: if a single row does not fit into memory, or a teacher's logits are no numbers.
    """
    device = models[0].model.device if models else torch.device("cpu")
    supports = [_mask(reference, one) for one in models]
    found = Positions.of_rows(rows, len(models))
    first = np.searchsorted(found.row, np.arange(len(rows) + 1))  # position of each row

    def run(batch: np.ndarray) -> None:
        chosen = [rows[i] for i in batch]
        where = np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])
        next_ids = torch.from_numpy(np.concatenate([row.next_ids for row in chosen])).to(device)
        with torch.inference_mode():
            teacher = None if reference is None else reference.of_batch(batch)
            states = [_counted_states(one, chosen) for one in models]
            width = max([1, *(one.model.config.vocab_size for one in models)])
            size = max(1, slice_logits // width)
            for start in range(0, len(next_ids), size):
                part = slice(start, start + size)
                targets = None
                if teacher is not None:
                    targets, log_probs = teacher.at_positions(part)
                    found.nll[-1, where[part]] = -log_probs.float().cpu().numpy()
                    _note_teacher(found, where[part], targets)
                for i, model in enumerate(models):
                    logits = model.logits(states[i][part])
                    _note(found, i, where[part], logits, next_ids[part], targets, supports[i])

    lengths = np.array([len(row.input_ids) for row in rows], np.int64)
    for_each_batch(run, length_sorted_batches(lengths, max_tokens=batch_tokens), lengths)
    return Scores(
        num_positions=len(found.row),
        models=tuple(_score(found, i, reference) for i in range(len(models))),
        teacher=None if reference is None else Score(nll=_mean(found.nll[-1])),
        positions=found,
    )


def _counted_states(model: LanguageModel, rows: Sequence[PackedRow]) -> Tensor:
    states = model.states([row.input_ids for row in rows], [row.lengths for row in rows])
    counted = torch.from_numpy(np.concatenate([row.loss_mask for row in rows]))
    return states[counted.to(states.device)]


def _note_teacher(found: Positions, where: np.ndarray, targets: Targets) -> None:
    """Keep the teacher's most probable token; of draws, which may have missed it, none."""
    top_ids = targets.top_ids()
    if top_ids is not None and isinstance(targets, TeacherDistribution):
        found.top_id[where] = top_ids.cpu().numpy()
        found.top_prob[where] = targets.log_probs.amax(dim=-1).exp().float().cpu().numpy()


def _note(
    found: Positions,
    i: int,
    where: np.ndarray,
    logits: Tensor,
    next_ids: Tensor,
    targets: Targets | None,
    support: Tensor | None,
) -> None:
    """Keep what the i-th model says at n positions, of logits [n, V]."""
    nll = torch.nn.functional.cross_entropy(logits, next_ids, reduction="none")
    found.nll[i, where] = nll.float().cpu().numpy()
    top, top_ids = logits.max(dim=-1)
    found.student_id[i, where] = top_ids.cpu().numpy()
    found.student_prob[i, where] = (top - logits.logsumexp(dim=-1)).exp().float().cpu().numpy()
    if targets is not None:
        kl = teacher_distances(logits, _over(targets, logits.shape[-1]), PLAIN, support)
        found.kl[i, where] = kl.float().cpu().numpy()


def _over(targets: Targets, num_outcomes: int) -> Targets:
    """Distributions of a whole support over as many outcomes as the student has."""
    if not isinstance(targets, TeacherDistribution) or targets.head_ids is not None:
        return targets
    missing = num_outcomes - targets.log_probs.shape[-1]
    log_probs = torch.nn.functional.pad(targets.log_probs, (0, missing), value=-torch.inf)
    return TeacherDistribution(log_probs=log_probs, temperature=targets.temperature)


def _mask(reference: Reference | None, model: LanguageModel) -> Tensor | None:
    """[V] bool of a model's outcomes, those of the teacher's support."""
    if reference is None:
        return None
    support: Support = reference.support
    mask = torch.zeros(model.model.config.vocab_size, dtype=torch.bool)
    mask[: support.size] = True
    mask[list(support.unused)] = False
    return mask.to(model.model.device)


def _score(found: Positions, i: int, reference: Reference | None) -> Score:
    has_top = bool((found.top_id >= 0).any())
    return Score(
        nll=_mean(found.nll[i]),
        kl=None if reference is None else _mean(found.kl[i]),
        agreement=_mean(found.agrees(i)) if has_top else None,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def num_bytes_by_id(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, str | None]:
    """Bytes of text that each id stands for, int64 [V]; 0 of special tokens, which are no text.

    For who counts ids that stand in no pieces. Where the tokenizer begins a text with a space that
    the text has not, the begin token before it takes that back: -1.

    Returns:
        The numbers, and what the tokens do not keep of a text; None where they keep all.

    Raises:
        UserError: for a tokenizer that does not tell.
    """
    reader = Reader.of(tokenizer)
    sizes = np.array(
        [
            0 if content is None or token_id in reader.table.special else len(content)
            for token_id, content in enumerate(reader.table.content)
        ],
        np.int64,
    )
    if reader.frame.before and reader.frame.adds_space:
        sizes[reader.frame.before[-1]] = -1
    return sizes, reader.caveat


def num_predicted_bytes(
    rows: Sequence[PackedRow], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str | None]:
    """Bytes of the text whose tokens some position predicts, without special tokens.

    Returns:
        The number, and why it is not comparable with another tokenizer's; None where it is.

    Raises:
        UserError: for a tokenizer that does not tell.
    """
    reader = Reader.of(tokenizer)
    special = sorted(reader.table.special)
    num_bytes = num_unknown = 0
    for row in rows:
        ids = row.input_ids.astype(np.int64)
        num_unknown += int((ids == reader.table.unknown).sum())
        widths: list[np.ndarray] = []
        for place, piece in enumerate(np.split(ids, np.cumsum(row.lengths)[:-1])):
            begins = True if place else None if row.continues is None else not row.continues
            widths.append(np.diff(reader.piece_of_ids(piece, begins=begins).spans.bounds))
        is_text = row.loss_mask[:-1] & ~np.isin(ids[1:], special)
        num_bytes += int(np.concatenate(widths)[1:][is_text].sum())
    caveats = [] if reader.caveat is None else [f"{reader.caveat}: compare it with no other's"]
    if num_unknown:
        caveats.append(f"{num_unknown:,} unknown tokens count for no byte")
    return num_bytes, "; ".join(caveats) or None
