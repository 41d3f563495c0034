"""Load a tokenizer by hub id or folder, or say in a sentence why not; save one so that it lasts."""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.tokens.record import canonical_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TIMEOUT_S = 10.0


def load_tokenizer(
    name: str, *, option: str, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Args:
        name: folder or hub id.
        option: the command-line option that named it, for the error's remedy.
        trust_remote_code: run the code that a hub repository brings.

    Raises:
        UserError: if it is not there or cannot be loaded.
    """
    from transformers import AutoTokenizer  # slow to import

    require_folder(name, "a tokenizer", option=option)
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=is_local_only(name)
        )
    except Exception as error:  # whatever the libraries under it raise at files they cannot read
        library = _missing_library(Path(name))
        if library is not None:
            raise UserError(
                f"the tokenizer {name!r} has no tokenizer.json, and its {library.file} needs "
                f"{library.package}, which is not installed: pip install {library.package}"
            ) from error
        raise UserError(could_not_load("tokenizer", name, error, option=option)) from error


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
        return importlib.util.find_spec(library.module) is not None
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
    """Refuse a name that can only be a folder, by its form, and is none.

    Raises:
        UserError: naming the folder.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise UserError(
            f"{_given(option, name)} is no folder: give a folder with {content}, or a hub id"
        )


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
