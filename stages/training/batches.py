"""What the student trains on: cached samples of both kinds, in a fixed order of batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from teacher_cache.cache.codecs.interface import Codec, rows_of
from teacher_cache.cache.order import ShuffledBatches
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import POOLED
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.data.corpus import PLACE_BYTES
from teacher_cache.stages.data.packing import next_ids
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.join.aligned_sample import NO_POSITION, AlignedSample, SampleAligner

Batch = dict[str, torch.Tensor]


class CachedSamples(Dataset[dict[str, np.ndarray]]):
    """Samples of one split by position in `sample_idxs`.

    Args:
        reader: of the split.
        sample_idxs: [N] which of its samples, in this order.
        labeled: whether a sample's label counts.
    """

    def __init__(self, reader: CacheReader, sample_idxs: np.ndarray, *, labeled: bool):
        self._reader = reader
        self._sample_idxs = sample_idxs
        self.labeled = labeled
        self.lengths = reader.lengths()[sample_idxs]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._sample_idxs)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        sample = self._reader.sample(int(self._sample_idxs[position]))
        return sample if self.labeled else {k: v for k, v in sample.items() if k != "label"}


class Samples(Protocol):
    """Samples of one kind, by position, with the number of tokens of each."""

    lengths: np.ndarray  # [N]

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, np.ndarray]: ...


class SeveralSplits(Dataset[dict[str, np.ndarray]]):
    """Samples of one kind from several splits, one split behind the other."""

    def __init__(self, splits: Sequence[Samples]):
        self._splits = splits
        self._starts = np.cumsum([0, *(len(split) for split in splits)])
        self.lengths = np.concatenate([split.lengths for split in splits])

    def __len__(self) -> int:
        """The number of samples of all splits."""
        return len(self.lengths)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        split_idx = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._splits[split_idx][position - int(self._starts[split_idx])]


class BothKinds(Dataset[dict[str, np.ndarray]]):
    """Labelled samples first, unlabelled ones behind them, under one range of positions."""

    def __init__(self, labeled: Samples, unlabeled: Samples | None = None):
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        """The number of samples of both kinds."""
        return len(self.labeled) + (len(self.unlabeled) if self.unlabeled else 0)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        if position < len(self.labeled):
            return self.labeled[position]
        assert self.unlabeled is not None
        return self.unlabeled[position - len(self.labeled)]


class AlternatingBatches(Sampler[list[int]]):
    """Every batch of a training, in order; a function of the data's lengths and the seed alone.

    After labelled batch i come `floor((i + 1) r) - floor(i r)` unlabelled ones, r being the ratio:
    one each at 1, an unlabelled one after every second at 0.5. Each kind is shuffled anew every
    time it is used up. So the place to resume from is the number of batches done.

    Args:
        dataset: both kinds.
        batch_size: samples in a batch.
        num_batches: of the whole training.
        unlabeled_ratio: unlabelled batches for each labelled one.
        seed: of the run.
    """

    def __init__(
        self,
        dataset: BothKinds,
        *,
        batch_size: int,
        num_batches: int,
        unlabeled_ratio: float,
        seed: int,
    ):
        self._dataset = dataset
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._ratio = unlabeled_ratio if dataset.unlabeled is not None else 0.0
        self._seed = seed

    def __len__(self) -> int:
        """The number of batches."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        labeled = self._shuffled(self._dataset.labeled)
        unlabeled = self._shuffled(self._dataset.unlabeled) if self._dataset.unlabeled else None
        offset = len(self._dataset.labeled)
        for kind_is_labeled in alternate(self._num_batches, self._ratio):
            if kind_is_labeled:
                yield next(labeled).tolist()
            else:
                assert unlabeled is not None
                yield (next(unlabeled) + offset).tolist()

    def _shuffled(self, samples: Samples) -> Iterator[np.ndarray]:
        return iter(ShuffledBatches(samples.lengths, batch_size=self._batch_size, seed=self._seed))


def alternate(num_batches: int, unlabeled_ratio: float) -> Iterator[bool]:
    """True for a labelled batch, False for an unlabelled one, `num_batches` times."""
    done = labeled = 0
    while done < num_batches:
        yield True
        done += 1
        owed = math.floor((labeled + 1) * unlabeled_ratio) - math.floor(labeled * unlabeled_ratio)
        labeled += 1
        for _ in range(min(owed, num_batches - done)):
            yield False
            done += 1


def batches_per_epoch(num_labeled: int, *, batch_size: int, unlabeled_ratio: float) -> int:
    """Batches until every labelled sample was seen once, unlabelled batches between included."""
    labeled_batches = math.ceil(num_labeled / batch_size)
    return labeled_batches + math.floor(labeled_batches * unlabeled_ratio)


