"""The student before its first step, whichever kind it is: what training needs to know of it.

Its first embeddings may be made from its teacher's: a truncated SVD of the teacher's tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.join.compare import check_position_map
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.models.batching import Batching
from teacher_cache.stages.models.inference import classifier_batching, read_in_passes
from teacher_cache.stages.student import build_student, pretrained
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.position_map import choose
from teacher_cache.stages.teacher.tables import (
    STATES_FILE,
    TABLE_FILE,
    read_embedding_table,
    read_token_states,
)
from teacher_cache.stages.training.config import TrainingConfig, TrainStudentConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartingStudent:
    """A student that has not been trained on the cache yet.

    Attributes:
        model: in float32, on the CPU.
        pad_id: fills batches.
        settings: what a run's settings record of it: all that its first weights depend on besides
            the seed, and its architecture.
        about: what a reader wants to know of it besides.
    """

    model: PreTrainedModel
    pad_id: int
    settings: dict[str, Any]
    about: dict[str, Any]


def start_student(
    config: TrainStudentConfig,
    joined: Joined,
    *,
    id2label: Mapping[int, str],
    lengths: np.ndarray,
    head: Head = SINGLE,
) -> StartingStudent:
    """The student that the settings ask for.

    Args:
        config: the run's settings.
        joined: the student's tokenizer and maximum length.
        id2label: class names by id.
        lengths: [N] tokens of the cached samples, at least one.
        head: what its outputs mean.

    Raises:
        UserError: if it cannot be built, or does not fit the tokenizer or the samples.
        CheckFailed: if its position map would lose tokens of some sample.
    """
    name = config.student.pretrained
    if name is None:
        return _mamba(config, joined, id2label, lengths, head)
    return _pretrained(config, name, joined, id2label, lengths, head)


def _mamba(
    config: TrainStudentConfig,
    joined: Joined,
    id2label: Mapping[int, str],
    lengths: np.ndarray,
    head: Head,
) -> StartingStudent:
    shape = config.student.shape("classification")
    position_map = choose(joined.tokenizer, config.student.pooling)
    check_position_map(position_map, np.unique(lengths).tolist())
    pad_id = filler_id(joined.tokenizer)
    student_config = MambaStudentConfig(
        vocab_size=max(joined.tokenizer.get_vocab().values()) + 1,
        **shape,
        position_map=position_map.to_dict(),
        pad_token_id=pad_id,
        id2label=dict(id2label),
        label2id={name: class_id for class_id, name in id2label.items()},
        problem_type=head.problem_type,
    )
    model = build_student(student_config, seed=config.training.seed)
    is_random = config.training.embeddings == "random"
    taken = {} if is_random else take_embeddings(model, config.training, joined)
    return StartingStudent(
        model=model,
        pad_id=pad_id,
        settings=shape | {"teacher_embeddings_sha256": None} | taken,
        about={},
    )


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a Mamba student's batches; any id will do, since padded positions are masked."""
    pad_id = tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else 0


def take_embeddings(
    model: MambaStudentForSequenceClassification | MambaStudentForCausalLM,
    config: TrainingConfig,
    joined: Joined,
) -> dict[str, str]:
    """Start from the teacher's embeddings; returns the SHA-256 of the files that hold them.

    Args:
        model: a fresh student, whose table is changed.
        config: of the training, whose `embeddings` are not random.
        joined: the student's tokenizer.

    Raises:
        UserError: if the ids mean other strings to teacher and student, or the cache has no table.
        CheckFailed: if its file is damaged or missing.
    """
    if not joined.report.waivable:
        raise UserError(
            f"--embeddings {config.embeddings} needs ids that mean the same to teacher and "
            "student, and here they mean other strings: use the cache's own tokenizer, or leave "
            "the option out"
        )
    assert config.cache is not None, "the join has read it"
    manifest = read_manifest(config.cache)
    weight = model.backbone.embedding.weight
    table = read_embedding_table(config.cache, manifest, option=config.embeddings)
    files = {"teacher_embeddings_sha256": manifest.teacher_files[TABLE_FILE]}
    if config.embeddings == "teacher-states":
        table = side_by_side(table, read_token_states(config.cache, manifest))
        files["token_states_sha256"] = manifest.teacher_files[STATES_FILE]
    taken = from_teacher(weight, table)
    with torch.no_grad():
        weight.copy_(taken.rows)
    logger.info(
        "embeddings from the teacher's: width %d keeps %.1f %% of its table's energy",
        weight.shape[1],
        100 * taken.energy_kept,
    )
    return files


