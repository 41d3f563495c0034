"""A GGUF file says what the student is, and llama.cpp makes of it what the student makes."""

from __future__ import annotations

import gc
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.interchange import llama_cpp
from teacher_cache.stages.student.interchange.llama_cpp import SPLITS, vocabulary_of, write_gguf
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from tests.tiny_students import small_config, small_student
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace, tiny_sentencepiece

STUDENTS: dict[str, dict[str, Any]] = {
    "the defaults": {"d_model": 64, "num_layers": 2},
    "groups": {
        "d_model": 24, "expand": 3, "head_dim": 6, "d_state": 10, "ngroups": 4, "d_conv": 3,
        "num_layers": 3, "tie_word_embeddings": False, "norm_epsilon": 1e-3,
    },
    "Mamba-1": {"arch": "mamba", "expand": 2, "d_model": 24, "d_state": 5, "num_layers": 2},
    "Mamba-1 of one state": {
        "arch": "mamba", "expand": 2, "d_model": 40, "d_state": 1, "dt_rank": 7, "num_layers": 1,
    },
}  # fmt: skip
TEXTS = (
    "The film was good, I'd say it's 12345 times the best.",
    "  two  spaces\n\n\n and\tlines \r\n end  ",
    "Crème brûlée, naïve: Ærøskøbing, ÉCOLE, façade",
    "Привет, мир! 你好、世界。 こんにちは 안녕하세요 नमस्ते",
    "🙂🙃 a👍🏽b ½ Ⅷ ²³ x_1=camelCase'S WE'RE (foo)[bar]{baz} <tag/> https://a.b/c?d=e",
    "a",
    " b",
)


def student(num_rows: int, seed: int = 0, **changes: Any) -> MambaStudentForCausalLM:
    """A language model whose constants are drawn, too."""
    model = build_language_model(MambaStudentConfig(vocab_size=num_rows, **changes), seed=seed)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def over_bytes(patterns: tuple[str, ...], *, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """A BPE over bytes that cuts by these patterns, learned from what it will read."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in patterns]
    over = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, over])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [" ".join(TEXTS)] * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|end|>", "<|begin|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tag/>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|begin|>"
    )


def sentencepiece(*, adds_space: bool) -> PreTrainedTokenizerFast:
    """A BPE over text as Llama 2's, whose merges are all there are of its tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    learned = ["▁t", "he", "▁the", "▁w", "as", "▁was", "oo", "▁▁", "▁▁▁▁", "goo", "good", "▁b"]
    pieces += sorted({letter for text in TEXTS[:3] for letter in text if letter.isalpha()})
    ids = {piece: idx for idx, piece in enumerate([*pieces, *learned])}
    merges = [
        (token[:cut], token[cut:])
        for token in learned
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend("▁")] if adds_space else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "over bytes": lambda: over_bytes(next(iter(SPLITS))[0], ignore_merges=False),
    "SentencePiece": lambda: sentencepiece(adds_space=True),
}


