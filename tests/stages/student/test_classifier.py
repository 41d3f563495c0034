"""The whole student: padding, pooling, start values, precision, files, pipelines, devices."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import (
    MambaStudentConfig,
    MambaStudentForCausalLM,
    MambaStudentForSequenceClassification,
    build_student,
    choose,
)
from tests.tiny_students import SMALL, small_config, small_student

POOLINGS = ("cls", "last", "mean")
MAPS = ({"mode": "identity"}, {"mode": "move_first_to_last"}, {"mode": "append", "token_id": 3})


def batch(lengths: list[int], width: int, *, left: bool = False, seed: int = 0):
    """Ids and mask of samples that begin with the same tokens whatever the width."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        sample = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(row))
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = sample, 1
    return ids, mask


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
@pytest.mark.parametrize("position_map", MAPS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_do_not_depend_on_padding(pooling, position_map, arch, bidirectional) -> None:
    student = small_student(
        pooling=pooling, position_map=position_map, arch=arch, bidirectional=bidirectional
    )
    lengths = [1, 2, 17, 40]
    expected = student(*batch(lengths, 40)).logits
    for width, left in ((41, False), (200, False), (40, True), (90, True)):
        ids, mask = batch(lengths, width, left=left, seed=width)
        torch.testing.assert_close(student(ids, mask).logits, expected, rtol=0, atol=1e-6)
    for row, length in enumerate(lengths):
        alone = student(batch(lengths, 40)[0][row : row + 1, :length]).logits  # no mask: all real
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=0, atol=1e-6)


def test_cls_pooling_reads_a_position_that_has_seen_every_token() -> None:
    student = small_student(position_map={"mode": "move_first_to_last"}).double()
    ids = torch.arange(10)[None]
    hidden = student.backbone.embedding(ids).detach().requires_grad_()
    student.backbone.embedding.register_forward_hook(lambda _, moved, __: hidden[:, moved[0][0]])
    student(ids).logits[0, 0].backward()
    assert hidden.grad is not None and (hidden.grad.abs().sum(-1) > 0).all()


def test_padding_gets_no_gradient() -> None:
    student = small_student(pooling="mean")
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    student(ids, torch.tensor([[1, 1, 1, 0, 0]])).logits.sum().backward()
    gradient = student.backbone.embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("width", [0, 4])
def test_refuses_a_sample_without_tokens(width) -> None:
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    mask[:1] = 1
    with pytest.raises(UserError, match=f"Sample {1 if width else 0} of the batch has no tokens"):
        small_student()(ids, mask)


def test_loss_is_the_mean_cross_entropy_and_token_types_are_ignored() -> None:
    student = small_student(num_labels=3)
    ids, mask = batch([4, 9], 9)
    labels = torch.tensor([2, 0])
    plain = student(ids, mask)
    output = student(ids, mask, labels=labels, token_type_ids=torch.ones_like(ids))
    assert plain.loss is None
    assert torch.equal(plain.logits, output.logits)
    log_probs = plain.logits.log_softmax(-1)
    torch.testing.assert_close(output.loss, -(log_probs[0, 2] + log_probs[1, 0]) / 2)


@pytest.mark.parametrize("position_map", MAPS)
@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
def test_next_tokens_are_predicted_in_the_students_order(position_map, arch) -> None:
    """Against the language model of the same weights, one sample at a time, without padding."""
    config = small_config(position_map=position_map, arch=arch)
    student = build_student(config, seed=0).eval().double()
    reader = MambaStudentForCausalLM(config).double()
    reader.backbone.load_state_dict(student.backbone.state_dict())
    reader.tie_weights()
    lengths = [1, 2, 17, 40]
    expected, num_expected = torch.zeros((), dtype=torch.float64), 0
    for row, length in enumerate(lengths):
        source = student.position_map.source_positions(length)
        ids = batch(lengths, 40)[0][row]
        ids = torch.tensor([3 if one < 0 else int(ids[one]) for one in source])
        if len(ids) > 1:
            log_probs = reader(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = expected - log_probs.gather(1, ids[1:, None]).sum()
            num_expected += len(ids) - 1
    expected.backward()
    for width, left in ((40, False), (57, False), (57, True)):
        ids, mask = batch(lengths, width, left=left, seed=width)
        assert student.num_next_tokens(mask) == num_expected
        output = student(ids, mask, next_token_loss=True)
        assert torch.equal(output.logits, student(ids, mask).logits)
        student.zero_grad()
        output.next_token_loss_sum.backward()
        torch.testing.assert_close(output.next_token_loss_sum, expected, rtol=1e-9, atol=0)
        for name, parameter in reader.backbone.named_parameters():
            found = student.backbone.get_parameter(name).grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-9)


