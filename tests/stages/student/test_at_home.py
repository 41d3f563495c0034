"""A student is a model of transformers, and its users put it into everything that takes one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import MambaStudentForCausalLM
from teacher_cache.stages.student.mixers import Layout
from tests.tiny_students import small_config, small_student

BOTH = pytest.mark.parametrize("arch", ["mamba", "mamba2"])
MAPS = [{"mode": "identity"}, {"mode": "move_first_to_last"}, {"mode": "append", "token_id": 3}]


def language_model(**changes: Any) -> Any:
    """One whose state remembers for long, so that reading twice or not at all shows."""
    torch.manual_seed(0)
    model = MambaStudentForCausalLM(small_config(chunk_size=4, **changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        if name.endswith("A_log"):
            parameter.data.fill_(-4.0)
    return model


def classifier(**changes: Any) -> Any:
    return small_student(chunk_size=4, **changes)


def ids_of(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_weights_that_are_not_in_memory_are_brought(arch, bidirectional, where, tmp_path) -> None:
    ids = ids_of()
    student = classifier(arch=arch, bidirectional=bidirectional)
    expected = student(ids).logits
    device, moved = torch.device("cpu"), copy.deepcopy(student)
    if where == "disk":
        accelerate.disk_offload(moved, str(tmp_path), device)
    else:
        accelerate.cpu_offload(moved, device)
    assert all(one.is_meta for one in moved.backbone.parameters())
    for _ in range(2):
        torch.testing.assert_close(moved(ids).logits, expected)


@BOTH
def test_an_offloaded_language_model_goes_on_from_its_state(arch, tmp_path) -> None:
    ids = ids_of()
    student = language_model(arch=arch)
    expected = student(ids, use_cache=False).logits
    moved = accelerate.disk_offload(student, str(tmp_path), torch.device("cpu"))
    first = moved(ids[:, :7], use_cache=True)
    second = moved(ids[:, 7:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)


def test_a_layers_layout_goes_where_accelerate_sends_its_arguments() -> None:
    layout = Layout(seq_idx=torch.zeros(1, 3, dtype=torch.long))
    moved = accelerate.utils.send_to_device((layout, None), "meta")
    assert moved[0].seq_idx.is_meta and moved[0].mask is None


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels", "loss"),
    [
        (
            "multi_label_classification",
            3,
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            F.binary_cross_entropy_with_logits,
        ),
        ("regression", 3, torch.tensor([[0.5, 2, -1], [0, 0.25, 3]]), F.mse_loss),
        (
            "regression",
            1,
            torch.tensor([0.5, 2.0]),
            lambda logits, labels: F.mse_loss(logits[:, 0], labels),
        ),
        ("single_label_classification", 3, torch.tensor([2, 0]), F.cross_entropy),
        (None, 3, torch.tensor([2, 0]), F.cross_entropy),
        (None, 3, torch.tensor([[1.0, 0, 1]] * 2), F.binary_cross_entropy_with_logits),
    ],
)
def test_a_classifiers_loss_is_that_of_its_problem_type(problem, num_labels, labels, loss) -> None:
    student = classifier(num_labels=num_labels, problem_type=problem)
    output = student(ids_of(), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


@BOTH
@pytest.mark.parametrize(
    "mask",
    [
        [[1] * 12, [1] * 7 + [0] * 5],  # on the right
        [[0] * 4 + [1] * 8, [1] * 12],  # on the left
        [[0, 0] + [1] * 7 + [0] * 3, [1, 0] * 6],  # on both sides, and between
        [[1] + [0] * 11, [0] * 11 + [1]],  # fewer than the convolution sees
    ],
)
def test_the_state_that_a_padded_row_leaves_is_that_of_its_text(arch, mask) -> None:
    """In the first call, in a second one behind a state, and in the steps that follow."""
    student = language_model(arch=arch).double()
    ids, more, mask = ids_of(), ids_of(seed=1), torch.tensor(mask)
    step = torch.tensor([[5], [6]])
    first = student(ids, attention_mask=mask, use_cache=True)
    second = student(more, attention_mask=mask, cache=copy.deepcopy(first.cache), use_cache=True)
    after_one = student(step, cache=first.cache).logits[:, 0]
    after_two = student(step, cache=second.cache).logits[:, 0]
    for row, real in enumerate(mask.bool()):
        text, next_text = ids[row, real], more[row, real]
        for found, read in (
            (first.logits[row, real], text),
            (after_one[row : row + 1], torch.cat([text, step[row]])),
            (second.logits[row, real], torch.cat([text, next_text])),
            (after_two[row : row + 1], torch.cat([text, next_text, step[row]])),
        ):
            alone = student(read[None], use_cache=False).logits[0, -len(found) :]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)


@BOTH
def test_hidden_states_of_padded_rows_stand_where_their_tokens_do(arch) -> None:
    student = language_model(arch=arch)
    ids, mask = ids_of(), torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    kwargs = {"attention_mask": mask, "output_hidden_states": True}
    with_state = student(ids, use_cache=True, **kwargs).hidden_states
    without = student(ids, use_cache=False, **kwargs).hidden_states
    for one, other in zip(with_state, without, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()])


def test_packed_documents_behind_a_state_leave_the_last_ones(arch="mamba2") -> None:
    student = language_model(arch=arch).double()
    ids = ids_of(1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])  # what stands at padding says nothing
    mask = torch.tensor([[1] * 9 + [0] * 3])
    cache = student(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=True).cache
    step = torch.tensor([[7]])
    alone = torch.cat([ids[:, 5:9], step], 1)
    expected = student(alone, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(student(step, cache=cache).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [language_model, classifier])
def test_the_configuration_asks_for_what_a_call_does_not_mention(make) -> None:
    student, ids = make(), ids_of()
    student.config.output_hidden_states = True
    assert len(student(ids).hidden_states) == 3
    assert student(ids, output_hidden_states=False).hidden_states is None
    student.config.output_hidden_states = False
    student.config.return_dict = False
    assert torch.equal(student(ids)[0], student(ids, return_dict=True).logits)


@pytest.mark.parametrize("make", [language_model, classifier])
def test_a_keyword_that_means_nothing_is_refused_and_what_every_model_gets_is_not(make) -> None:
    student, ids = make(), ids_of()
    with pytest.raises(TypeError, match="'attention_maks'"):
        student(ids, attention_maks=torch.ones_like(ids))
    with pytest.raises(ValueError, match="bidirectional"):
        student(ids, is_causal=False)
    with pytest.raises(ValueError, match=r"seq_idx or position_ids|one sample a row"):
        student(ids, cu_seq_lens_q=torch.tensor([0, 4, 12]))
    asked = student(ids, output_attentions=True, output_router_logits=None, inputs_embeds=None)
    assert torch.equal(asked.logits, student(ids).logits)


@BOTH
def test_position_ids_that_begin_anew_part_documents(arch) -> None:
    student = language_model(arch=arch)
    ids = ids_of(1)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = student(ids, position_ids=positions, labels=ids, use_cache=False)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    same = student(ids, seq_idx=seq_idx, labels=ids, use_cache=False)
    torch.testing.assert_close(packed.logits, same.logits)
    torch.testing.assert_close(packed.loss, same.loss)
    borders = {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "max_length_q": 7}
    flat = student(ids, position_ids=positions, use_cache=False, **borders)  # as TRL packs them
    assert torch.equal(flat.logits, packed.logits)
    plain = student(ids, position_ids=torch.arange(12)[None], use_cache=False, **borders)
    assert torch.equal(plain.logits, student(ids, use_cache=False).logits)
    state = student(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="behind a state"):
        student(ids, position_ids=positions, cache=state)


@pytest.mark.parametrize("position_map", MAPS)
def test_a_classifiers_row_is_one_sample_whatever_positions_say(position_map) -> None:
    student, ids = classifier(position_map=position_map), ids_of()
    mask = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0 at padding, too
    found = student(ids, mask, position_ids=positions, use_cache=True)
    assert torch.equal(found.logits, student(ids, mask).logits)
    with pytest.raises(ValueError, match="one sample a row"):
        student(ids, mask, seq_idx=torch.zeros_like(ids))
    with pytest.raises(TypeError, match="past_key_values"):
        student(ids, mask, past_key_values=transformers.DynamicCache())


def test_labels_that_are_shifted_already_give_the_same_loss() -> None:
    student, ids = language_model(), ids_of()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = student(ids, labels=ids).loss
    torch.testing.assert_close(student(ids, labels=ids, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(student(ids, shift_labels=shifted).loss, expected)


def trained_once(student: Any, rows: list[dict[str, Any]], folder: Any, **settings: Any) -> Any:
    """The student after one update of SGD by transformers' own Trainer."""
    arguments: Any = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trained = copy.deepcopy(student)
    transformers.Trainer(model=trained, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    return trained


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_users_own_trainer_learns_each_token_with_one_weight(smoothing, tmp_path) -> None:
    """Rows of 10 and 1 targets in two steps of one update; smoothed labels are shifted, too."""
    student = language_model().train()
    ids = ids_of()
    labels = ids.clone()
    labels[1, :11] = -100
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    trained = trained_once(
        student,
        rows,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        label_smoothing_factor=smoothing,
    )
    log_probs = student(ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    counted = targets != -100
    chosen = log_probs[counted].gather(1, targets[counted, None])[:, 0]
    loss = -(1 - smoothing) * chosen.mean() - smoothing * log_probs[counted].mean()
    loss.backward()
    for name, parameter in student.named_parameters():
        found = trained.get_parameter(name)
        torch.testing.assert_close(found, parameter - parameter.grad, rtol=1e-5, atol=1e-6)


@BOTH
def test_a_whole_text_behind_the_state_of_its_beginning_is_refused(arch) -> None:
    student, ids = language_model(arch=arch), ids_of()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    whole = student.generate(ids, **settings)
    state = student(ids[:, :8], use_cache=True).cache
    with pytest.raises(ValueError, match="the 8 tokens that the state has read already"):
        student.generate(ids, cache_params=copy.deepcopy(state), **settings)
    rest = student.generate(ids[:, 8:], cache_params=state, **settings)
    assert torch.equal(rest, whole[:, 8:])
    state.reset()  # has read nothing, so nothing is read twice
    assert torch.equal(student.generate(ids, cache_params=state, **settings), whole)


@BOTH
def test_a_generation_stops_at_a_string(arch) -> None:
    words = {chr(64 + id_): id_ for id_ in range(50)}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    letters.decoder = tokenizers.decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    student, ids = language_model(arch=arch), ids_of(1)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = student.generate(ids, **settings)[0, 12:].tolist()
    stop = chr(64 + whole[2])
    stopped = student.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **settings)[0, 12:]
    assert stopped.tolist() == whole[: 1 + whole.index(whole[2])]


@BOTH
def test_guidance_gives_one_text_with_and_without_a_state(arch) -> None:
    student, ids = language_model(arch=arch), ids_of()
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    plain = student.generate(ids, **settings)
    guided = student.generate(ids, guidance_scale=3.0, **settings)
    assert not torch.equal(plain, guided)
    assert torch.equal(
        guided, student.generate(ids, guidance_scale=3.0, use_cache=False, **settings)
    )


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_embeddings_and_segments_generate_as_tokens_do(arch, beams) -> None:
    student, ids = language_model(arch=arch), ids_of()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings["num_beams"] = beams
    expected = student.generate(ids, **settings)
    embeds = student.get_input_embeddings()(ids)
    assert torch.equal(student.generate(inputs_embeds=embeds, **settings), expected[:, 12:])
    segments = torch.zeros_like(ids)
    assert torch.equal(student.generate(ids, token_type_ids=segments, **settings), expected)


def test_a_subclass_of_any_name_generates() -> None:
    class Walter(MambaStudentForCausalLM):
        pass

    student, ids = language_model(), ids_of()
    walter: Any = Walter(student.config).eval()
    walter.load_state_dict(student.state_dict())
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(ids, **settings)
    assert torch.equal(walter.generate(ids, **settings), expected)
    assert torch.equal(walter.generate(ids, num_beams=1, use_cache=False, **settings), expected)


@pytest.mark.parametrize("position_map", MAPS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_classifier_reads_embeddings_as_tokens(position_map, bidirectional) -> None:
    student = classifier(position_map=position_map, bidirectional=bidirectional)
    ids, mask = ids_of(), torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
    embeds = student.get_input_embeddings()(ids)
    found = student(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(found, student(ids, mask).logits)
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="one of the two"):
            student(**given)
    with pytest.raises(ValueError, match="next"):
        student(inputs_embeds=embeds, next_token_loss=True)
    with pytest.raises(UserError, match="Sample 0"):
        student(inputs_embeds=embeds, attention_mask=torch.zeros_like(mask))


@BOTH
@pytest.mark.parametrize("make", [language_model, classifier])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_less_and_changes_no_gradient(make, arch, reentrant) -> None:
    ids = ids_of(2, 40)
    labels = ids if make is language_model else torch.tensor([1, 0])
    found = []
    for checkpointed in (False, True):
        student = make(arch=arch, dropout=0.0).train()
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.enable_input_require_grads()
        kept = SimpleNamespace(bytes=0)

        def pack(tensor: Tensor, kept: SimpleNamespace = kept) -> Tensor:
            kept.bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = student(ids, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), [one.grad for one in student.parameters()], kept.bytes))
    (loss, grads, all_bytes), (again, grads_again, few_bytes) = found
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(grads_again, grads)
    assert few_bytes < all_bytes / 2


