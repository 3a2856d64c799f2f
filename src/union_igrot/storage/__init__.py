"""Atomic writes, file locks, the cache folder, sizes and paths."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.storage.cache import Usage as Usage, default_root as default_root, prune as prune, usage as usage
    from union_igrot.storage.files import write_atomic as write_atomic
    from union_igrot.storage.locks import (
        HeldLock as HeldLock,
        acquire_exclusive as acquire_exclusive,
        acquire_shared as acquire_shared,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
