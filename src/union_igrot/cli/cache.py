"""`union-cache`: what the cache folder keeps on disk, and making room.

Knows the table and the words. Does not know how anything is stored.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from union_igrot.storage.cache import Usage

EXIT_IN_USE = 1
"""Exit code where more is left than was asked for, since processes have it open."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-cache`."""
    run_command("cache", cache, argv)


def cache(config: "DictConfig", fresh: Path) -> None:
    """List the cache; or prune it as configured and list what is left, with code 1 where that is too much."""
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    import shutil

    from rich.console import Console

    from union_igrot.storage.cache import PARTS, chosen_limit, default_root, prune, usage
    from union_igrot.storage.sizes import format_size, parse_duration, parse_size

    del fresh
    root = default_root() if config.cache_dir is None else expand_user(config.cache_dir)
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    limit = chosen_limit()  # a wrong one is told before anything is removed
    asked = config.prune is not None or config.older_than is not None
    wanted = 0 if config.prune in (None, "all") else parse_size(config.prune)
    if asked:
        removed = prune(root, wanted, 0 if config.older_than is None else parse_duration(config.older_than), PARTS)
        say(f"removed {_stores(len(removed))}, {format_size(sum(one.bytes for one in removed))}")
    kept = usage(root, PARTS)
    total = sum(one.bytes for one in kept)
    if kept:
        console.print(_table(kept))
    say(
        f"{root}: {format_size(total)} in {_stores(len(kept))}"
        + (f", {format_size(shutil.disk_usage(root).free)} free on the disk" if root.is_dir() else "")
        + (f", limit {format_size(limit)}" if limit is not None else "")
    )
    if config.prune is not None and config.older_than is None and total > wanted:
        busy = sum(one.in_use for one in kept)
        say(f"{_stores(busy)} in use and kept; prune again when those runs have ended")
        raise SystemExit(EXIT_IN_USE)


def _stores(count: int) -> str:
    return f"{count} folder{'' if count == 1 else 's'}"


def _table(kept: "Sequence[Usage]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from union_igrot.storage.sizes import format_duration, format_size

    table = Table("what", "of", "items", "size", "last used", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (2, 3):
        table.columns[column].justify = "right"
    for one in reversed(kept):
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


if __name__ == "__main__":
    main()
