from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import verify as module
from teacher_cache.stages.models.inference import Outputs
from teacher_cache.stages.teacher import classification
from teacher_cache.stages.teacher.classification import Classification
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.verify import verify_deep
from tests.tiny_models import write_tiny_bert


def test_the_teacher_says_the_same_again(tiny_cache: Path) -> None:
    assert verify_deep(tiny_cache, 8) < 1e-5


def test_samples_of_every_split_are_compared(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def counted(teacher: Any, input_ids: Any, **given: Any) -> Outputs:
        compared.append(len(input_ids))
        return run_teacher(teacher, input_ids, **given)

    monkeypatch.setattr(classification, "run_teacher", counted)
    verify_deep(tiny_cache, 5)
    verify_deep(tiny_cache, 1)
    verify_deep(tiny_cache, 10**6)
    sizes = [len(CacheReader(tiny_cache, split)) for split in ("labeled", "unlabeled")]
    assert compared == [5, 5, 1, 1, *sizes]


@pytest.mark.parametrize("wrong", [0.01, np.inf, np.nan])
@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_a_logit_that_differs(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, split: str
) -> None:
    first = CacheReader(tiny_cache, split).sample(0)["input_ids"]

    def altered(teacher: Any, input_ids: Any, **given: Any) -> Outputs:
        found = run_teacher(teacher, input_ids, **given)
        if np.array_equal(input_ids[0], first):
            found.vectors["class_logits"][0, 0] += wrong
        return found

    monkeypatch.setattr(classification, "run_teacher", altered)
    with pytest.raises(CheckFailed, match=rf"differ by up to {wrong:.2g} .*at most 0\.001"):
        verify_deep(tiny_cache, 4)


def test_pooled_states_are_compared_too(
    pooled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify_deep(pooled_cache, 8) < 1e-5
    wrong = 0.01

    def altered(teacher: Any, input_ids: Any, **given: Any) -> Outputs:
        found = run_teacher(teacher, input_ids, **given)
        states = found.vectors["pooled"]
        states[-1, 0] += wrong * np.linalg.norm(states[-1])
        return found

    monkeypatch.setattr(classification, "run_teacher", altered)
    with pytest.raises(CheckFailed, match=r"pooled states are up to 0\.01 .*at most 0\.002"):
        verify_deep(pooled_cache, 4)
    wrong = np.nan
    with pytest.raises(CheckFailed, match="pooled states are up to nan"):
        verify_deep(pooled_cache, 4)


def test_another_teacher(
    tiny_cache: Path, tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    other = write_tiny_bert(tmp_path, bert_tokenizer, seed=1)
    with pytest.raises(CheckFailed, match=r"other weights.*with --teacher"):
        verify_deep(tiny_cache, 4, teacher=str(other))


def test_the_teacher_may_have_moved(tiny_cache: Path, tiny_bert: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_bert, tmp_path / "moved")
    assert verify_deep(tiny_cache, 4, teacher=str(moved)) < 1e-5
    with pytest.raises(UserError, match="is no folder"):
        verify_deep(tiny_cache, 4, teacher=str(tmp_path / "missing"))


def test_a_number_format_that_this_device_does_not_compute(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache made in float16 on a GPU can be checked on a CPU, to float16's tolerance."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    manifest = CacheReader(tiny_cache).manifest
    recorded = {
        **manifest.settings,
        "teacher": {**manifest.settings["teacher"], "dtype": "float16"},
    }
    found: list[torch.dtype] = []
    load = Classification.load

    def watched(config: Any, *, with_attention: bool) -> Any:
        teacher = load(config, with_attention=with_attention)
        found.append(teacher.dtype)
        return teacher

    class Recorded(CacheReader):
        def __init__(self, cache: Path, split: str = "labeled"):
            super().__init__(cache, split)
            self.manifest.settings.update(recorded)

    monkeypatch.setattr(module, "CacheReader", Recorded)
    monkeypatch.setattr(Classification, "load", watched)
    assert verify_deep(tiny_cache, 4) < 1e-5
    assert found == [torch.float32]


def test_a_split_without_samples(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(CacheReader):
        def __len__(self) -> int:
            return 0 if self.split == "unlabeled" else super().__len__()

    monkeypatch.setattr(module, "CacheReader", Empty)
    assert verify_deep(tiny_cache, 4) < 1e-5


def test_a_teacher_changed_in_place(tiny_cache: Path, tiny_bert: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(tiny_bert, tmp_path / "changed")
    model: Any = BertForSequenceClassification.from_pretrained(changed)
    model.classifier.bias.data[0] += 1e-6
    model.save_pretrained(changed)
    with pytest.raises(CheckFailed, match="other weights"):
        verify_deep(tiny_cache, 4, teacher=str(changed))