class Expanding(Protocol):
    """What makes further fields of a stored sample."""

    def expand(self, sample: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Fields of the sample's length."""
        ...


def layer_fields(layers: Expanding | None, samples: Sequence[dict[str, Any]]) -> Batch:
    """The fields that `layers` makes of samples, each [B, ...], 0 behind a shorter sample."""
    if layers is None:
        return {}
    expanded = [layers.expand(sample) for sample in samples]
    return {
        name: torch.from_numpy(stacked([one[name] for one in expanded])) for name in expanded[0]
    }


def stacked(arrays: Sequence[np.ndarray], behind: str = "constant") -> np.ndarray:
    """Arrays of differing sizes as one, [B, ...]; what is behind a smaller one is 0, or its edge.

    Args:
        arrays: B of one number of dimensions; those to be padded by their edge are not empty.
        behind: a mode of `numpy.pad`.
    """
    sizes = np.max([array.shape for array in arrays], axis=0)
    padded: list[np.ndarray] = []
    for array in arrays:
        widths = [(0, int(most - size)) for size, most in zip(array.shape, sizes, strict=True)]
        padded.append(np.pad(array, widths, mode=behind))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return np.stack(padded)


class Collator(ABC):
    """Stack samples of one kind into a batch, padded on the right.

    Returns `input_ids` [B, S] int64, `attention_mask` [B, S] int64, what `arrays` adds, and the
    fields that `layers` makes of a sample.

    Args:
        pad_id: fills `input_ids`.
        layers: what is matched inside the teacher, or none.
    """

    def __init__(self, pad_id: int, layers: Expanding | None = None):
        self._pad_id = pad_id
        self._layers = layers

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Collate the samples."""
        input_ids, mask = pad_batch(self.ids_of(samples), self._pad_id)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask.astype(np.int64),
            **self.arrays(samples),
        }
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | layer_fields(self._layers, samples)

    def ids_of(self, samples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """What the student reads of each."""
        return [sample["input_ids"] for sample in samples]

    @abstractmethod
    def arrays(self, samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """What is compared with the student, stacked."""


class SampleCollator(Collator):
    """Of a classifier, or of documents with labels.

    Adds what the samples have of `teacher_logits` [B, C] float32, `teacher_pooled` [B, D] float16
    and `labels` [B, ...] as the head's `batched` has them: of one of several classes [B] int64,
    `NO_LABEL` where a document of a labelled corpus has none.

    Args:
        pad_id: fills `input_ids`.
        layers: what is matched inside the teacher, or none.
        head: whose labels they are.
    """

    def __init__(self, pad_id: int, layers: Expanding | None = None, *, head: Head = SINGLE):
        super().__init__(pad_id, layers)
        self._head = head

    def arrays(self, samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """One row a sample."""
        arrays: dict[str, np.ndarray] = {}
        for field, name in (("class_logits", "teacher_logits"), (POOLED, "teacher_pooled")):
            if field in samples[0]:
                arrays[name] = np.stack([sample[field] for sample in samples])
        if "label" in samples[0]:
            arrays["labels"] = self._head.batched(np.stack([one["label"] for one in samples]))
        return arrays


def held_out(sample_ids: Iterable[bytes], fraction: float) -> np.ndarray:
    """Which samples are held out for evaluation, [N] bool: a share that no limit or order moves.

    Args:
        sample_ids: 16 bytes each; they are hashes, so their first 8 bytes are a uniform number.
            Views have the first bytes of their document, so they are held out with it.
        fraction: the share, 0 to 1.
    """
    ids = np.frombuffer(b"".join(sample_ids), np.uint8).reshape(-1, 16)
    place = ids[:, :PLACE_BYTES].copy().view(">u8").reshape(-1) / 2.0**64
    return place < fraction


# Torch cannot index with these everywhere; their bits it can.
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32}


class PackedSamples(CachedSamples):
    """Samples of a language model's cache; labelled ones with their next tokens."""

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """A sample's fields, `segment` among them even where each is one document."""
        sample = dict(super().__getitem__(position))
        sample.setdefault("segment", np.zeros(len(sample["input_ids"]), np.uint16))
        if not self.labeled:
            return sample
        return sample | {"next_ids": next_ids(sample["input_ids"], sample["segment"])}


class PackedCollator(Collator):
    """Of a language model, what the teacher said as stored.

    Adds `seq_idx` [B, S] int32 (the document of each token), `loss_mask` [B, S] bool, the codec's
    fields [B, S, ...] and, of labelled samples, `next_ids` [B, S] int64.

    Args:
        pad_id: fills `input_ids`.
        codec: of the cache.
        layers: what is matched inside the teacher, or none.
    """

    def __init__(self, pad_id: int, codec: Codec, layers: Expanding | None = None):
        super().__init__(pad_id, layers)
        self._codec = codec

    def arrays(self, samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """A row a position."""
        arrays = {
            "seq_idx": _documents([sample["segment"] for sample in samples]),
            "loss_mask": stacked([sample["loss_mask"] for sample in samples]),
        }
        expanded = [rows_of(self._codec, sample) for sample in samples]
        arrays |= {name: stacked([one[name] for one in expanded]) for name in expanded[0]}
        if "next_ids" in samples[0]:
            # What padding holds is masked.
            arrays["next_ids"] = stacked([sample["next_ids"] for sample in samples])
        return arrays


def _documents(segments: Sequence[np.ndarray]) -> np.ndarray:
    """[B, S] int32. Padding belongs to the last document: behind it, so no document reads it."""
    return stacked([one.astype(np.int32) for one in segments], "edge")


def at(field: Tensor, mask: Tensor) -> Tensor:
    """A field [B, S, ...] at the positions of a mask [B, S]: [N, ...], whatever it is stored as."""
    bits = _SAME_BITS.get(field.dtype)
    return field[mask] if bits is None else field.view(bits)[mask].view(field.dtype)


SUMS = ("num_bytes", "num_teacher_bytes", "teacher_nll")
"""Of a sample, for what is measured per byte of text."""


class AlignedSamples(PackedSamples):
    """Samples of a language model's cache with their text read again.

    `lengths` are the teacher's, which order batches as well.

    Args:
        reader: of the split.
        sample_idxs: [N] which of its samples, in this order.
        labeled: whether the student's next tokens are learned.
        aligner: of the two tokenizers.
        is_spans: compare distributions only where both sides' next tokens are the same bytes, too.
    """

    def __init__(
        self,
        reader: CacheReader,
        sample_idxs: np.ndarray,
        *,
        labeled: bool,
        aligner: SampleAligner,
        is_spans: bool,
    ):
        super().__init__(reader, sample_idxs, labeled=labeled)
        self._aligner = aligner
        self._is_spans = is_spans

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The cached fields as they are, and under `aligned` what the student reads."""
        sample = super().__getitem__(position)
        aligned = self._aligner(sample)
        if self._is_spans:
            kept = np.where(aligned.is_one_to_one, aligned.teacher_positions, NO_POSITION)
        else:
            kept = aligned.teacher_positions
        counts = (kept >= 0) & sample["loss_mask"][np.maximum(kept, 0)]
        found = {
            "cached": sample,
            "aligned": aligned,
            "teacher_positions": np.where(counts, kept, NO_POSITION),
        }
        if not self.labeled:
            return found
        return found | {"next_ids": next_ids(aligned.input_ids, aligned.segment)}


class AlignedCollator(Collator):
    """Of a language model whose text the student reads in tokens of its own.

    Adds what `PackedCollator` does, [B, S] over the student's tokens: `loss_mask` is True where the
    student has a next token, `has_teacher` [B, S] where the cached fields are those of the
    teacher's position that has read the same bytes. Besides, `following_ids` [B, S] int64 (the next
    tokens, learned or not), `chunk_index` [B, S] int64, `teacher_chunks` [B, C] float32,
    `chunk_mask` [B, C] bool, and of each sample `num_bytes`, `num_teacher_bytes` and `teacher_nll`.

    Args:
        pad_id: fills `input_ids`.
        codec: of the cache.
    """

    def __init__(self, pad_id: int, codec: Codec):
        super().__init__(pad_id)
        self._codec = codec

    def ids_of(self, samples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The student's own tokens."""
        return [one.input_ids for one in self._aligned(samples)]

    def arrays(self, samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """A row a position of the student's, and a row a chunk."""
        aligned = self._aligned(samples)
        following = [next_ids(one.input_ids, one.segment) for one in aligned]
        positions = [
            one["teacher_positions"] if len(one["teacher_positions"]) else np.full(1, NO_POSITION)
            for one in samples
        ]
        arrays = {
            "seq_idx": _documents([one.segment for one in aligned]),
            "loss_mask": stacked([one >= 0 for one in following]),
            "has_teacher": stacked([one >= 0 for one in positions]),
            "following_ids": stacked(following),
            "chunk_index": stacked([one.chunk_index + 1 for one in aligned]) - 1,  # behind: -1
            "teacher_chunks": stacked([one.teacher_chunks for one in aligned]),
            "chunk_mask": stacked([np.ones(len(one.teacher_chunks), bool) for one in aligned]),
        }
        expanded = [rows_of(self._codec, one["cached"]) for one in samples]
        arrays |= {
            name: stacked([
                one[name][np.maximum(where, 0)]
                for one, where in zip(expanded, positions, strict=True)
            ])
            for name in expanded[0]
        }  # fmt: skip
        if "next_ids" in samples[0]:
            arrays["next_ids"] = arrays["following_ids"]
        for name in SUMS:
            arrays[name] = np.array([getattr(one, name) for one in aligned], np.float64)
        return arrays

    def _aligned(self, samples: Sequence[dict[str, Any]]) -> list[AlignedSample]:
        return [_not_empty(sample["aligned"], self._pad_id) for sample in samples]


def _not_empty(sample: AlignedSample, pad_id: int) -> AlignedSample:
    """A sample of which the student's tokenizer leaves nothing, as one token that predicts none."""
    if len(sample.input_ids):
        return sample
    return AlignedSample(
        **vars(sample)
        | {
            "input_ids": np.full(1, pad_id, np.uint32),
            "segment": np.zeros(1, np.uint16),
            "chunk_index": np.full(1, -1, np.int64),
        }
    )
