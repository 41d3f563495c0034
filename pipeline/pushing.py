"""`pipe push`: a student with its card to the hub, and its cache as a data set, if asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.lock import LOCK_NAME
from teacher_cache.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from teacher_cache.stages.evaluation.runs import finished_student
from teacher_cache.stages.training.model_card import CARD_NAME, named
from teacher_cache.stages.training.run_folder import RUN_NAME, RunRecord

PLACES = ("cache", "teacher", "start")  # of a record, that may be paths
LEFT_AT_HOME = (LOCK_NAME, "report.html")  # and folders: checkpoints
CACHE_CARD = """---
tags: [teacher-cache, distillation]
---

# What a teacher said, for students of it

A cache of the package `teacher-cache`: `manifest.json` says of which teacher and text, its `index`
and `teacher` folders hold what a student needs. Its fingerprint is `{fingerprint}`;
it has {num:,} samples.

    hf download {repo} --repo-type dataset --local-dir CACHE
    pipe verify CACHE
    pipe train-student --cache CACHE
"""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One repository and what goes there.

    Attributes:
        repo: `owner/name`.
        kind: `model` or `dataset`.
        files: by their names there: bytes, or where they lie.
    """

    repo: str
    kind: str
    files: Mapping[str, bytes | Path]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(
            one.stat().st_size if isinstance(one, Path) else len(one) for one in self.files.values()
        )


def uploads_of(run: Path, repo: str, *, with_cache: bool, cache: Path | None) -> list[Upload]:
    """What a push would send, all that can be refused refused.

    Args:
        run: a finished student's.
        repo: `owner/name`; the cache goes to `owner/name-cache`.
        with_cache: whether the cache goes, too.
        cache: where it lies now; None where the run says.

    Raises:
        UserError: if the run is not finished or a teacher's, the name is none, or the cache is not
            its own or not complete.
    """
    record = finished_student(run)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {error}") from error
    files: dict[str, bytes | Path] = {
        path.name: path
        for path in sorted(run.iterdir())
        if path.is_file() and path.name not in LEFT_AT_HOME
    }
    files[RUN_NAME] = _without_paths(record)
    if CARD_NAME not in files:
        raise UserError(f"{run} has no {CARD_NAME}: put one there, it is what people read first")
    found = [Upload(repo=repo, kind="model", files=files)]
    if with_cache:
        where = cache or Path(record.about["cache"])
        found.append(_cache_upload(where, f"{repo}-cache", record))
    return found


def _without_paths(record: RunRecord) -> bytes:
    """`run.json` with names where it has paths of this machine, so that `pipe predict` runs."""
    places = {name: named(record.about[name]) for name in PLACES if name in record.about}
    value = asdict(replace(record, about={**record.about, **places}))
    return f"{json.dumps(value, indent=1, sort_keys=True)}\n".encode()


def _cache_upload(cache: Path, repo: str, record: RunRecord) -> Upload:
    manifest: Manifest = read_manifest(cache)
    if manifest.fingerprint != record.settings["cache_fingerprint"]:
        raise UserError(
            f"{cache} is not the cache that the student was trained from: name that one"
        )
    if not manifest.complete:
        raise UserError(f"{cache} is not complete: run the same `{manifest.maker}` again")
    files: dict[str, bytes | Path] = {
        path.relative_to(cache).as_posix(): path
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME
    }
    num = sum(split.num_samples for split in manifest.splits.values())
    card = CACHE_CARD.format(fingerprint=manifest.fingerprint, num=num, repo=repo)
    assert MANIFEST_NAME in files, "it was read"
    return Upload(repo=repo, kind="dataset", files={CARD_NAME: card.encode(), **files})


def push(uploads: list[Upload], *, private: bool, say: Callable[[str], None]) -> None:
    """Send them; a repository that is there already gets one commit more.

    Raises:
        UserError: if there is no token, or the hub refuses.
    """
    if get_token() is None:
        raise UserError(
            "nothing was uploaded, since there is no token of the hub: give one by `hf auth login` "
            "or in HF_TOKEN"
        )
    api: Any = HfApi()
    for one in uploads:
        try:
            api.create_repo(one.repo, repo_type=one.kind, private=private or None, exist_ok=True)
            done = api.create_commit(
                one.repo,
                operations=[_operation(name, content) for name, content in one.files.items()],
                commit_message="From pipe push",
                repo_type=one.kind,
            )
        except (HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the hub refused {one.kind} {one.repo}: {reason}") from error
        say(f"✓ {one.kind} {one.repo}: {done.commit_url}")


def _operation(name: str, content: bytes | Path) -> Any:
    from huggingface_hub import CommitOperationAdd

    data = content if isinstance(content, bytes) else str(content)
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
