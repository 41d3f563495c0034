"""Load a tokenizer by hub id or folder, or say in a sentence why not; save one so that it lasts."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.tokens.record import canonical_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TIMEOUT_S = 10.0
WEIGHT_FILES = (".safetensors", ".bin")
LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(
    name: str, *, option: str, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Args:
        name: folder or hub id.
        option: the command-line option that named it, for the error's remedy.
        trust_remote_code: run the code that a hub repository brings.

    Raises:
        UserError: if it is not there, cannot be loaded or has no words.
    """
    from transformers import AutoTokenizer  # slow to import

    require_folder(name, "a tokenizer", option=option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=is_local_only(name)
        )
    except Exception as error:  # whatever the libraries under it raise at files they cannot read
        library = _missing_library(Path(name))
        if library is not None:
            raise UserError(
                f"the tokenizer {name!r} has no tokenizer.json, and its {library.file} needs "
                f"{library.package}, which is not installed: pip install {library.package}"
            ) from error
        if "Couldn't instantiate the backend tokenizer" in str(error):
            error = ValueError("there is no tokenizer.json, nor what transformers makes one of")
        raise UserError(could_not_load("tokenizer", name, error, option=option)) from error
    # Where no file of a tokenizer is found, transformers makes one of its special tokens alone.
    if not set(tokenizer.get_vocab().values()) - special_ids(tokenizer):
        raise UserError(
            f"the tokenizer of {name!r} has special tokens and no others, as where its files are "
            f"missing: save the tokenizer beside the model, or give {_given(option, 'DIR')} with "
            "both"
        )
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """With a role (`cls_token`, ...) or without one, as a decoder's reserved tokens are."""
    without_role = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return without_role | set(tokenizer.all_special_ids)


@dataclass(frozen=True)
class _Library:
    """What reads a tokenizer's file where there is no tokenizer.json.

    Attributes:
        file: its name.
        module: what is imported.
        package: what is installed.
    """

    file: str
    module: str
    package: str


def _missing_library(folder: Path) -> _Library | None:
    """What a folder's files need and the machine lacks; None where it lacks nothing known."""
    if not folder.is_dir() or (folder / "tokenizer.json").exists():
        return None
    needed = [_Library("tekken.json", "mistral_common", "mistral-common")]
    for path in sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]):
        # A tiktoken file is lines of base64 and a rank; SentencePiece's is a protocol buffer.
        with path.open("rb") as stream:
            is_lines = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", stream.readline(4096)) is not None
        if is_lines:
            needed.append(_Library(path.name, "tiktoken", "tiktoken"))
        else:
            needed.append(_Library(path.name, "sentencepiece", "sentencepiece"))
            needed.append(_Library(path.name, "google.protobuf", "protobuf"))
    return next(
        (one for one in needed if (folder / one.file).exists() and not _is_there(one)), None
    )


def _is_there(library: _Library) -> bool:
    try:
        return find_spec(library.module) is not None
    except ModuleNotFoundError:  # not even the package that the module is in
        return False


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Commit a tokenizer's files, one by one; equal tokenizers give equal bytes.

    Its own `save_pretrained` neither waits for the disk nor says what is wrong with it.

    Raises:
        UserError: where the file system refuses.
    """
    for name, content in canonical_files(tokenizer).items():
        write_bytes_atomically(folder / name, content)


def require_folder(name: str, content: str, *, option: str) -> None:
    """Refuse a name that can only be a folder, by its form, and is none that transformers reads.

    Raises:
        UserError: naming the folder, or the file that is a pointer of git-lfs, a GGUF file or an
            adapter.
    """
    given, path = _given(option, name), Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(_is_gguf(path, content))
    if looks_local and not path.is_dir():
        raise UserError(f"{given} is no folder: give a folder with {content}, or a hub id")
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else []
    for one in files:
        if _begins_with(one, LFS_POINTER):
            raise UserError(
                f"{one} is a pointer of git-lfs and not the file itself: run `git lfs pull` in "
                f"{path}, or download it again"
            )
    gguf = [one for one in files if one.suffix == ".gguf"]
    if gguf and not any(one.suffix in WEIGHT_FILES for one in files):
        raise UserError(_is_gguf(gguf[0], content))
    if (path / "adapter_config.json").is_file() and find_spec("peft") is None:
        raise UserError(
            f"{name} is an adapter of PEFT and no whole model: `pip install peft`, or merge it "
            "into its base (merge_and_unload) and save that with its tokenizer"
        )


def _is_gguf(path: Path, content: str) -> str:
    return (
        f"{path} is a GGUF file, which is not read here: give a folder with {content}, or make one "
        f"of it with transformers (from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}) "
        "and save_pretrained, of model and tokenizer)"
    )


def _begins_with(path: Path, content: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(content)) == content


@functools.cache
def is_local_only(name: str) -> bool:
    """Whether a hub id can only come from the files of an earlier download: no hub answers.

    One question with one time limit; transformers would ask for each file, with growing pauses.
    """
    from huggingface_hub import HfApi  # slow to import
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] -- httpx's or httpx2's, as the hub uses
        RepositoryNotFoundError,
    )

    if Path(name).is_dir():
        return False
    try:
        HfApi().model_info(name, timeout=PROBE_TIMEOUT_S)
    except RepositoryNotFoundError:
        return False
    except (HTTPError, OSError):
        return True
    return False


def could_not_load(what: str, name: str, error: Exception, *, option: str) -> str:
    """One sentence on a model or tokenizer that transformers could not load."""
    return (
        f"the {what} {name!r} could not be loaded ({first_line(error)}): give a folder that "
        f"holds it with {_given(option, 'DIR')}, or make the hub reachable"
    )


def _given(option: str, value: str) -> str:
    """`--model DIR`; or `--arch hf:DIR`, where the option's value begins with a kind."""
    return f"{option}{value}" if option.endswith(":") else f"{option} {value}"