def test_checkpointing_and_a_state_exclude_each_other() -> None:
    student = language_model().train()
    student.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        student(ids_of(), use_cache=True)


@BOTH
@pytest.mark.parametrize("make", [language_model, classifier])
@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", "out_proj"]])
def test_adapters_learn_and_merge(make, arch, targets) -> None:
    """PEFT's LoRA: every adapter gets a gradient, and merging it changes no logit."""
    task, head = ("CAUSAL_LM", None) if make is language_model else ("SEQ_CLS", ["head"])
    settings = peft.LoraConfig(
        task_type=task, target_modules=targets, modules_to_save=head, init_lora_weights=False
    )
    adapted: Any = peft.get_peft_model(make(arch=arch), settings)
    ids = ids_of()
    labels = ids if make is language_model else torch.tensor([1, 0])
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    learning = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    assert all(one.grad is not None and one.grad.any() for one in learning.values())
    assert any("head" in name for name in learning) == (make is classifier)
    expected = adapted.eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected)


@BOTH
def test_an_adapter_of_what_is_no_linear_map_is_refused(arch) -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["conv1d"])
    with pytest.raises(ValueError, match=r"CausalConvolution.* is not supported"):
        peft.get_peft_model(language_model(arch=arch), settings)


@BOTH
@pytest.mark.parametrize("make", [language_model, classifier])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_linear_maps_in_eight_bits_stay_near(make, arch) -> None:
    student, ids = make(arch=arch), ids_of()
    expected = student(ids).logits
    in_bits = torch.ao.quantization.quantize_dynamic(student, {torch.nn.Linear})
    assert not isinstance(in_bits.backbone.layers[0].mixer.in_proj, torch.nn.Linear)
    found = in_bits(ids).logits
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


LOAD = """
import sys
from transformers import {auto} as Auto
if {hidden}: sys.modules["teacher_cache.stages.student"] = None
student = Auto.from_pretrained(sys.argv[1], trust_remote_code={trusted})
student.save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (language_model, "AutoModelForCausalLM"),
        (classifier, "AutoModelForSequenceClassification"),
    ],
)
def test_a_folder_loads_where_nothing_was_imported(make, auto, tmp_path) -> None:
    student, ids = make(), ids_of()
    folder, again = tmp_path / "walter", tmp_path / "again"
    student.save_pretrained(folder)

    def load(*, trusted: bool, hidden: bool = False) -> subprocess.CompletedProcess[str]:
        code = LOAD.format(auto=auto, trusted=trusted, hidden=hidden)
        env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-c", code, str(folder), str(again)]
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, check=False
        )

    assert "trust_remote_code=True" in load(trusted=False).stderr
    assert "teacher_cache" in load(trusted=True, hidden=True).stderr
    assert load(trusted=True).returncode == 0
    loaded: Any = type(student).from_pretrained(again)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    card = (folder / "README.md").read_text()
    assert f'model = {auto}.from_pretrained("THIS_FOLDER")' in card
    (folder / "README.md").write_text("mine")
    student.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
