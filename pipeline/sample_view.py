"""One cached sample as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.interface import Decoded, has_rows, rows_of
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.cache.plan import LABELED
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.pictures import (
    Panels,
    both_sides,
    readable_tokens,
    teacher_maps,
)
from teacher_cache.pipeline.tables import has_positions
from teacher_cache.stages.heads import recorded_head
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap, recorded_map

NUM_POSITIONS = 4
NUM_TOKENS = 5
MARK, NO_MARK = "→", ""  # before what came, and before what did not


def print_distributions(
    console: Console,
    reader: CacheReader,
    sample: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int | None,
) -> None:
    """Print the most probable next tokens at a sample's positions, the real one marked.

    Args:
        console: to print to.
        reader: of the cache.
        sample: as the reader gives it.
        tokenizer: of the cache.
        most: positions, evenly spaced; None for all.

    Raises:
        CheckFailed: if the head of cached states, or the map of an aligned cache, is damaged.
    """
    counts = np.flatnonzero(sample["loss_mask"])
    num_pieces = int(sample["segment"].max(initial=0)) + 1
    console.print(f"pieces of documents: {num_pieces}; positions that count: {len(counts):,}")
    stored = np.cumsum(has_rows(sample)) - 1  # of a position, where its row is
    decode, temperature = _decoder(reader, sample)
    vocabulary_map = recorded_map(reader.cache, reader.manifest)
    named = _namer(tokenizer, vocabulary_map)
    num = len(counts) if most is None else min(most, len(counts))
    places = np.linspace(0, len(counts) - 1, num).astype(int)
    for position in counts[np.unique(places)]:
        decoded = decode(int(position))
        next_id = int(sample["input_ids"][position + 1])
        real = tokenizer.convert_ids_to_tokens(next_id)
        if vocabulary_map is not None:
            next_id = int(vocabulary_map.student_ids[next_id])
        log_prob = float(sample["next_log_prob"][stored[position]])
        here = tokenizer.convert_ids_to_tokens(int(sample["input_ids"][position]))
        console.print(
            f"  at {position}, {here}: next is {real} (p {np.exp(log_prob):.4f} at T=1, "
            f"{_rank(decoded, next_id)}); T={temperature:g}: "
            f"{_most_probable(decoded, named, next_id)}",
            soft_wrap=True,
        )


def _namer(
    tokenizer: PreTrainedTokenizerBase, vocabulary_map: VocabularyMap | None
) -> Callable[[list[int]], list[str]]:
    """Strings of the support's ids; of a student's, the teacher's tokens of the same bytes."""

    def own_tokens(ids: list[int]) -> list[str]:
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]

    if vocabulary_map is None:
        return own_tokens
    teacher_ids = np.arange(len(vocabulary_map.student_ids))
    # Of several teacher ids, the lowest.
    teacher_id_of = dict(
        zip(vocabulary_map.student_ids[::-1].tolist(), teacher_ids[::-1].tolist(), strict=True)
    )
    return lambda ids: own_tokens([teacher_id_of[one] for one in ids])


def _ranked(decoded: Decoded) -> tuple[np.ndarray, np.ndarray]:
    """Ids that are kept, the most probable first, and their log-probs."""
    log_probs = np.asarray(decoded.log_probs)[0]
    order = np.argsort(-log_probs, kind="stable")
    order = order[np.isfinite(log_probs[order])]
    return order if decoded.ids is None else np.asarray(decoded.ids)[0, order], log_probs[order]


def _rank(decoded: Decoded, next_id: int) -> str:
    """Where the next token stands among those that are kept."""
    found = np.flatnonzero(_ranked(decoded)[0] == next_id)
    return f"rank {found[0] + 1}" if len(found) else "not kept"


def _most_probable(decoded: Decoded, named: Callable[[list[int]], list[str]], next_id: int) -> str:
    """The first outcomes with their probabilities, the one that came marked."""
    ids, log_probs = (one[:NUM_TOKENS] for one in _ranked(decoded))
    listed = [
        f"{MARK if token_id == next_id else NO_MARK}{token} {np.exp(log_prob):.4f}"
        for token_id, token, log_prob in zip(ids, named(ids.tolist()), log_probs, strict=True)
    ]
    if decoded.ids is not None:
        listed.append(f"all others {float(np.exp(np.asarray(decoded.tail_log_prob)[0])):.4f}")
    return ", ".join(listed)


