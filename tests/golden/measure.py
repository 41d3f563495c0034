"""What is written down of a cache and of a run: no paths, no versions, no clock."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from teacher_cache.cache.reader import CacheReader

_OF_ONE_MAKING = ("completed_at", "created_at", "sha256", "versions")
_OF_ONE_PLACE = ("sources", "teacher")
# What manifests say since the artefacts were made; tests of their own look at it.
_ADDED = ("batching", "teacher_on_labels", "num_without_label", "num_dropped", "longest")
_CLOCK = ("runtime", "per_second")

Json = dict[str, Any]


def cache_values(cache: Path) -> Json:
    """All that a golden cache must be again."""
    manifest = json.loads((cache / "manifest.json").read_text())
    return {
        "manifest": stable_manifest(manifest),
        "shards": shard_hashes(cache),
        "samples": {split: samples_sha256(cache, split) for split in manifest["splits"]},
    }


def stable_manifest(manifest: Json) -> Json:
    """A manifest without what differs between two makings of one cache."""
    kept = {name: value for name, value in manifest.items() if name not in _OF_ONE_MAKING}
    left_out = {*_OF_ONE_PLACE, *_ADDED}
    kept["about"] = {k: v for k, v in manifest["about"].items() if k not in left_out}
    kept["splits"] = {
        name: split | {"report": {k: v for k, v in split["report"].items() if k not in _ADDED}}
        for name, split in manifest["splits"].items()
    }
    if converted := kept["about"].get("converted_from"):
        its_own = ("cache", *_OF_ONE_MAKING)
        kept["about"]["converted_from"] = {k: v for k, v in converted.items() if k not in its_own}
    kept["schema"] = [
        " ".join(f"{k}={v}" for k, v in sorted(spec.items())) for spec in kept["schema"]
    ]
    # A segment's hash is of sidecars, which name versions.
    kept["index"] = [segment["path"] for segment in manifest["index"]]
    return kept


def shard_hashes(cache: Path) -> dict[str, str]:
    """The hash in each sidecar, by the shard's path."""
    sidecars = [json.loads(path.read_text()) for path in sorted(cache.glob("*/*/*.json"))]
    return {sidecar["path"]: sidecar["sha256"] for sidecar in sidecars}


def samples_sha256(cache: Path, split: str) -> str:
    """SHA-256 of every field of every sample, as the reader gives them."""
    reader = CacheReader(cache, split)
    digest = hashlib.sha256()
    for sample_id, idx in zip(reader.sample_ids(), range(len(reader)), strict=True):
        digest.update(sample_id)
        sample: Json = dict(reader.sample(idx))
        for name, value in sorted(sample.items()):
            if isinstance(value, np.ndarray):
                value = f"{value.dtype} {value.shape} {value.tobytes().hex()}"
            digest.update(f"{name}: {_shown(value)}\n".encode())
    return digest.hexdigest()


def _shown(value: Any) -> str:
    """As NumPy 2 shows it; NumPy 1 shows a number as Python does, and bytes by another name."""
    shown = repr(value)
    if not isinstance(value, np.generic) or shown.startswith("np."):
        return shown
    return f"np.{shown}" if isinstance(value, np.void) else f"np.{type(value).__name__}({shown})"


def run_values(run: Path) -> Json:
    """All that a golden run must be again."""
    record = json.loads((run / "run.json").read_text())
    result = record["result"]
    return {
        "settings": record["settings"],
        "settings_sha256": settings_sha256(record["settings"]),
        "weights_sha256": weights_sha256(run),
        "num_steps": result["num_steps"],
        "evaluation": _without_clock(result["evaluation"]),
        "losses": [line["loss"] for line in result["log"] if "loss" in line],
    }


def settings_sha256(settings: Json) -> str:
    """SHA-256 of a run's settings, whose beginning names a run's folder."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_sha256(run: Path) -> str:
    """SHA-256 of names, shapes and bytes of the weights, whatever order the file has them in."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(run / "model.safetensors").items()):
        digest.update(f"{name} {weight.dtype} {weight.shape}".encode() + weight.tobytes())
    return digest.hexdigest()


def figures(path: Path) -> Json:
    """What `pipe evaluate --json` wrote, by row, without the clock; and how many documents."""
    value = json.loads(path.read_text())
    rows = {row["name"]: row for row in value["rows"]}
    return {
        "num_documents": value["num_documents"],
        "rows": {
            name: {k: v for k, v in row.items() if isinstance(v, float | int)}
            for name, row in rows.items()
        },
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _without_clock(line: Json) -> Json:
    return {name: value for name, value in line.items() if not name.endswith(_CLOCK)}
