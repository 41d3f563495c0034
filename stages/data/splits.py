"""Which split of a source to read."""

from __future__ import annotations

from collections.abc import Sequence

from teacher_cache.cache.errors import UserError, did_you_mean


def choose_split(splits: Sequence[str], wanted: str | None, source: str) -> str:
    """The wanted split, or without a wish `train` or the only one.

    Args:
        splits: the names there are.
        wanted: the name asked for.
        source: what to call the source in a message.

    Raises:
        UserError: if it is not there, or none was asked for where there are several.
    """
    listed = f"it has {', '.join(splits)}"
    if wanted is not None:
        if wanted not in splits:
            raise UserError(
                f"{source} has no split {wanted!r} ({listed}): {did_you_mean(wanted, splits)}"
            )
        return wanted
    if "train" in splits:
        return "train"
    if len(splits) != 1:
        raise UserError(f"{source} has no split 'train' ({listed}): name the split to read")
    return splits[0]
