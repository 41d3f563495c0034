from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
    T5Config,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.batching import PADDED
from teacher_cache.stages.models.inference import class_logits
from teacher_cache.stages.models.pretrained import hash_weights, longest_sample, settle_pad_id
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import ClassificationTeacher, load_teacher


def load(folder: Path | str, **changes: Any) -> ClassificationTeacher:
    given = {"teacher": str(folder), "device": "cpu"} | changes
    return load_teacher(TeacherConfig.model_validate(given))


@pytest.fixture
def own(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy to change."""
    return lambda folder: shutil.copytree(folder, tmp_path / "teacher")


def test_what_is_known_of_a_teacher(tiny_bert: Path) -> None:
    teacher = load(tiny_bert)
    assert not teacher.model.training
    assert (teacher.device.type, teacher.dtype) == ("cpu", torch.float32)
    assert teacher.id2label == {0: "neg", 1: "pos"}
    assert teacher.pad_id == 0
    assert teacher.commit is None
    assert len(teacher.weights_sha256) == 64


def test_attention_runs_on_sdpa(tiny_bert: Path, tiny_gpt2: Path) -> None:
    for folder in (tiny_bert, tiny_gpt2):
        assert load(folder).model.config._attn_implementation == "sdpa"


def test_the_hash_is_of_the_values_whatever_their_format(
    tiny_bert: Path, tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = BertForSequenceClassification.from_pretrained(tiny_bert)
    model.half().save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "single")  # the same, rounded, values
    hashes = set()
    for name in ("half", "single"):
        bert_tokenizer.save_pretrained(tmp_path / name)
        stored = json.loads((tmp_path / name / "config.json").read_text())["dtype"]
        assert stored == {"half": "float16", "single": "float32"}[name]
        hashes.add(load(tmp_path / name).weights_sha256)
    assert len(hashes) == 1
    assert hashes != {load(tiny_bert).weights_sha256}  # rounding changed some


def test_the_hash_is_taken_before_the_teacher_is_rounded(tiny_bert: Path) -> None:
    rounded = load(tiny_bert, dtype="bfloat16")
    assert rounded.model.dtype == torch.bfloat16
    assert rounded.weights_sha256 == load(tiny_bert).weights_sha256


def test_the_hash_sees_every_value_name_and_shape() -> None:
    def hashed(**parts: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, values in parts.items():
            module.register_buffer(name, values)
        return hash_weights(module)

    values = torch.arange(6.0)
    assert hashed(a=values) == hashed(a=values.half())
    assert len({
        hashed(a=values),
        hashed(b=values),
        hashed(a=values.reshape(2, 3)),
        hashed(a=values.reshape(3, 2).T.contiguous().T),
        hashed(a=values + torch.tensor([0, 0, 0, 0, 0, 1e-6])),
        hashed(a=values[:3], b=values[3:]),
    }) == 6  # fmt: skip


def test_gpt2_without_a_padding_token(tiny_gpt2: Path) -> None:
    """Batched logits are those of one sample at a time: GPT-2 pools at the last real token."""
    teacher = load(tiny_gpt2)
    assert teacher.tokenizer.pad_token_id is None
    assert teacher.pad_id == teacher.tokenizer.eos_token_id == teacher.model.config.pad_token_id
    texts = ["a joy", "a dreadful film from its first scene to its last", "so so", "no"]
    ids = [np.array(teacher.tokenizer(text)["input_ids"], np.uint32) for text in texts]

    def run(max_tokens: int) -> np.ndarray:
        return class_logits(
            teacher.model,
            ids,
            num_classes=2,
            pad_id=teacher.pad_id,
            batching=PADDED,
            max_tokens=max_tokens,
        ).logits

    fresh: Any = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2).eval()
    with torch.no_grad():
        alone = [fresh(torch.from_numpy(one.astype(np.int64))[None]).logits[0] for one in ids]
    np.testing.assert_allclose(run(1000), torch.stack(alone).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(1000), run(1), rtol=0, atol=1e-5)


def test_a_model_without_a_trained_head_is_refused(minilm_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no trained weights for classifier\.bias.*finetune-tea"):
        load(minilm_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "--teacher ./no/such/folder is no folder"),
        ("/no/such/folder", "--teacher /no/such/folder is no folder"),
    ],
)
def test_a_folder_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(UserError, match=r"'somebody/teacher' could not be loaded") as refused:
        load("somebody/teacher")
    assert "--teacher DIR, or make the hub reachable" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_model(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    bert_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="could not be loaded"):
        load(tmp_path)


def test_a_truncated_weights_file(own: Callable[[Path], Path], tiny_bert: Path) -> None:
    folder = own(tiny_bert)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded"):
        load(folder)


def test_cuda_demanded_and_not_there(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda was demanded"):
        load(tiny_bert, device="cuda")


def test_float16_on_a_cpu(tiny_bert: Path) -> None:
    with pytest.raises(UserError, match="--dtype float16 was asked for on a CPU"):
        load(tiny_bert, dtype="float16")


@pytest.mark.parametrize(
    ("card", "warned"),
    [
        ("Trained with label smoothing 0.1.", True),
        ("| label_smoothing_factor | 0.05 |", True),
        ("`--label-smoothing=.2`", True),
        ("label_smoothing: 0.0", False),
        ("Labels are neg and pos.", False),
        (None, False),
    ],
)
def test_a_teacher_of_smoothed_labels(
    own: Callable[[Path], Path],
    tiny_bert: Path,
    caplog: pytest.LogCaptureFixture,
    card: str | None,
    warned: bool,
) -> None:
    folder = own(tiny_bert)
    if card is not None:
        (folder / "README.md").write_text(f"# A teacher\n\n{card}\n")
    load(folder)
    assert ("a temperature above 1 will not help" in caplog.text) == warned


def write_classifier(folder: Path, tokenizer: PreTrainedTokenizerBase, num_positions: int) -> Path:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=num_positions,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_longest_sample(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = load(write_classifier(tmp_path / "short", bert_tokenizer, 64))
    assert teacher.max_length(None) == 64
    assert teacher.max_length(16) == 16
    with pytest.raises(UserError, match=r"--max-length 65 is more than .*short reads \(64 tokens"):
        teacher.max_length(65)


@pytest.mark.parametrize(
    ("positions", "tokenizer_limit", "expected"),
    [(None, 10**30, 512), (4096, 10**30, 512), (None, 128, 128), (4096, 256, 256)],
)
def test_the_limit_is_the_models_or_its_tokenizers(
    tiny_bert: Path, positions: int | None, tokenizer_limit: int, expected: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_max_length = tokenizer_limit
    config = BertConfig(max_position_embeddings=positions) if positions else T5Config()
    model: Any = SimpleNamespace(config=config, base_model=None)
    assert longest_sample("it", model, tokenizer, None) == expected
    assert longest_sample("it", model, tokenizer, 100) == 100


@pytest.mark.parametrize(
    ("of_model", "pad_token", "eos_token", "expected"),
    [(7, "[PAD]", "[SEP]", 7), (None, "[PAD]", "[SEP]", 0), (None, None, "[SEP]", 102)],
)
def test_what_fills_batches(
    tiny_bert: Path,
    of_model: int | None,
    pad_token: str | None,
    eos_token: str | None,
    expected: int,
) -> None:
    """The model's own padding before the tokenizer's: by it a decoder finds the last token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token, tokenizer.eos_token = pad_token, eos_token
    config = BertConfig(pad_token_id=of_model)
    assert settle_pad_id("it", config, tokenizer) == expected
    assert config.pad_token_id == expected


def test_nothing_to_fill_batches_with(tiny_bert: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_bert)
    bare.pad_token = bare.eos_token = None
    config = BertConfig(pad_token_id=None)
    with pytest.raises(UserError, match=r"the tokenizer of it has neither.*set its pad_token"):
        settle_pad_id("it", config, bare)


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2"])
def test_the_head_is_never_rounded(name: str, request: pytest.FixtureRequest) -> None:
    teacher = load(request.getfixturevalue(name), dtype="bfloat16")
    head = [one for part, one in teacher.model.named_parameters() if part.startswith(("cl", "sc"))]
    assert {one.dtype for one in head} == {torch.float32}
    assert {one.dtype for one in teacher.model.base_model.parameters()} == {torch.bfloat16}
    ids = torch.arange(1000, 1010)[None]
    with torch.no_grad():
        logits = teacher.model(ids).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
