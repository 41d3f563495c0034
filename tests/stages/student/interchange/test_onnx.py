"""An ONNX file computes what the student computes, at lengths and batches that were not traced."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.interchange.onnx import write_onnx
from tests.tiny_students import small_config, small_student

APPEND = {"mode": "append", "token_id": 3}
MOVE = {"mode": "move_first_to_last"}
# By what they are: a language model, or a classifier's changes.
STUDENTS: dict[str, dict[str, Any]] = {
    "Mamba-2": {"arch": "mamba2"},
    "Mamba-1": {"arch": "mamba"},
    "groups": {"arch": "mamba2", "head_dim": 6, "ngroups": 4, "chunk_size": 16},
    "attention in one of two": {"arch": "mamba2", "attn_layer_idx": [1], "d_intermediate": 12},
    "Mamba-2 both ways": {"arch": "mamba2", "bidirectional": True, "pooling": "mean"},
    "Mamba-1 both ways": {"arch": "mamba", "bidirectional": True, "position_map": MOVE},
    "appended": {"arch": "mamba2", "pooling": "cls", "position_map": APPEND},
    "last": {"arch": "mamba", "pooling": "last", "head": "linear"},
}
LANGUAGE_MODELS = ("Mamba-2", "Mamba-1", "groups", "attention in one of two")
FIRST = ("Mamba-2",)  # the others at length


def model_of(name: str) -> Any:
    if name in LANGUAGE_MODELS:
        return build_language_model(small_config(**STUDENTS[name]), seed=0).eval()
    return small_student(**STUDENTS[name])


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask: one row whole, one padded on the right, one on the left."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1 and length > 1:
        mask[1, length // 2 + 1 :] = 0
        mask[2, : length // 3] = 0
    return ids, mask


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=pytest.mark.ci if one in FIRST else pytest.mark.slow)
        for one in STUDENTS
    ],
)
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="comes with the development tools")
    model = model_of(name)
    write_onnx(model, None, tmp_path / "s.onnx", source="It")
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", options)
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    for length in (1, 9, 64, 130):
        for rows in (1, 3):
            ids, mask = batch(rows, length)
            given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            found = torch.from_numpy(np.asarray(session.run(["logits"], given)[0]))
            with torch.no_grad():
                expected = model(ids, mask).logits
            is_real = mask.bool() if found.ndim == 3 else slice(None)
            assert (found[is_real] - expected[is_real]).abs().max() < 1e-5, (length, rows)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'install it with .*"\.\[onnx\]"'):
        write_onnx(small_student(), None, tmp_path / "s.onnx", source="This student")


def test_another_kind_of_student_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = BertForSequenceClassification(config)
    with pytest.raises(UserError, match="is a BertForSequenceClassification of transformers"):
        write_onnx(model, None, tmp_path / "s.onnx", source="This student")