def read(file: Path) -> Any:
    """The file as the `gguf` package reads it."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    return gguf.GGUFReader(file)


def value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("shape", STUDENTS)
def test_the_file_holds_the_students_own_sizes_and_weights(tmp_path: Path, shape: str) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    model = student(340, **STUDENTS[shape])
    write_gguf(model, TOKENIZERS["SentencePiece"](), tmp_path / "s.gguf", source="It")
    reader, config = read(tmp_path / "s.gguf"), model.config
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]
    arch = value(reader, "general.architecture")
    assert arch == config.arch
    found = {
        name: value(reader, f"{arch}.ssm.{name}")
        for name in ("inner_size", "state_size", "conv_kernel", "time_step_rank")
    }
    heads = config.d_inner // config.head_dim
    assert found == {
        "inner_size": config.expand * config.d_model,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "time_step_rank": config.resolved_dt_rank if arch == "mamba" else heads,
    }
    assert value(reader, f"{arch}.attention.layer_norm_rms_epsilon") == pytest.approx(
        config.norm_epsilon
    )
    tensors = {one.name: torch.tensor(one.data) for one in reader.tensors}
    assert len(tensors) == len(list(model.parameters()))
    assert ("output.weight" in tensors) != config.tie_word_embeddings
    mixer = model.backbone.layers[0].get_submodule("mixer")
    expected = -torch.exp(mixer.get_parameter("A_log"))
    torch.testing.assert_close(tensors["blk.0.ssm_a"].view(expected.shape), expected)
    assert torch.equal(tensors["blk.0.ssm_in.weight"], mixer.get_parameter("in_proj.weight"))
    assert torch.equal(
        tensors["blk.0.ssm_conv1d.weight"], mixer.get_parameter("conv1d.weight")[:, 0]
    )
    if arch == "mamba2":
        assert torch.equal(tensors["blk.0.ssm_dt.bias"], mixer.get_parameter("dt_bias"))
        assert tensors["blk.0.ssm_norm.weight"].shape[0] == config.ngroups


def test_rows_without_a_token_have_one_that_no_text_becomes() -> None:
    found = vocabulary_of(TOKENIZERS["over bytes"](), 500)
    assert len(found.tokens) == len(found.types) == len(set(found.tokens)) == 500
    assert found.types[-1] == llama_cpp.UNUSED
    assert found.types[found.tokens.index("<tag/>")] == llama_cpp.USER_DEFINED
    assert found.types[:2] == [llama_cpp.CONTROL] * 2
    assert (found.ids["eos"], found.ids["bos"], found.begins) == (0, 1, True)


def test_ids_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    write_gguf(student(50, **STUDENTS["groups"]), None, tmp_path / "s.gguf", source="It")
    reader = read(tmp_path / "s.gguf")
    assert value(reader, "tokenizer.ggml.model") == "none"
    assert value(reader, "mamba2.vocab_size") == 50


def without(change: Callable[[Any], object]) -> PreTrainedTokenizerFast:
    """The tokenizer over bytes, its settings changed."""
    settings = json.loads(TOKENIZERS["over bytes"]().backend_tokenizer.to_str())
    change(settings)
    backend = Tokenizer.from_str(json.dumps(settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


REFUSED: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str]] = {
    "another cut": (
        lambda: without(lambda one: one["pre_tokenizer"]["pretokenizers"].pop(0)),
        "cuts it by  *:|which cuts",
    ),
    "a normaliser": (
        lambda: without(lambda one: one.update(normalizer={"type": "Lowercase"})),
        "normalises it by Lowercase",
    ),
    "merges that are not all": (tiny_sentencepiece, "makes '▁ab' of some halves sooner"),
    "Unigram": (tiny_metaspace, "is a Unigram"),
    "bytes missing": (tiny_gemma, "no token for each single byte"),
    "no end": (
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=TOKENIZERS["over bytes"]().backend_tokenizer
        ),
        "names no end of text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused_by_name(case: str) -> None:
    make, saying = REFUSED[case]
    with pytest.raises(UserError, match=saying) as caught:
        vocabulary_of(make(), 600)
    assert "--ids-only" in str(caught.value)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["gpt2_tokenizer", "smollm2_tokenizer"])
def test_llama_cpp_reads_text_as_a_real_tokenizer_does(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    check_reading(request.getfixturevalue(name), tmp_path / "s.gguf")


def test_wordpiece_is_refused(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="--ids-only"):
        vocabulary_of(bert_tokenizer, len(bert_tokenizer))


def test_a_student_that_llama_cpp_cannot_express_is_refused_with_what_to_train(
    tmp_path: Path,
) -> None:
    out = tmp_path / "s.gguf"
    with pytest.raises(UserError, match=r"3 times the model's.*train one with --expand 2, or a"):
        write_gguf(student(50, arch="mamba", d_model=8), None, out, source="This student")
    with pytest.raises(UserError, match=r"SequenceClassification: train one .* of --task lm"):
        write_gguf(small_student(), None, out, source="This student")
    assert not out.exists()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = build_language_model(small_config(), seed=0)
    with pytest.raises(UserError, match=r'install it with .*"\.\[gguf\]"'):
        write_gguf(model, None, tmp_path / "s.gguf", source="This student")


@contextmanager
def running(file: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """A real llama.cpp with this file on one thread of the CPU, asked by its own protocol."""
    llama = pytest.importorskip("xllamacpp", reason="needs xllamacpp, a wheel of llama.cpp")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 512, 1
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, 1
    server = llama.Server(params)
    address = server.listening_address

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        del server
        gc.collect()


def nasty_texts() -> list[str]:
    """Each text, and random cuts and joins of their characters."""
    source = random.Random(0)
    letters = [*"".join(TEXTS), *"  \n\n\t'''019.,"]
    drawn = ["".join(source.choices(letters, k=30)) for _ in range(60)]
    return [*TEXTS, *drawn]


@pytest.mark.ci
@pytest.mark.parametrize("shape", STUDENTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_writes_what_the_student_writes(tmp_path: Path, shape: str, kind: str) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    tokenizer: Any = TOKENIZERS[kind]()
    model: Any = student(len(tokenizer) + 3, **STUDENTS[shape])
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0  # so that it goes on
    write_gguf(model, tokenizer, tmp_path / "s.gguf", source="It")
    num_compared = 0
    with running(tmp_path / "s.gguf") as ask:
        for text in (TEXTS[0], TEXTS[1]):
            ids = tokenizer(text)["input_ids"]
            settings = {"n_predict": 24, "temperature": 0, "n_probs": 5, "return_tokens": True}
            answer = ask("/completion", {"prompt": text, **settings})
            with torch.no_grad():
                whole = model.generate(
                    torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0,
                    eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                log_probs = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            written = whole[0, len(ids) :]
            assert answer["tokens"] == written.tolist() and len(written) == 24
            # It leaves out positions at which a character is not whole.
            for one in answer.get("completion_probabilities", ()):
                own = log_probs[written == one["id"], one["id"]]
                assert (own - one["logprob"]).abs().min() < 1e-4
                num_compared += 1
    assert num_compared


@pytest.mark.ci
@pytest.mark.parametrize("cut", [*SPLITS, True, False])
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path: Path, cut: Any) -> None:
    if isinstance(cut, bool):
        tokenizer = sentencepiece(adds_space=cut)
    else:
        tokenizer = over_bytes(cut[0], ignore_merges=cut[1])
    check_reading(tokenizer, tmp_path / "s.gguf")


def check_reading(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """llama.cpp makes the same ids of each text."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    write_gguf(student(len(tokenizer), **STUDENTS["groups"]), tokenizer, file, source="It")
    with running(file) as ask:
        for text in nasty_texts():
            found = ask("/tokenize", {"content": text, "add_special": True})["tokens"]
            assert found == tokenizer(text)["input_ids"], text
