"""From a store's name, as on the command line and in the manifest, to the store."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError, did_you_mean

if TYPE_CHECKING:  # a store loads the library that writes it
    from teacher_cache.cache.stores.interface import Store

DEFAULT_STORE = "arrow"
STORES = (DEFAULT_STORE, "zarr")
"""Each the name of a module beside this one."""


def store_named(name: str) -> Store:
    """The store of that name.

    Raises:
        UserError: if this release has no such store.
    """
    if name not in STORES:
        raise UserError(
            f"the format {name!r} is unknown to this release: {did_you_mean(name, STORES)}"
        )
    return import_module(f"{__package__}.{name}").STORE
