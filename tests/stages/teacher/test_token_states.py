"""The teacher's state of each token by itself: what is stored, when it is made, what needs it."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
)

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.teacher import classification
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import load_teacher
from teacher_cache.stages.teacher.tables import (
    STATES_FILE,
    read_token_states,
    token_states,
)
from tests.small_caches import read_unchecked
from tests.tiny_runs import cache_reviews, reviews_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("token-states") / "cache"
    return cache_reviews(folder, tiny_bert, acl_imdb, hidden="pooled")


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    assert tokenizer.unk_token_id not in ids or tokenizer.unk_token in tokens
    return ids


def test_a_token_is_read_between_the_special_tokens_of_any_text(
    cache: Path, tiny_bert: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    table = read_token_states(cache, read_manifest(cache))
    assert table.shape == (30_522, 32) and table.dtype == torch.float16
    model = BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    cls, sep = bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id
    for token_id in ids_of(bert_tokenizer, ["good", "##ing", "[unused7]", "!"]):
        with torch.no_grad():
            ids = torch.tensor([[cls, token_id, sep]])
            expected = model.bert(input_ids=ids).pooler_output[0]
        torch.testing.assert_close(table[token_id].float(), expected, rtol=1e-3, atol=1e-4)
    assert not table[bert_tokenizer.all_special_ids].any()
    known = torch.ones(len(table), dtype=torch.bool)
    known[bert_tokenizer.all_special_ids] = False
    assert table[known].any(dim=1).all()
    assert read_manifest(cache).about["token_states"] == {"num_rows": 30_522, "width": 32}


def test_a_tokenizer_without_special_tokens_leaves_the_token_alone(
    tiny_gpt2: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = load_teacher(TeacherConfig(teacher=str(tiny_gpt2), device="cpu"))
    table = token_states(teacher, num_ids=50_257, pooled_width=32, batch_tokens=4096).rows
    model = GPT2ForSequenceClassification.from_pretrained(tiny_gpt2).eval()
    for token_id in ids_of(gpt2_tokenizer, ["Ġgood", "!"]):
        with torch.no_grad():
            expected = model.transformer(input_ids=torch.tensor([[token_id]])).last_hidden_state
        torch.testing.assert_close(table[token_id].float(), expected[0, 0], rtol=1e-3, atol=2e-3)
    assert not table[gpt2_tokenizer.all_special_ids].any()


def test_reserved_tokens_and_states_that_overflow_are_left_out(
    tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load_teacher(TeacherConfig(teacher=str(tiny_bert), device="cpu"))
    reserved, overflowing = ids_of(teacher.tokenizer, ["[unused1]", "[unused2]"])
    reserved_token: Any = AddedToken("[unused1]", special=True)  # what transformers takes too
    teacher.tokenizer.add_tokens([reserved_token])
    embedding: Any = teacher.model.get_input_embeddings()
    embedding.weight.data[overflowing] = torch.inf
    table = token_states(teacher, num_ids=30_522, pooled_width=32, batch_tokens=4096)
    assert "states of 1 tokens are not finite" in caplog.text
    assert table.rows.isfinite().all() and table.relative_error < 1e-3
    without = {*teacher.tokenizer.all_special_ids, reserved, overflowing}
    assert set(torch.nonzero(~table.rows.any(dim=1)).flatten().tolist()) == without


def test_tokens_beyond_the_teachers_table_are_left_out(
    tmp_path: Path,
    tiny_bert: Path,
    acl_imdb: Path,
) -> None:
    own = copytree(tiny_bert, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(own)
    assert tokenizer.add_tokens(["qwertyuiop"]) == 1
    tokenizer.save_pretrained(own)
    manifest = read_manifest(cache_reviews(tmp_path / "cache", own, acl_imdb, hidden="pooled"))
    assert read_token_states(tmp_path / "cache", manifest).shape == (30_522, 32)
    assert manifest.about["token_states"]["num_rows"] == 30_522


def forget_states(cache: Path) -> None:
    """Make it a cache of a release that did not keep them."""
    (cache / "teacher" / STATES_FILE).unlink()
    manifest = read_unchecked(cache)
    del manifest["teacher_files"][STATES_FILE], manifest["about"]["token_states"]
    (cache / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_an_older_cache_gets_them_and_keeps_its_shards(
    cache: Path, tmp_path: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    own = copytree(cache, tmp_path / "cache")
    forget_states(own)
    assert verify(own).problems == ()
    with pytest.raises(UserError, match=r"teacher-states needs .* same `pipe cache-teacher` again"):
        read_token_states(own, read_manifest(own))
    result = cache_teacher.run(reviews_config(own, tiny_bert, acl_imdb, hidden="pooled"))
    assert result.num_shards_run == 0
    assert read_manifest(own).teacher_files == read_manifest(cache).teacher_files
    assert verify(own).problems == ()


def test_a_cache_without_pooled_states_says_how_to_get_them(tiny_cache: Path) -> None:
    with pytest.raises(UserError, match=r"teacher-states needs .* --hidden pooled"):
        read_token_states(tiny_cache, read_manifest(tiny_cache))


def test_a_run_that_goes_on_reads_the_tokens_again_only_where_the_file_is_bad(
    cache: Path,
    tmp_path: Path,
    tiny_bert: Path,
    acl_imdb: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = copytree(cache, tmp_path / "cache")
    config = reviews_config(own, tiny_bert, acl_imdb, hidden="pooled")
    calls: list[int] = []
    original = classification.token_states

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(classification, "token_states", counted)
    next(own.glob("labeled/*/*.arrow")).unlink()
    assert cache_teacher.run(config).num_shards_run == 1
    assert not calls
    path = own / "teacher" / STATES_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckFailed, match=rf"{STATES_FILE} .* differs from its SHA-256"):
        read_token_states(own, read_manifest(own))
    cache_teacher.run(config)
    assert len(calls) == 1
    assert path.read_bytes() == whole
