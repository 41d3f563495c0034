"""The real SmolLM2, and a student with GPT-2's tokenizer: stage one once, stage two by each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.tokens.tokenizers import save_tokenizer
from tests.tiny_runs import result_log, student_config

pytestmark = pytest.mark.slow
NUM_PARAGRAPHS = 40


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """SmolLM2-135M-Instruct, from its packaged file."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        fetch("smollm2"), gguf_file=file, dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    save_tokenizer(folder, smollm2_tokenizer)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, austen_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    prose = (austen_dir / "persuasion.txt").read_text(encoding="utf-8").split("\n\n")
    (folder / "prose.txt").write_text("\n\n".join(prose[10 : 10 + NUM_PARAGRAPHS]))
    corpus = CorpusConfig(
        source=str(folder / "prose.txt"), labeled=False, txt_unit="paragraph", split=None
    )
    return cache_teacher.run(
        CacheTeacherConfig.of(
            task="lm", name="prose", teacher=str(teacher), device="cpu", max_length=128,
            labeled=corpus, out=folder / "cache",
        )
    ).cache  # fmt: skip


@pytest.mark.parametrize("align", ["map", "spans", "projection"])
def test_a_real_teacher_teaches_other_tokens(
    align: str, cache: Path, gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "gpt2", gpt2_tokenizer)
    config = student_config(
        cache, tmp_path / "run", student_tokenizer=str(tmp_path / "gpt2"), align=align,
        batch_size=2, lr=0.01, temperature=1.0, max_steps=8, checkpoint_steps=4,
    )  # fmt: skip
    record = train_student.run(config).record
    coverage = record.about["coverage"]
    assert coverage["positions"] > 0.95 and coverage["mass"] > 0.8
    first, last = [line for line in result_log(tmp_path / "run") if "eval_ce" in line]
    assert last["eval_ce"] < first["eval_ce"] and last["eval_kl"] < first["eval_kl"]
    # The teacher is a good one of this text, so that its bits say that its log-probs are its own.
    assert 0.5 < first["eval_teacher_bits_per_byte"] < 1.6 < last["eval_bits_per_byte"]
