"""Students whose layers begin as their teacher's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.pretrained import hash_weights
from teacher_cache.stages.student import MambaStudentConfig, build_language_model
from teacher_cache.stages.student.from_teacher import copy_teacher, shape_of
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.mixers import Layout, Mamba2
from teacher_cache.stages.student.pretrained import read_config
from teacher_cache.stages.student.teacher_weights import TeacherWeights
from tests.teachers_to_copy import FAMILIES, NUM_IDS, NUM_LAYERS, saved_teacher

LENGTH = 24
IDS = torch.randint(NUM_IDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def copied(folder: Path, attention: list[int]) -> MambaStudentForCausalLM:
    """The student of a teacher's folder that keeps some layers' attention."""
    teacher = TeacherWeights(folder, read_config(str(folder)))
    config = MambaStudentConfig(vocab_size=NUM_IDS, **shape_of(teacher), attn_layer_idx=attention)
    student = build_language_model(config, seed=0).eval()
    copy_teacher(student, teacher)
    return student


def logits_of(model: torch.nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_are_the_teacher(family: str, tmp_path: Path) -> None:
    teacher = saved_teacher(FAMILIES[family], tmp_path)
    student = copied(tmp_path, list(range(NUM_LAYERS)))
    wanted, found = logits_of(teacher, IDS), logits_of(student, IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    read = TeacherWeights(tmp_path, read_config(str(tmp_path)))
    assert read.sha256 == hash_weights(teacher)


@pytest.mark.parametrize("kept", ([0, 1, 2], [1], [0], []), ids=str)
@pytest.mark.parametrize("family", ("mistral with a window", "qwen3", "gpt2"))
def test_documents_of_a_row_padding_and_steps_change_nothing(
    family: str, kept: list[int], tmp_path: Path
) -> None:
    saved_teacher(FAMILIES[family], tmp_path)
    student = copied(tmp_path, kept)
    first, second = logits_of(student, IDS[:, :10]), logits_of(student, IDS[:, 10:])
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None].expand(2, -1)
    packed = logits_of(student, IDS, position_ids=positions)
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=0, atol=1e-5)

    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    alone = logits_of(student, IDS[:1, 5:])
    padded = logits_of(student, IDS, attention_mask=mask)
    torch.testing.assert_close(padded[:1, 5:], alone, rtol=0, atol=1e-5)

    with torch.inference_mode():  # 12 at once, 5 more at once, then one by one
        output = student(IDS[:, :12], attention_mask=mask[:, :12], use_cache=True)
        steps = [output.logits]
        for start, stop in [(12, 17), *((one, one + 1) for one in range(17, LENGTH))]:
            output = student(IDS[:, start:stop], cache=output.cache, use_cache=True)
            steps.append(output.logits)
    stepped = torch.cat(steps, 1)
    torch.testing.assert_close(stepped[:1, 5:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped[1], padded[1], rtol=0, atol=1e-5)


def test_generation_with_keys_and_states_is_that_without(tmp_path: Path) -> None:
    saved_teacher(FAMILIES["llama"], tmp_path)
    student: Any = copied(tmp_path, [1])
    asked: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones(2, 5).long(),
    }
    asked["attention_mask"][0, :2] = 0
    with_cache, without = (
        student.generate(IDS[:, :5], use_cache=uses, **asked) for uses in (True, False)
    )
    assert torch.equal(with_cache, without)
    beams = [
        student.generate(IDS[:, :5], use_cache=uses, num_beams=3, **asked) for uses in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_mixer_without_decay_is_linear_attention(tmp_path: Path) -> None:
    config: LlamaConfig = FAMILIES["llama 3 with biases"]  # pyright: ignore[reportAssignmentType]
    teacher = saved_teacher(config, tmp_path).double()
    student = copied(tmp_path, []).double()
    mixer, attention = student.backbone.layers[1].mixer, teacher.model.layers[1].self_attn
    assert isinstance(mixer, Mamba2)
    with torch.no_grad():
        mixer.A_log.fill_(-torch.inf)
        mixer.dt_bias.fill_(torch.tensor(1.0, dtype=torch.float64).expm1().log())
        num_heads = len(mixer.dt_bias)
        mixer.in_proj.weight[-num_heads:] = 0
        hidden = torch.randn(
            2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        found = mixer(hidden, Layout())

        def heads(projection: torch.nn.Linear) -> Tensor:  # [B, H, S, P]
            rows = projection(hidden).unflatten(-1, (-1, 8)).transpose(1, 2)
            return rows.repeat_interleave(4 // rows.shape[1], dim=1)

        queries, keys, values = (
            heads(one) for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = (queries @ keys.mT * 8**-0.5).tril()
        wanted = attention.o_proj((scores @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_saved_hybrid_is_loaded_as_it_was(tmp_path: Path) -> None:
    saved_teacher(FAMILIES["phi"], tmp_path / "teacher")
    student = copied(tmp_path / "teacher", [1])
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(logits_of(again, IDS), logits_of(student, IDS))


def test_one_layer_at_a_time_is_read_from_several_files(tmp_path: Path) -> None:
    teacher = saved_teacher(FAMILIES["llama"], tmp_path)
    teacher.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    student = copied(tmp_path / "parts", [0, 1, 2])
    torch.testing.assert_close(logits_of(student, IDS), logits_of(teacher, IDS), rtol=0, atol=1e-5)


GEMMA2 = Gemma2Config(
    vocab_size=NUM_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "saying"),
    (
        (GEMMA2, r"is a gemma2, and --init teacher copies gemma, gpt2, .*: leave the option out"),
        (
            LlamaConfig(
                vocab_size=NUM_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, rope_parameters=DYNAMIC,
            ),
            "has positions whose turns depend on the length, which no layer of a student has",
        ),
    ),
    ids=("gemma2", "dynamic"),
)  # fmt: skip
def test_what_has_no_place_is_refused(
    config: PreTrainedConfig, saying: str, tmp_path: Path
) -> None:
    saved_teacher(config, tmp_path)
    with pytest.raises(UserError, match=saying):
        copied(tmp_path, [])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    saved_teacher(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors that can be read"):
        copied(tmp_path, [])


def test_exports_name_what_they_have_no_place_for(tmp_path: Path) -> None:
    from teacher_cache.stages.student.interchange.weights import refuse_students

    saved_teacher(FAMILIES["llama"], tmp_path)
    config: Any = copied(tmp_path, [1]).config
    assert json.loads(config.to_json_string())["attn_layer_idx"] == [1]
    saying = re.escape("llama.cpp has no place for what this student has beyond Mamba's own layers")
    with pytest.raises(UserError, match=saying):
        refuse_students(config, target="llama.cpp")
