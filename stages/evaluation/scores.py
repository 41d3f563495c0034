"""Score language models on packed rows: their own next-token log-probs, and the teacher's beside.

Bits a byte are counted by the bytes of text that the predicted tokens stand for.

Every sum is over the positions that count in training, and a model sees one document at a time, so
the figures depend neither on packing nor on what else is in a batch.
"""

from __future__ import annotations

import math
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
from teacher_cache.stages.losses.objective import StepTotals, Targets, distillation_objective
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
class Scores:
    """Of several models on the same rows.

    Attributes:
        num_positions: that count.
        models: in their order.
        teacher: its own score; None without a teacher.
    """

    num_positions: int
    models: tuple[Score, ...]
    teacher: Score | None


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
    sums = np.zeros((len(models) + 1, 3))  # of nll, kl and agreement; the teacher's last
    num_positions = sum(int(row.loss_mask.sum()) for row in rows)

    def run(batch: np.ndarray) -> None:
        nonlocal sums
        chosen = [rows[i] for i in batch]
        found = np.zeros_like(sums)
        next_ids = torch.from_numpy(np.concatenate([row.next_ids for row in chosen])).to(device)
        with torch.inference_mode():
            teacher = None if reference is None else reference.of_batch(batch)
            states = [_counted_states(one, chosen) for one in models]
            width = max([1, *(one.model.config.vocab_size for one in models)])
            for start in range(0, len(next_ids), max(1, slice_logits // width)):
                where = slice(start, start + max(1, slice_logits // width))
                targets = None
                if teacher is not None:
                    targets, log_probs = teacher.at_positions(where)
                    found[-1, 0] -= float(log_probs.double().sum())
                for i, model in enumerate(models):
                    logits = model.logits(states[i][where])
                    found[i] += _sums(logits, next_ids[where], targets, supports[i])
        sums = sums + found  # only now: where memory ran out, each half comes again

    lengths = np.array([len(row.input_ids) for row in rows], np.int64)
    for_each_batch(run, length_sorted_batches(lengths, max_tokens=batch_tokens), lengths)
    means = sums / num_positions
    return Scores(
        num_positions=num_positions,
        models=tuple(_score(mean, reference) for mean in means[:-1]),
        teacher=None if reference is None else Score(nll=float(means[-1, 0])),
    )


def _counted_states(model: LanguageModel, rows: Sequence[PackedRow]) -> Tensor:
    states = model.states([row.input_ids for row in rows], [row.lengths for row in rows])
    counted = torch.from_numpy(np.concatenate([row.loss_mask for row in rows]))
    return states[counted.to(states.device)]


def _sums(
    logits: Tensor, next_ids: Tensor, targets: Targets | None, support: Tensor | None
) -> np.ndarray:
    """Sums over n positions of what `Score` has the means of; NaN where there is none."""
    num = len(next_ids)
    if targets is None:
        nll = torch.nn.functional.cross_entropy(logits, next_ids, reduction="sum")
        return np.array([float(nll), np.nan, np.nan])
    terms = distillation_objective(
        logits,
        _over(targets, logits.shape[-1]),
        next_ids,
        config=PLAIN,
        totals=StepTotals(num_labeled=num, num_labels=num),
        support=support,
    )
    assert terms.ce is not None, "the positions have next tokens"
    agreement = math.nan if terms.agreement is None else float(terms.agreement)
    return num * np.array([float(terms.ce), float(terms.kd), agreement])


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


def _score(mean: np.ndarray, reference: Reference | None) -> Score:
    nll, kl, agreement = (float(one) for one in mean)
    return Score(
        nll=nll,
        kl=None if reference is None else kl,
        agreement=None if math.isnan(agreement) else agreement,
    )


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