def _pretrained(
    config: TrainStudentConfig,
    name: str,
    joined: Joined,
    id2label: Mapping[int, str],
    lengths: np.ndarray,
    head: Head,
) -> StartingStudent:
    model = pretrained.pretrained_classifier(
        name, tokenizer=joined.tokenizer, id2label=id2label, seed=config.training.seed, head=head
    )
    pretrained.refuse_too_long(
        name, model, longest_sample=int(lengths.max()), max_length=joined.max_length
    )
    pad_id = model.config.pad_token_id
    assert isinstance(pad_id, int), "pretrained_classifier settles it"
    batching = classifier_batching(
        f"hf:{name}",
        model.eval(),
        joined.tokenizer,
        pad_id=pad_id,
        max_length=joined.max_length,
        plain=Batching(),
    )
    apart = batching.settings()
    if apart:
        logger.warning("hf:%s reads a text otherwise beside longer ones: %s", name, batching)
        read_in_passes(model, batching)
    return StartingStudent(
        model=model,
        pad_id=pad_id,
        settings={"arch": "hf", "start": pretrained.identity(model)} | apart,
        about={"start": config.student.arch},
    )


@dataclass(frozen=True, kw_only=True)
class TeacherEmbeddings:
    """Embeddings that start from a teacher's.

    Attributes:
        rows: [V, d_model], in the dtype of the fresh ones.
        energy_kept: share of the table's sum of squares that the student's width keeps, 0 to 1.
    """

    rows: Tensor
    energy_kept: float


@torch.no_grad()
def from_teacher(fresh: Tensor, table: Tensor) -> TeacherEmbeddings:
    """The teacher's table in the student's width, at the scale of fresh embeddings.

    With the table's SVD, `E = U S V^T`, the row of an id is its row of `U_k S_k = E V_k`: of all
    tables of rank k the one nearest to E (Eckart and Young 1936), so angles and relative distances
    between tokens are the teacher's as far as k dimensions hold them. It is then multiplied by one
    number that gives its entries the standard deviation of fresh ones (0.02 in mamba_ssm, about a
    mean of 0): every other initial weight, and the learning rate, was chosen for that.

    Where the teacher says nothing, the fresh values stay: in rows beyond its table, in rows that
    are all 0 there, and in the columns beyond its width, if that is smaller than `d_model`.

    V is found from the eigenvectors of `E^T E` in float64, D x D and not R x D; that loses
    singular values below 1e-8 of the largest, which no stored table resolves. A component's
    sign is arbitrary, and is chosen so that the largest entry of its column of V is positive.

    Args:
        fresh: [V, d_model], what the student would start from.
        table: [R, D], row i of token id i; rows beyond V are of no use to the student.

    Raises:
        ValueError: if the table is all 0.
    """
    exact = table[: len(fresh)].double()
    is_known = exact.any(dim=1)  # [R]
    if not is_known.any():
        raise ValueError("a table of zeros says nothing of any token")
    energies, components = torch.linalg.eigh(exact.T @ exact)  # ascending: [D], [D, D]
    width = min(fresh.shape[1], exact.shape[1])  # k
    leading = components.flip(1)[:, :width]
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))  # [1, k]
    cut = exact @ (leading * largest.sign())  # [R, k]
    scale = _root_mean_square(fresh.double()) / _root_mean_square(cut[is_known])
    rows = fresh.clone()
    rows[: len(exact), :width][is_known] = (scale * cut[is_known]).to(fresh.dtype)
    energies = energies.clamp(min=0).flip(0)
    return TeacherEmbeddings(rows=rows, energy_kept=float(energies[:width].sum() / energies.sum()))


@torch.no_grad()
def side_by_side(table: Tensor, states: Tensor) -> Tensor:
    """The teacher's embeddings and its states of the same tokens as one table [R, D + P], float64.

    Each part counts as much as the other: its known rows are scaled to a mean squared norm of 1.
    The states are taken from their mean first, since what all tokens share tells none apart.

    Args:
        table: [R', D], the teacher's embeddings.
        states: [R, P], R at least R'; rows that are all 0 say nothing of their token, and stay 0.

    Raises:
        ValueError: if either is all 0, or the states have fewer rows.
    """
    if len(states) < len(table):
        raise ValueError(f"{len(states)} rows of states for {len(table)} of embeddings")
    is_known = states.any(dim=1)
    if not is_known.any():
        raise ValueError("states of zeros say nothing of any token")
    # One buffer, changed in place: of 150,000 tokens and twice 4,096 numbers it has 10 GB.
    joined = torch.zeros(len(states), table.shape[1] + states.shape[1], dtype=torch.float64)
    embeddings, centred = joined[:, : table.shape[1]], joined[:, table.shape[1] :]
    embeddings[: len(table)] = table
    centred.copy_(states)
    centred -= centred.sum(dim=0) / is_known.sum()
    centred[~is_known] = 0.0
    for part in (embeddings, centred):
        norms = torch.linalg.vector_norm(part, dim=1)
        part /= _root_mean_square(norms[norms > 0])
    return joined


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