def test_next_tokens_only_when_asked_for_and_only_of_a_causal_student() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert small_student()(ids).next_token_loss_sum is None
    assert small_student()(ids[:, :1], next_token_loss=True).next_token_loss_sum == 0
    with pytest.raises(ValueError, match="bidirectional"):
        small_student(bidirectional=True)(ids, next_token_loss=True)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = small_student()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = small_student(), build_student(MambaStudentConfig(**SMALL), seed=1)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.backbone.embedding.weight, other.backbone.embedding.weight)
    assert abs(first.backbone.embedding.weight.std() - 0.02) < 0.002


def test_default_parameters_have_mamba_ssms_names() -> None:
    with torch.device("meta"):
        names = {
            n
            for n, _ in MambaStudentForSequenceClassification(
                MambaStudentConfig()
            ).named_parameters()
        }
    mixer = "dt_bias A_log D in_proj.weight conv1d.weight conv1d.bias norm.weight out_proj.weight"
    expected = {"embedding.weight", "norm_f.weight"}
    for layer in range(4):
        expected |= {f"layers.{layer}.mixer.{name}" for name in mixer.split()}
        expected.add(f"layers.{layer}.norm.weight")
    assert {n.removeprefix("backbone.") for n in names if n.startswith("backbone.")} == expected


def test_bf16_autocast_and_half_weights_stay_close() -> None:
    student = small_student(position_map={"mode": "move_first_to_last"})
    ids, mask = batch([5, 70], 70)
    labels = torch.tensor([0, 1])
    expected = student(ids, mask).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(ids, mask, labels=labels)
    output.loss.backward()
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=0.02)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    half = student.bfloat16()(ids, mask).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "changes",
    [{"head": "mlp"}, {"head": "linear"}, {"arch": "mamba"}, {"bidirectional": True}],
)
def test_overfits_two_samples(changes) -> None:
    student = small_student(dropout=0.0, **changes).train()
    ids, mask = batch([6, 11], 11)
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    for _ in range(30):
        loss = student(ids, mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("name", ["bert_tokenizer", "gpt2_tokenizer"])
def test_a_saved_folder_works_in_a_pipeline(name, request, tmp_path, caplog) -> None:
    tokenizer = request.getfixturevalue(name)
    student = small_student(
        vocab_size=len(tokenizer),
        position_map=choose(tokenizer, "cls").to_dict(),
        id2label={0: "rotten", 1: "fresh"},
        label2id={"rotten": 0, "fresh": 1},
    )
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for key, weight in student.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[key]), key

    with caplog.at_level(logging.ERROR):
        pipe: Any = transformers.pipeline("text-classification", model=str(tmp_path))
    assert "not supported" not in caplog.text
    if pipe.tokenizer.pad_token is None:
        pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
    texts = ["A good film.", "Dull, long and then, somehow, longer."]
    logits = [student(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    for side in ("right", "left"):
        pipe.tokenizer.padding_side = side
        for answer, expected in zip(pipe(texts, batch_size=2, top_k=None), logits, strict=True):
            scores = {entry["label"]: entry["score"] for entry in answer}
            torch.testing.assert_close(
                torch.tensor([scores["rotten"], scores["fresh"]]),
                expected.softmax(-1),
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.gpu
def test_cuda_equals_cpu_in_logits_and_gradients() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    config = MambaStudentConfig(vocab_size=100, dropout=0.0, position_map=MAPS[1])
    ids, mask = batch([1, 30, 64, 150], 150)
    labels = torch.tensor([0, 1, 1, 0])
    results = {}
    for device in ("cpu", "cuda"):
        student: Any = build_student(config, seed=0)
        student.to(device)
        output = student(ids.to(device), mask.to(device), labels=labels.to(device))
        output.loss.backward()
        gradients = {name: p.grad.cpu() for name, p in student.named_parameters()}
        results[device] = {"logits": output.logits.detach().cpu()} | gradients
    for name, expected in results["cpu"].items():
        difference = (results["cuda"][name] - expected).norm()
        assert difference <= 1e-4 * expected.norm(), name
