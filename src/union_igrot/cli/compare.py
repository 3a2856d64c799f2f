"""`union-compare`: the statistical significance of the difference between two runs, query by query."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compare(config: "DictConfig", _: Path) -> None:
    """Print a table of paired differences, first - second, and a verdict for each benchmark of both runs."""
    from union_igrot.errors import DataError
    from union_igrot.evaluation.results import read_query_values
    from union_igrot.evaluation.tables import compare_queries, print_table
    from union_igrot.terminal import TerminalConsole, print_line

    folders = [expand_user(config[side]) for side in ("first", "second")]
    held = [{path.name for path in folder.glob("queries-*.safetensors")} for folder in folders]
    for folder, files in zip(folders, held, strict=True):
        if not files:
            raise DataError(f"{folder}: has no queries-*.safetensors; pass the folder of a finished run")
    if not held[0] & held[1]:
        raise DataError(f"{folders[0]} and {folders[1]} have no benchmark in common; evaluate both on the same data")
    names = _distinct_names(*folders)
    for file in sorted(held[0] & held[1]):
        first, second = (read_query_values(folder / file) for folder in folders)
        if first.identity != second.identity:
            raise DataError(f"{file}: the queries of the two runs differ; evaluate both on the same data")
        benchmark, split = file.removeprefix("queries-").removesuffix(".safetensors").rsplit("-", 1)
        table, verdict = compare_queries(first, second, names, config.method, config.rounds, config.seed)
        count = len(next(iter(first.values.values())))
        print_line(f"{benchmark} · {split} · {count:,} queries · {config.method}\n", style="bold")
        print_table(table, TerminalConsole())
        print_line(f"{verdict}\n")


def _distinct_names(first: Path, second: Path) -> tuple[str, str]:
    """Return the last parts of two paths, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in (first, second)]
    longest = max(map(len, parts))
    depth = next((n for n in range(1, longest) if parts[0][-n:] != parts[1][-n:]), 1)
    return "/".join(parts[0][-depth:]), "/".join(parts[1][-depth:])


main = partial(run_command, "compare", compare)
if __name__ == "__main__":
    main()
