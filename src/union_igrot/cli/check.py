"""`union-check`: what of a public benchmark is there, what is missing and where it comes from.

Knows expected counts and the readers. Does not know models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command

EXIT_INCOMPLETE = 1
"""Exit code where anything is missing or differs from the official counts."""

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-check`."""
    run_command("check", check, argv)


def check(config: "DictConfig", fresh: Path) -> None:
    """Print a line for each split and part of a benchmark; end with code 1 where one is not complete."""
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from rich.table import Table
    from rich.text import Text

    from union_igrot.datasets.loading import load_benchmark
    from union_igrot.datasets.registry import benchmark_names, find_benchmark
    from union_igrot.errors import ConfigError, UnionError
    from union_igrot.terminal import TerminalConsole, print_line

    del fresh
    name = config.data.name
    if name not in benchmark_names():
        raise ConfigError(f"data={name} is not a public benchmark; choose one of {', '.join(benchmark_names())}")
    declaration = find_benchmark(name)
    root = config.data.root
    table = Table("split", "part", "queries", "gallery", "state", title=f"{name} in {root or '$UNION_DATA'}")
    key = next(iter(declaration.parts[0]), "")
    complete = True
    for (split, part), expected in declaration.expected_counts.items():
        options = {key: part} if part else {}
        state, found = "", (0, 0)
        for images in (False, True):
            try:
                benchmark = load_benchmark(name, root, split, images, **options)
                found = (len(benchmark.queries), len(benchmark.gallery))
            except UnionError as error:
                state = str(error)
                break
        cells = []
        for count, wanted in zip(found, expected, strict=True):
            cells.append(f"{count:,}" + (f" of {wanted:,}" if wanted else ""))
            if not state and wanted and count != wanted:
                state = "another number than the official files hold; fetch the annotations again"
        complete &= not state
        table.add_row(split, part, *cells, Text(state or "complete", style="red" if state else "green"))
    TerminalConsole().print(table)
    if not complete:
        print_line(declaration.source)
        raise SystemExit(EXIT_INCOMPLETE)
