"""From a store's name, as on the command line and in the manifest, to the store."""

from __future__ import annotations

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.cache.stores.arrow import ArrowStore
from teacher_cache.cache.stores.interface import Store
from teacher_cache.cache.stores.zarr import ZarrStore

DEFAULT_STORE = "arrow"
STORES: dict[str, Store] = {DEFAULT_STORE: ArrowStore(), "zarr": ZarrStore()}


def store_named(name: str) -> Store:
    """The store of that name.

    Raises:
        UserError: if this release has no such store.
    """
    if name not in STORES:
        raise UserError(
            f"the format {name!r} is unknown to this release: {did_you_mean(name, STORES)}"
        )
    return STORES[name]
