"""Tables of ranks in tiktoken's format, as Qwen's comes."""

from __future__ import annotations

import base64
from pathlib import Path

from teacher_cache.stages.tokens.token_bytes import TokenBytes


def read_tiktoken(path: Path) -> TokenBytes:
    """Base64 of the bytes, a space, the id, line by line; special tokens are not part of it."""
    ranks: dict[int, bytes] = {}
    for line in path.read_bytes().splitlines():
        encoded, rank = line.split()
        ranks[int(rank)] = base64.b64decode(encoded, validate=True)
    return TokenBytes(content=tuple(ranks.get(idx) for idx in range(max(ranks, default=-1) + 1)))
