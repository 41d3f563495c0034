"""The table's own teacher: a small Llama and its tokenizer, trained here on the training novels.

It learns from whole novels and is judged, after each pass over them, by one that it never reads;
the best pass is kept, so that it is stopped before it knows its text by heart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from benchmarks.codec_table.rows import MAX_LENGTH, Scale
from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.data.corpus import CorpusConfig, Document, load_corpus
from teacher_cache.stages.data.packing import pack
from teacher_cache.stages.tokens.tokenizers import save_tokenizer

END = "<|endoftext|>"
RECORD_FILE = "trained.json"  # written last: the teacher is whole where it is there
WARMUP, WEIGHT_DECAY, SEED = 0.05, 0.1, 0
NUM_JUDGED = 256  # sequences, of the validation novel and of those that are learned from

Say = Callable[[str], None]


def novels(split: str, max_chapters: int | None) -> CorpusConfig:
    """Chapters of a split's novels, in a shuffled order."""
    return CorpusConfig(source="austen", split=split, labeled=False, max_samples=max_chapters)


def train(folder: Path, scale: Scale, say: Say) -> Path:
    """Train the teacher, unless it is there; returns its folder."""
    if (folder / RECORD_FILE).is_file():
        return folder
    documents = _documents(novels("train", scale.teacher_chapters))
    tokenizer = trained_tokenizer([one.text for one in documents], scale.num_ids)
    learned = sequences(documents, tokenizer)
    judges = sequences(_documents(novels("validation", None)), tokenizer)[:NUM_JUDGED]
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token)),
            **scale.teacher,
        )
    )
    epochs, weights = _best_epoch(model, learned, judges, scale, say)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    record = {
        "num_parameters": model.num_parameters(),
        "num_tokens": sum(len(ids) for ids in learned),
        "epochs": epochs,
    }
    write_json_atomically(folder / RECORD_FILE, record)
    return folder


def trained_tokenizer(texts: Sequence[str], num_ids: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some text; its first id ends a document."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=num_ids, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, model_max_length=MAX_LENGTH
    )


def sequences(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray]:
    """The pieces of documents that stage one has a teacher read, each alone."""
    return [
        sample.input_ids[sample.segment == piece]
        for sample in pack(documents, tokenizer, max_length=MAX_LENGTH).samples
        for piece in range(len(sample.pieces))
    ]


def _documents(config: CorpusConfig) -> list[Document]:
    corpus = load_corpus(config)
    return corpus.documents(0, len(corpus))


def _best_epoch(
    model: LlamaForCausalLM,
    learned: Sequence[np.ndarray],
    judges: Sequence[np.ndarray],
    scale: Scale,
    say: Say,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """What each pass came to, and the weights after the one that predicts the judges best."""
    size = scale.teacher_batch
    per_epoch = math.ceil(len(learned) / size)
    num_steps = per_epoch * scale.teacher_epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=scale.teacher_lr, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * num_steps), num_steps)
    rng = np.random.default_rng(SEED)
    epochs: list[dict[str, float]] = []
    best: dict[str, Any] = {}
    for epoch in range(1, scale.teacher_epochs + 1):
        model.train()
        order = rng.permutation(len(learned))
        for start in range(0, len(order), size):
            loss = _loss(model, [learned[idx] for idx in order[start : start + size]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found = {
            "ce_learned": cross_entropy(model, learned[:NUM_JUDGED]),
            "ce_validation": cross_entropy(model, judges),
        }
        if not epochs or found["ce_validation"] < min(one["ce_validation"] for one in epochs):
            best = copy.deepcopy(model.state_dict())
        epochs.append(found)
        say(f"teacher, pass {epoch} of {scale.teacher_epochs}: {found}")
    return epochs, best


@torch.no_grad()
def cross_entropy(model: LlamaForCausalLM, found: Sequence[np.ndarray], size: int = 16) -> float:
    """Mean nats of a next token, over whole sequences."""
    model.eval()
    total = num = 0.0
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        counted = sum(len(ids) - 1 for ids in batch)
        total += float(_loss(model, batch)) * counted
        num += counted
    return total / num


def _loss(model: LlamaForCausalLM, batch: Sequence[np.ndarray]) -> torch.Tensor:
    padded, mask = pad_batch(batch, 0)
    ids, real = torch.from_numpy(padded), torch.from_numpy(mask)
    labels = ids.masked_fill(~real, NO_LABEL)
    return model(input_ids=ids, attention_mask=real.long(), labels=labels).loss
