"""What engines write becomes one cache, whatever the layout; faults are said before it is begun."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from tests.command_line import TINY_STUDENT, done, pipe, refused

TEXTS = ["It is a truth universally acknowledged.", "Emma Woodhouse, handsome, clever, and rich."]
K = 8
TOP_K = ("--top-k", str(K))
SAID = ("--engine", "an engine 1.0", "--model", "tiny", "--dtype", "float32", *TOP_K)

Line = dict[str, Any]


@pytest.fixture(scope="module")
def lines(small_language_model: Path) -> list[Line]:
    """As vLLM answers offline, by a model in transformers."""
    tokenizer = AutoTokenizer.from_pretrained(small_language_model)
    model: Any = AutoModelForCausalLM.from_pretrained(small_language_model).eval()
    found = []
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        lists: list[Any] = [None]
        for row, real in zip(rows, ids[1:], strict=False):
            chosen = {*row.topk(K).indices.tolist(), real}
            lists.append({str(i): {"logprob": row[i].item(), "rank": 1} for i in chosen})
        found.append({"text": text, "prompt_token_ids": ids, "prompt_logprobs": lists})
    return found


def plain(entries: Line) -> dict[str, float]:
    return {token_id: one["logprob"] for token_id, one in entries.items()}


def pairs(line: Line) -> Iterator[tuple[int, Line]]:
    """Each token but the first, with its list."""
    return zip(line["prompt_token_ids"][1:], line["prompt_logprobs"][1:], strict=True)


def by_a_server(line: Line) -> Line:
    names = ("prompt_token_ids", "prompt_logprobs")
    choice = {"index": 0, "text": " generated", "logprobs": None}
    return {"prompt": line["text"], "choices": [choice | {name: line[name] for name in names}]}


def by_an_echo(line: Line) -> Line:
    """The real token's log-prob apart, and the generated token behind the prompt."""
    ids = line["prompt_token_ids"]
    top: list[Any] = [None]
    for _, entries in pairs(line):
        best = sorted(plain(entries).items(), key=lambda one: -one[1])[:K]
        top.append({f"token_id:{i}": one for i, one in best})
    own = [
        None,
        *(entries[str(real)]["logprob"] for real, entries in pairs(line)),
    ]
    echoed = {
        "tokens": [*(f"token_id:{i}" for i in ids), "token_id:7"],
        "token_logprobs": [*own, -1.0],
        "top_logprobs": [*top, {"token_id:7": -1.0}],
    }
    choice = {"text": line["text"] + "!", "prompt_token_ids": ids, "logprobs": echoed}
    return {"prompt": line["text"], "choices": [choice]}


def by_sglang(line: Line) -> Line:
    ids, lists = line["prompt_token_ids"], line["prompt_logprobs"]
    own = [
        None,
        *(entries[str(real)]["logprob"] for real, entries in pairs(line)),
    ]
    top = [None, *([[one, int(i), None] for i, one in plain(at).items()] for at in lists[1:])]
    meta = {
        "input_token_logprobs": [[one, i, None] for one, i in zip(own, ids, strict=True)],
        "input_top_logprobs": top,
    }
    return {"prompt": line["text"], "text": " generated", "meta_info": meta}


LAYOUTS: dict[str, Callable[[Line], Line]] = {
    "offline": lambda line: line,
    "plain numbers": lambda line: (
        line | {"prompt_logprobs": [at and plain(at) for at in line["prompt_logprobs"]]}
    ),
    "a server": by_a_server,
    "an echo": by_an_echo,
    "SGLang": by_sglang,
}


def write(file: Path, lines: list[Line]) -> Path:
    file.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return file


