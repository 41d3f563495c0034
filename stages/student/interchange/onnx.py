"""A student as one ONNX file, which onnxruntime runs, for any batch and length.

The scans are exported in plain operators (`plain_operators`): Mamba-1's loop over positions and
Mamba-2's over chunks are ONNX's Scan.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.commit import explained, write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.backbone import MambaStudentPreTrainedModel
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM


def write_onnx(
    model: PreTrainedModel, tokenizer: Tokenizer | None, out: Path, *, source: str
) -> None:
    """Write a student as an ONNX file, in float32.

    Its inputs are `input_ids` and `attention_mask`, [batch, length] int64 each, padded on either
    side; its output `logits` are [batch, classes], or [batch, length, ids] of a language model.

    Args:
        model: a Mamba student in evaluation mode, a classifier or a language model.
        tokenizer: not written: ONNX has no text.
        out: the file.
        source: what is written, as a sentence begins.

    Raises:
        UserError: if torch's exporter lacks a package, the model is no Mamba student, or the file
            system refuses.
    """
    if not isinstance(model, MambaStudentPreTrainedModel):
        raise UserError(
            f"{source} is a {type(model).__name__} of transformers, which its own exporters serve: "
            "give a Mamba student"
        )
    try:
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"an ONNX file needs the package onnxscript ({error}): install it with `pip install -c "
            'constraints.txt -e ".[onnx]"`'
        ) from error
    ids = torch.ones(2, 20, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes: dict[str, Any] = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    if isinstance(model, MambaStudentForCausalLM):
        inputs["use_cache"], sizes["use_cache"] = False, None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of operators that it has not
    with explained(out), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of itself
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=sizes, dynamo=True, verbose=False,
            input_names=["input_ids", "attention_mask"], output_names=["logits"],
        )  # fmt: skip
        assert program is not None
        file = Path(folder) / "student.onnx"
        program.save(file)
        if len(list(file.parent.iterdir())) > 1:
            raise UserError(f"{source} is larger than 2 GB, which no ONNX file of its own can be")
        write_bytes_atomically(out, file.read_bytes())
