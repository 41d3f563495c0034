"""Copy named members out of a wheel, an npm package or a Debian package."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from teacher_cache.cache.errors import UserError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


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