def _decoder(
    reader: CacheReader, sample: Mapping[str, np.ndarray]
) -> tuple[Callable[[int], Decoded], float]:
    """What gives the distribution at one position, [1, ...] arrays, and its temperature."""
    # A classifier is shown without torch.
    import torch

    from teacher_cache.stages.codecs.named import open_codec, plain_temperature

    codec = open_codec(reader)
    temperature = plain_temperature(codec)
    rows = rows_of(codec, sample)

    def decode(position: int) -> Decoded:
        one = {
            name: torch.from_numpy(np.array(field[position : position + 1]))
            for name, field in rows.items()
        }
        with torch.inference_mode():
            return codec.decode(one, temperature)

    return decode, temperature


def print_sample(console: Console, cache: Path, sample_id: str, *, most: int | None = None) -> None:
    """Print a sample's text, tokens, label and the teacher's distribution.

    Args:
        console: to print to.
        cache: its folder.
        sample_id: or its beginning.
        most: of a language model, positions that are shown, evenly spaced; None for all.

    Raises:
        UserError: if no split has exactly one sample of that id.
    """
    split, sample_idx = _find(cache, sample_id)
    reader = CacheReader(cache, split)
    sample = reader.sample(sample_idx)
    tokenizer = load_tokenizer(str((cache / TEACHER_FOLDER).resolve()), option="CACHE")
    console.print(f"{split} sample {sample_idx}, id {sample['sample_id'].tobytes().hex()}")
    if has_positions(reader.manifest):
        print_distributions(console, reader, sample, tokenizer, most=most)
    else:
        _print_classes(console, reader.manifest, sample)
    ids = sample["input_ids"].tolist()
    if has_positions(reader.manifest) and not has_rows(sample).all():
        _print_counted(console, sample, tokenizer)
    else:
        is_pair = isinstance(reader.manifest.settings["data"][LABELED].get("text_column"), list)
        # Only its special tokens show where the second text of a pair begins.
        text = tokenizer.decode(ids, skip_special_tokens=not is_pair)
        console.print(f"{'pair' if is_pair else 'text'}: {text}", soft_wrap=True)
    console.print(
        f"{len(ids)} tokens: {' '.join(tokenizer.convert_ids_to_tokens(ids))}", soft_wrap=True
    )


def _print_counted(
    console: Console, sample: Mapping[str, np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print a sample's text, what counts of it in colour, and that once more by itself."""
    is_learned = np.append(False, sample["loss_mask"][:-1])
    borders = np.flatnonzero(np.diff(is_learned)) + 1
    whole = Text("text: ")
    answers = []
    for run in np.split(np.arange(len(is_learned)), borders):
        text = str(tokenizer.decode(sample["input_ids"][run].tolist()))
        whole.append(text, style="bold green" if is_learned[run[0]] else "dim")
        if is_learned[run[0]]:
            answers.append(text)
    console.print(whole, soft_wrap=True)
    for answer in answers:
        console.print(Text(f"counts: {answer!r}", style="green"), soft_wrap=True)


def attention_panels(cache: Path, sample_id: str, *, run: Path | None = None) -> Panels:
    """The cached attention maps of a sample.

    Args:
        cache: its folder.
        sample_id: or its beginning.
        run: a student's, whose mixing matrices stand beside the maps; or none.

    Raises:
        UserError: if no split has exactly one sample of that id, the cache holds no maps, or the
            run cannot be compared with them.
    """
    split, sample_idx = _find(cache, sample_id)
    reader = CacheReader(cache, split)
    sample = reader.sample(sample_idx)
    tokenizer = load_tokenizer(str((cache / TEACHER_FOLDER).resolve()), option="CACHE")
    if run is not None:
        return both_sides(reader, sample, tokenizer, run)
    tokens = readable_tokens(tokenizer, sample["input_ids"].tolist())
    return Panels(maps=teacher_maps(reader.manifest, sample, tokens), tokens=tokens)


def _print_classes(console: Console, manifest: Manifest, sample: Mapping[str, np.ndarray]) -> None:
    names, head = manifest.about["id2label"], recorded_head(manifest.settings)
    console.print(f"label: {head.told_label(sample['label'], names)}")
    for line in head.told_outputs(sample["class_logits"].astype(np.float64), names):
        console.print(line)


def _find(cache: Path, sample_id: str) -> tuple[str, int]:
    splits = CacheReader(cache).manifest.splits
    found = [(split, i) for split in splits for i in CacheReader(cache, split).find(sample_id)]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} samples of {cache} have an id that starts with {sample_id!r}: give a "
            f"whole id, `pipe inspect {cache}` prints some"
        )
    return found[0]
