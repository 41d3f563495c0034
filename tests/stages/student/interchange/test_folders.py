"""Folders that load where this package is not: a process that cannot import it finds the logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import (
    MambaStudentForCausalLM,
    MambaStudentForSequenceClassification,
    PositionMap,
)
from teacher_cache.stages.student.interchange.folders import write_mamba_ssm, write_transformers
from tests.tiny_students import small_config

# Run with the folder and a file of ids and masks; writes logits. Nothing of ours can be imported.
READER = """
import sys

class Nothing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "teacher_cache":
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Nothing())
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, given, auto = sys.argv[1:]
model = {"lm": AutoModelForCausalLM, "class": AutoModelForSequenceClassification}[auto]
model = model.from_pretrained(folder, trust_remote_code=auto == "class").eval()
batch = {name: torch.from_numpy(one) for name, one in np.load(given).items()}
with torch.no_grad():
    np.save(given + ".npy", model(**batch).logits.numpy())
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=auto == "class")
print(type(model).__name__, model.config.id2label, tokenizer("a film")["input_ids"])
"""


def student(kind: type[Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind(small_config(vocab_size=30522, ngroups=2, chunk_size=4, **changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def elsewhere(folder: Path, tmp_path: Path, auto: str) -> tuple[np.ndarray, str]:
    """The logits of `batch` as another process finds them, and what it printed."""
    given = tmp_path / "batch.npz"
    ids, mask = (one.numpy() for one in batch().values())
    np.savez(given, input_ids=ids, attention_mask=mask)
    words = [sys.executable, "-c", READER, str(folder), str(given), auto]
    ran = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.load(f"{given}.npy"), ran.stdout


def batch() -> dict[str, torch.Tensor]:
    """Rows padded on either side, and one that is not."""
    ids = torch.randint(1, 30522, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    "shape",
    [
        {"position_map": PositionMap(mode="move_first_to_last").to_dict()},
        {"position_map": PositionMap(mode="append", token_id=102).to_dict(), "head": "linear"},
        {"pooling": "mean"},
    ],
    ids=["moved", "appended", "mean"],
)
def test_a_classifier_with_code_of_its_own(
    arch: str,
    shape: dict[str, Any],
    bert_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    names = {0: "rotten", 1: "fresh", 2: "neither"}
    model = student(
        MambaStudentForSequenceClassification,
        arch=arch,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **shape,
    )
    write_transformers(model, bert_tokenizer, tmp_path / "out", source="It")
    found, printed = elsewhere(tmp_path / "out", tmp_path, "class")
    with torch.no_grad():
        expected = model(**batch()).logits.numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert "DistilledMambaForSequenceClassification" in printed and str(names) in printed
    assert str(bert_tokenizer("a film")["input_ids"]) in printed


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
def test_a_language_model_is_transformers_own(
    arch: str, bert_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = student(MambaStudentForCausalLM, arch=arch)
    write_transformers(model, bert_tokenizer, tmp_path / "out", source="It")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    found, printed = elsewhere(tmp_path / "out", tmp_path, "lm")
    with torch.no_grad():
        expected = model(**batch()).logits.numpy()
    real = batch()["attention_mask"].bool().numpy()
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5 * expected.std())
    assert printed.startswith({"mamba": "Mamba", "mamba2": "Mamba2"}[arch] + "ForCausalLM")


def test_the_code_beside_the_weights_learns(
    bert_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Labels give the loss of the student, so that others can go on training it."""
    from teacher_cache.stages.student.interchange.folders import as_remote_classifier

    model = student(MambaStudentForSequenceClassification)
    moved = as_remote_classifier(model)
    labels = torch.tensor([0, 1, 1])
    found, expected = (one(**batch(), labels=labels).loss for one in (moved, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward()
    assert all(one.grad is not None for name, one in moved.named_parameters())


def test_mamba_ssm_gets_its_two_files_and_the_tokenizer(
    bert_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = student(MambaStudentForCausalLM)
    write_mamba_ssm(model, bert_tokenizer, tmp_path / "out", source="It")
    names = {one.name for one in (tmp_path / "out").iterdir()}
    assert {"config.json", "pytorch_model.bin", "tokenizer.json"} <= names
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert weights.keys() == model.state_dict().keys()


def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path) -> None:
    both = student(MambaStudentForSequenceClassification, bidirectional=True)
    with pytest.raises(UserError, match="no bidirectional mixers"):
        write_transformers(both, None, tmp_path / "a", source="It")
    one = student(MambaStudentForSequenceClassification)
    with pytest.raises(UserError, match=r"It is a classifier .* mamba_ssm has Mamba language mod"):
        write_mamba_ssm(one, None, tmp_path / "a", source="It")
    other = student(MambaStudentForCausalLM, norm_epsilon=1e-3)
    with pytest.raises(UserError, match=r"norm_epsilon is 0\.001"):
        write_mamba_ssm(other, None, tmp_path / "a", source="It")
    assert not (tmp_path / "a" / "config.json").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for write in (write_transformers, write_mamba_ssm):
        with pytest.raises(UserError, match="is there already: give a folder that is new"):
            write(student(MambaStudentForCausalLM), None, tmp_path / "full", source="It")
