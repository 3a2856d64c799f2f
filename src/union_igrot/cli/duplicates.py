"""`union-duplicates`: list groups of near duplicates in an index; nothing is removed."""

import html
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import check_output, run_command, writes_output

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.gallery.results import SearchResult

EXIT_NONE = 1  # exit code if there are no duplicates
_SHOWN = 200  # groups on the page


def duplicates(config: "DictConfig", _: Path) -> None:
    """List groups as configured; exit with 1 if there are none."""
    from union_igrot.gallery.duplicates import find_duplicates
    from union_igrot.gallery.engines.factory import open_index
    from union_igrot.gallery.results import hit_table
    from union_igrot.terminal import TerminalConsole, progress_bar

    page = None if config.html is None else check_output("html", config.html, ".html", ".htm")
    with open_index(config.index) as index, progress_bar(shown=config.progress) as bar:
        task = bar.add_task("comparing images", total=None)
        groups = find_duplicates(
            index,
            config.threshold,
            config.where,
            thumbnails=0 if page is None else _SHOWN,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    as_lines = config.format == "jsonl" or (config.format == "auto" and not sys.stdout.isatty())
    for number, group in enumerate(groups, 1):
        if as_lines:
            images = [{"id": hit.id, "score": round(hit.score, 6), **hit.columns} for hit in group]
            sys.stdout.write(json.dumps({"group": number, "images": images}) + "\n")
        else:
            TerminalConsole().print(hit_table(group, list(group[0].columns), title=f"group {number} of {len(groups)}"))
    if page is not None:
        with writes_output("html", page):
            _write_page(page, config.index, groups)
    if not groups:
        sys.stderr.write("no duplicates\n")
        raise SystemExit(EXIT_NONE)


def _write_page(path: Path, index: str, groups: "Sequence[SearchResult]") -> None:
    """Write the first groups as a page that needs no network, no script and no other file."""
    from union_igrot.gallery.results import hits_html
    from union_igrot.storage.files import write_atomic

    title = html.escape(f"{len(groups):,} groups of duplicates in {index}")
    more = f"<p>The first {_SHOWN} are shown.</p>" if len(groups) > _SHOWN else ""
    parts = [f"<h2>{len(group)} images</h2>{hits_html(group)}" for group in groups[:_SHOWN]]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family:sans-serif"><h1>{title}</h1>{more}{"".join(parts)}</body></html>\n'
    )
    write_atomic(path, page)


main = partial(run_command, "duplicates", duplicates)
if __name__ == "__main__":
    main()