def as_table(lines: list[Line], file: Path) -> Path:
    rows = []
    for line in lines:
        entries = [plain(at or {}) for at in line["prompt_logprobs"]]
        ends = np.cumsum([len(one) for one in entries]).tolist()
        rows.append(
            {
                "text": line["text"],
                "prompt_token_ids": line["prompt_token_ids"],
                "start_indices": [0, *ends[:-1]],
                "end_indices": ends,
                "token_ids": [int(i) for one in entries for i in one],
                "logprobs": [value for one in entries for value in one.values()],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1)
    return file


@pytest.mark.parametrize("layout", [*LAYOUTS, "parquet"])
def test_every_layout_gives_the_same_bytes(
    layout: str, lines: list[Line], small_language_model: Path, tmp_path: Path
) -> None:
    tokenizer = ("--tokenizer", small_language_model, "--max-length", "64")
    usual = write(tmp_path / "usual.jsonl", lines)
    done("import-log-probs", usual, tmp_path / "usual", *tokenizer, *SAID)
    if layout == "parquet":
        file = as_table(lines, tmp_path / "answers.parquet")
    else:
        file = write(tmp_path / "answers.jsonl", [LAYOUTS[layout](one) for one in lines])
    done("import-log-probs", file, tmp_path / "cache", *tokenizer, *SAID)
    found = CacheReader(tmp_path / "cache").sample(0)
    for name, values in CacheReader(tmp_path / "usual").sample(0).items():
        if name != "sample_id":  # of which the file's hash is a part
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def without(name: str) -> Callable[[Line], Line]:
    return lambda line: line | {name: None}


def with_entry(log_prob: float) -> Callable[[Line], Line]:
    """Its most probable token at the third place."""

    def change(line: Line) -> Line:
        lists = list(line["prompt_logprobs"])
        best = max(plain(lists[3]).items(), key=lambda one: one[1])[0]
        lists[3] = lists[3] | {best: {"logprob": log_prob}}
        return line | {"prompt_logprobs": lists}

    return change


def by_strings(line: Line) -> Line:
    lists = [at and {f"word{i}": one for i, one in at.items()} for at in line["prompt_logprobs"]]
    return line | {"prompt_logprobs": lists}


def ignored(line: Line) -> Line:
    choice = {"text": " generated", "prompt_token_ids": line["prompt_token_ids"]}
    return {"prompt": line["text"], "choices": [choice]}


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (without("text"), r"document 2 has no text.*write it beside the answer"),
        (without("prompt_token_ids"), "document 2 has no prompt_token_ids: ask .*return_token_ids"),
        (by_strings, r"document 2 has lists by strings \('word"),
        (ignored, "the server ignored what was asked"),
        (lambda line: {"prompt": "It.", "choices": []}, "document 2 has 0 choices: write one line"),
        (with_entry(-9999.0), "document 2, token 3: the token .* has no probability at all"),
        (with_entry(-float("inf")), "document 2, token 3: the token .* has no probability at all"),
        (with_entry(1.5), r"document 2, token 3: 1.5 is no log-prob"),
    ],
)
def test_a_fault_is_said_before_anything_is_written(
    change: Callable[[Line], Line],
    saying: str,
    lines: list[Line],
    small_language_model: Path,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "answers.jsonl", [lines[0], change(lines[1])])
    out = tmp_path / "cache"
    named = ("--tokenizer", small_language_model, *SAID, "--shard-documents", "1")
    refused("import-log-probs", file, out, *named, saying=saying)
    assert not out.exists()


def test_too_few_tokens_and_what_ran_are_asked_for_first(
    lines: list[Line], small_language_model: Path, tmp_path: Path
) -> None:
    file, out = write(tmp_path / "answers.jsonl", lines), tmp_path / "cache"
    named = ("import-log-probs", file, out, "--tokenizer", small_language_model)
    refused(*named, *SAID[:6], "--top-k", "20", saying="document 1, token 1: the list has .*top-k")
    refused(*named, "--engine", "one", saying="--model and --dtype are missing")
    refused(
        *named, *SAID, "--second-pass", file, saying="--second-pass is of logits that llama.cpp"
    )
    refused(*named, *SAID, "--gguf", file, saying="--engine is of answers, and --gguf says")
    refused("import-log-probs", tmp_path / "no", out, *named[3:], *SAID, saying="is no file")
    assert not out.exists()


def test_half_precision_and_missing_ends_are_counted(
    lines: list[Line], small_language_model: Path, tmp_path: Path
) -> None:
    def halved(line: Line) -> Line:
        lists = [
            at and {i: float(np.float32(round(one * 8) / 8)) for i, one in plain(at).items()}
            for at in line["prompt_logprobs"][:-1]
        ]
        ids = line["prompt_token_ids"][:-1]
        return line | {"prompt_token_ids": ids, "prompt_logprobs": lists}

    file = write(tmp_path / "answers.jsonl", [halved(one) for one in lines])
    named = ("--tokenizer", small_language_model, *SAID[:6], "--top-k", "4")
    # Rounded as coarsely, heads add up to more than 1 at some places: those of a flat model do not.
    said = pipe("import-log-probs", file, tmp_path / "cache", *named).stderr
    counts = read_manifest(tmp_path / "cache").about["answers"]["labeled"]
    num = sum(len(one["prompt_token_ids"]) - 2 for one in lines)
    assert (counts["num_positions"], counts["num_without_end"]) == (num, 2)
    assert counts["num_equal"] > num / 2
    assert "students learn its rounding" in said
    assert "2 of 2 documents do not end with the end of text" in said


# ---- what llama.cpp saves ---------------------------------------------------------------------


