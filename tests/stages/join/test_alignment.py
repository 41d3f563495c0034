"""Which alignment is found for two tables, and which is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.join.aligned_sample import measure
from teacher_cache.stages.join.alignment import Alignment, align, require_known_ids
from teacher_cache.stages.join.config import AlignMode
from teacher_cache.stages.join.report import Difference, JoinReport
from teacher_cache.stages.tokens.record import id_to_string
from teacher_cache.stages.tokens.token_bytes import token_bytes
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap, exact_map
from tests.tiny_language_models import tiny_teacher, write_cache

FILES = Difference(name="tokenizer files", cache="a", student="b", waivable=True)
TABLE = Difference(name="id-to-string table", cache="a", student="b", waivable=False)
PROBE = Difference(name="documents re-tokenised", cache="a", student="b", waivable=False)


def found(
    mode: AlignMode,
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    *differences: Difference,
    captured: VocabularyMap | None = None,
) -> tuple[Alignment, JoinReport]:
    return align(
        mode=mode,
        captured=captured,
        tables=(id_to_string(teacher), teacher),
        student=student,
        report=JoinReport(compared=(), differences=differences),
    )


@pytest.fixture(scope="module")
def longer(gpt2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """GPT-2's with two tokens more."""
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    return tokenizer


@pytest.mark.parametrize("mode", ["auto", "truncate", "pad"])
def test_the_same_table(mode: AlignMode, gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    alignment, report = found(mode, gpt2_tokenizer, gpt2_tokenizer, FILES)
    assert alignment.kind == "same" and alignment.head_ids is None
    assert report.differences == (FILES,)  # of files, which no alignment explains


@pytest.mark.parametrize("mode", ["auto", "truncate", "pad"])
def test_a_longer_student_is_padded(
    mode: AlignMode, gpt2_tokenizer: PreTrainedTokenizerBase, longer: PreTrainedTokenizerBase
) -> None:
    alignment, report = found(mode, gpt2_tokenizer, longer, FILES, TABLE, PROBE)
    assert alignment.kind == "pad" and alignment.head_ids is None
    assert report.differences == (PROBE,)  # texts that come out otherwise are still refused


def test_a_longer_teacher_is_cut_where_that_is_asked_for(
    gpt2_tokenizer: PreTrainedTokenizerBase, longer: PreTrainedTokenizerBase
) -> None:
    alignment, report = found("truncate", longer, gpt2_tokenizer, FILES, TABLE)
    assert alignment.kind == "truncate" and report.verified
    assert alignment.head_ids is not None
    assert alignment.head_ids.tolist() == [*range(50257), -1, -1]
    require_known_ids(alignment, 50256)
    with pytest.raises(CheckFailed, match="hold id 50,257, and the student's table ends at 50,257"):
        require_known_ids(alignment, 50257)
    alignment, report = found("auto", longer, gpt2_tokenizer, TABLE)
    assert not report.accepted("warn")
    with pytest.raises(CheckFailed, match="--align pad needs ids that mean the same"):
        found("pad", longer, gpt2_tokenizer, TABLE)


@pytest.mark.parametrize("mode", ["truncate", "pad"])
def test_other_tables_are_refused_with_the_overlap(
    mode: AlignMode,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    saying = f"--align {mode} needs .* 20 mean the same .* 99.96% of the ids would mean another"
    with pytest.raises(CheckFailed, match=saying):
        found(mode, smollm2_tokenizer, gpt2_tokenizer, TABLE)
    _, report = found("auto", smollm2_tokenizer, gpt2_tokenizer, TABLE)
    assert not report.accepted("warn")


@pytest.mark.parametrize("mode", ["map", "spans", "projection"])
def test_text_read_again_maps_by_bytes_and_ends_by_their_role(
    mode: AlignMode,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    alignment, report = found(mode, smollm2_tokenizer, gpt2_tokenizer, TABLE)
    assert alignment.kind == mode and report.verified
    exact = exact_map(token_bytes(smollm2_tokenizer), token_bytes(gpt2_tokenizer)).student_ids
    ids = alignment.head_ids
    assert ids is not None
    assert np.flatnonzero(ids != exact).tolist() == [2] and ids[2] == 50256
    assert alignment.settings["map_sha256"] == alignment.vocabulary_map.sha256


def test_a_cache_over_a_students_ids_serves_that_student_alone(
    smollm2_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    captured = exact_map(token_bytes(smollm2_tokenizer), token_bytes(gpt2_tokenizer))
    sides = (smollm2_tokenizer, gpt2_tokenizer)
    for mode in ("auto", "map"):
        alignment, report = found(mode, *sides, TABLE, captured=captured)
        assert alignment.kind == "map" and report.verified
        assert alignment.head_ids is not None
        assert alignment.head_ids.tolist() == list(range(50257))
        assert alignment.vocabulary_map.sha256 == captured.sha256
    with pytest.raises(UserError, match="--align spans needs distributions over the teacher's own"):
        found("spans", *sides, captured=captured)
    with pytest.raises(CheckFailed, match="serves no other student"):
        found("auto", *sides[:1], *sides[:1], captured=captured)


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_coverage_is_counted(
    kind: str,
    tmp_path: Path,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    num = len(smollm2_tokenizer)
    codec = TopKCodec(support_size=num, top_k=5) if kind == "topk" else DenseCodec(support_size=num)
    texts = ["Emma was vexed by 1984 balls.", "Go 🚀 home."]
    cache = write_cache(tmp_path / "cache", codec, smollm2_tokenizer, texts, tiny_teacher(num))
    reader = CacheReader(cache)
    alignment, _ = found("map", smollm2_tokenizer, gpt2_tokenizer)
    samples = [reader.sample(i) for i in range(len(reader))]
    coverage = measure(samples, codec, alignment.aligner, alignment.head_ids, temperature=1.0)
    masses, num_positions, num_next = [], 0, 0
    for sample in samples:
        aligned = alignment.aligner(sample)
        num_next += sum(a == b for a, b in zip(aligned.segment, aligned.segment[1:], strict=False))
        decoded = codec.decode(codec.expand(sample), 1.0)
        for position in aligned.teacher_positions:
            if position < 0:
                continue
            num_positions += 1
            ids = range(num) if decoded.ids is None else decoded.ids[position].tolist()
            assert alignment.head_ids is not None
            masses.append(
                sum(
                    np.exp(decoded.log_probs[position, slot])
                    for slot, one in enumerate(ids)
                    if alignment.head_ids[one] >= 0
                )
            )
    assert coverage.num_tokens == num_next
    assert coverage.positions == pytest.approx(num_positions / num_next)
    assert coverage.mass == pytest.approx(np.mean(masses), rel=1e-4)
    assert 0 < coverage.one_to_one <= coverage.positions <= 1
