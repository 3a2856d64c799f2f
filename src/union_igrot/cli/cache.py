"""`union-cache`: list the cache folder, and prune it."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from union_igrot.storage.cache import Usage

EXIT_IN_USE = 1
"""Exit code if more is left than `prune=` allows, since other processes use it."""


def cache(config: "DictConfig", _: Path) -> None:
    """Prune the cache if configured, and list what is left."""
    import shutil

    from union_igrot.storage.cache import PARTS, chosen_limit, default_root, prune, usage
    from union_igrot.storage.sizes import format_size, parse_duration, parse_size
    from union_igrot.terminal import TerminalConsole, print_line

    root = default_root() if config.cache_dir is None else expand_user(config.cache_dir)
    limit = chosen_limit()  # an invalid one is an error before anything is removed
    size = 0 if config.prune in (None, "all") else parse_size(config.prune)
    if config.prune is not None or config.older_than is not None:
        removed = prune(root, size, 0 if config.older_than is None else parse_duration(config.older_than), PARTS)
        print_line(f"removed {_folders(len(removed))}, {format_size(sum(one.bytes for one in removed))}")
    left = usage(root, PARTS)
    total = sum(one.bytes for one in left)
    if left:
        TerminalConsole().print(_table(left))
    free = f", {format_size(shutil.disk_usage(root).free)} free on the disk" if root.is_dir() else ""
    limited = f", limit {format_size(limit)}" if limit is not None else ""
    print_line(f"{root}: {format_size(total)} in {_folders(len(left))}{free}{limited}")
    if config.prune is not None and config.older_than is None and total > size:
        print_line(
            f"{_folders(sum(one.in_use for one in left))} in use and kept; prune again when those runs have ended"
        )
        raise SystemExit(EXIT_IN_USE)


def _folders(count: int) -> str:
    return f"{count} folder{'' if count == 1 else 's'}"


def _table(left: "Sequence[Usage]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from union_igrot.storage.sizes import format_duration, format_size

    table = Table("what", "of", "items", "size", "last used", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[2].justify = table.columns[3].justify = "right"
    for one in reversed(left):
        what = "embeddings" if one.fingerprint.startswith("embedded-") else one.part
        cells = (
            f"{what} {one.dtype}".rstrip() if one.part == "features" else f"{one.part}, of an earlier version",
            one.backbone or one.fingerprint,
            f"{one.entries:,}" if one.part == "features" else "",
            format_size(one.bytes),
            f"{format_duration(time.time() - one.last_used)} ago",
            "in use" if one.in_use else "",
        )
        table.add_row(*map(Text, cells))
    return table


main = partial(run_command, "cache", cache)
if __name__ == "__main__":
    main()