def saved(
    file: Path, ids: np.ndarray, log_probs: Callable[[list[int]], np.ndarray], window: int
) -> Path:
    """As llama-perplexity writes it: codes of 2 bytes over the 16 nats below the largest."""
    tokens = ids[: len(ids) // window * window].reshape(-1, window)
    content = struct.pack("<8s3i", b"_logits_", window, log_probs([0]).shape[-1], len(tokens))
    content += tokens.astype("<i4").tobytes()
    for one in tokens:
        for row in log_probs(one.tolist())[window // 2 : -1]:
            least = max(row.min(), row.max() - 16)
            scale = (row.max() - least) / 65535
            codes = np.round((np.maximum(row, least) - least) / scale).astype("<u2")
            content += np.array([scale, least], "<f4").tobytes() + codes.tobytes()
            content += b"\0\0" * (len(codes) % 2)
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def teacher(small_language_model: Path) -> tuple[Any, Callable[[list[int]], np.ndarray]]:
    model: Any = AutoModelForCausalLM.from_pretrained(small_language_model).eval()

    def log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return AutoTokenizer.from_pretrained(small_language_model), log_probs


@pytest.fixture(scope="module")
def gguf(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model, with one tensor."""
    writer_of = pytest.importorskip("gguf", reason="needs the extra gguf").GGUFWriter
    tokenizer, _ = teacher
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = writer_of(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_file_type(7)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


WINDOW = 16


@pytest.fixture(scope="module")
def text_ids(teacher: Any) -> np.ndarray:
    return np.array(teacher[0](" ".join(TEXTS * 12))["input_ids"])


def test_saved_logits_are_the_models_at_the_scored_half(
    teacher: Any, gguf: Path, text_ids: np.ndarray, small_language_model: Path, tmp_path: Path
) -> None:
    _, log_probs = teacher
    first = saved(tmp_path / "first.kld", text_ids, log_probs, WINDOW)
    second = saved(tmp_path / "second.kld", text_ids[WINDOW // 2 :], log_probs, WINDOW)
    named = ("--tokenizer", small_language_model, "--gguf", gguf, *TOP_K, "--max-length", "40")
    cache = tmp_path / "cache"
    done("import-log-probs", first, cache, *named, "--second-pass", second)
    reader = CacheReader(cache)
    codec: Any = codec_from(reader.manifest.settings["codec"])
    seen, num = set[tuple[int, ...]](), 0
    for idx in range(len(reader)):
        sample = reader.sample(idx)
        counted = np.flatnonzero(sample["loss_mask"])
        decoded = codec.decode(codec.expand(sample), 1.0)
        assert len(decoded.ids) == len(counted), "what was not scored takes no room"
        for entry, at in enumerate(counted):
            start = int(np.flatnonzero(sample["segment"] == sample["segment"][at])[0])
            assert WINDOW // 2 <= at - start < WINDOW - 1
            context = sample["input_ids"][start : at + 1].astype(int).tolist()
            exact = log_probs(context)[-1]
            head = decoded.ids[entry]
            p = np.exp(exact)
            tail = 1 - p[head].sum()
            kl = (p[head] * (exact[head] - decoded.log_probs[entry])).sum()
            kl += tail * (np.log(tail) - decoded.tail_log_prob[entry])
            assert abs(kl) < 5e-4
            real = int(sample["input_ids"][at + 1])
            assert sample["next_log_prob"][entry] == pytest.approx(exact[real], abs=8e-3)
            seen.add((*context, real))
            num += 1
    windows = sum(len(one) // WINDOW for one in (text_ids, text_ids[WINDOW // 2 :]))
    assert num == windows * (WINDOW - 1 - WINDOW // 2)
    recorded = reader.manifest.settings["teacher"]
    assert recorded["engine"] == "llama.cpp" and recorded["dtype"] == "gguf file type 7"
    done("train-student", "--cache", cache, "--temperature", "1", "--out", tmp_path / "run",
         *TINY_STUDENT, "--eval-fraction", "0.3")  # fmt: skip


def test_a_damaged_or_foreign_file_is_refused(
    teacher: Any, gguf: Path, text_ids: np.ndarray, small_language_model: Path, tmp_path: Path
) -> None:
    whole = saved(tmp_path / "whole.kld", text_ids[: 2 * WINDOW], teacher[1], WINDOW).read_bytes()
    file, out = tmp_path / "cut.kld", tmp_path / "cache"
    named = (file, out, "--tokenizer", small_language_model, "--gguf", gguf, *TOP_K)
    for num, saying in (
        (6, "was not saved by llama-perplexity"),
        (12, "holds no window: the text was shorter than two windows"),
        (40, "has 40 bytes, expected .* it was cut"),
        (len(whole) - 1, "it was cut or written over"),
    ):
        file.write_bytes(whole[:num])
        refused("import-log-probs", *named, saying=saying)
    file.write_bytes(whole[:20] + b"\xff\xff\xff\x7f" + whole[24:])
    refused("import-log-probs", *named, saying="window 1 has ids beyond the .* of a row")
    file.write_bytes(b"GGUF" + whole[4:])
    refused("import-log-probs", *named, saying="was not saved by llama-perplexity")
    file.write_bytes(whole)
    refused("import-log-probs", *named[:4], "--gguf", file, saying="is no GGUF")
    assert not out.exists()
