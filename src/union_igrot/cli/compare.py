"""`union-compare`: the statistical significance of the difference between two runs, query by query."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-compare`."""
    run_command("compare", compare, argv)


def compare(config: "DictConfig", fresh: Path) -> None:
    """Print a table of paired differences, first - second, for each benchmark of both runs."""
    # Heavy imports are delayed so that --help and usage errors are fast.
    from union_igrot.errors import DataError
    from union_igrot.evaluation.results import read_query_values
    from union_igrot.evaluation.tables import Cell, ResultTable, TableRow, print_table
    from union_igrot.metrics.statistics import paired_interval, randomization_test
    from union_igrot.terminal import TerminalConsole, print_line

    del fresh
    folders = [expand_user(config[side]) for side in ("first", "second")]
    held = [{path.name for path in folder.glob("queries-*.safetensors")} for folder in folders]
    if not held[0] & held[1]:
        raise DataError(f"{folders[0]} and {folders[1]} have no benchmark in common; evaluate both on the same data")
    for name in sorted(held[0] & held[1]):
        (one, first), (other, second) = (read_query_values(folder / name) for folder in folders)
        if one != other:
            raise DataError(f"{name}: the queries of the two runs differ; evaluate both on the same data")
        title = name.removeprefix("queries-").removesuffix(".safetensors")
        rows = []
        for key in (key for key in first if key.startswith(f"{config.method}/") and key in second):
            gap = paired_interval(first[key], second[key], seed=config.seed)
            chance = randomization_test(first[key], second[key], config.rounds, config.seed)
            means = [f"{100 * side[key].nanmean().item():.2f}" for side in (first, second)]
            spread = f"{100 * gap.mean:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]"
            rows.append(
                TableRow(key.removeprefix(f"{config.method}/"), list(map(Cell, [*means, spread, f"{chance:.4f}"])))
            )
        head = list(map(Cell, ["metric", "first", "second", "first - second [95 %]", "p"]))
        print_line(f"{title} · {config.method}\n", style="bold")
        print_table(ResultTable(title, head, rows), TerminalConsole())
