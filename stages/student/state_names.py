"""The two names that transformers has for what decoding carries on.

Up to 5.23 its Mamba models and `generate` say `cache_params`, from 5.24 on every model says
`cache`. A student answers to both under every release.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.utils.generic import ModelOutput

_OLD, _NEW = "cache_params", "cache"


class OutputWithCache(ModelOutput):
    """An output with a field `cache`, which is found as `cache_params` too."""

    if not hasattr(ModelOutput, _OLD):  # from 5.24 on every output does all of this

        def __contains__(self, key: object) -> bool:
            """Whether something is there under this name."""
            return super().__contains__(_NEW if key == _OLD else key)

        def __getitem__(self, k: Any) -> Any:
            """By name, or by place among what is not None."""
            return super().__getitem__(_NEW if k == _OLD else k)

        @property
        def cache_params(self) -> Cache | None:
            """The states, under their older name."""
            return getattr(self, _NEW)


def the_cache(cache: Cache | None, cache_params: Cache | None) -> Cache | None:
    """The one of the two that was given, if any was.

    Raises:
        ValueError: if both were.
    """
    if cache is not None and cache_params is not None:
        raise ValueError("cache and cache_params are two names of one thing: give one")
    return cache_params if cache is None else cache
