"""`union-check`: check whether the files of a dataset are complete, and show what would be trained and tested on."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot.cli.command import run_command
from union_igrot.cli.config import plain
from union_igrot.errors import UnionError

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXIT_INCOMPLETE = 1
"""Exit code if anything is missing, broken, or differs from the official counts."""
_LISTED = 10
_DIFFERENT = "differs from the official files; download the annotations again"
_Row = tuple[Sequence[str], str]
"""The cells of a row, and what is wrong with it."""


def check(config: "DictConfig", _: Path) -> None:
    """Print a row for each split and part of a dataset; exit with 1 if one is not complete."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from union_igrot.terminal import TerminalConsole, print_line

    data = plain(config.data)
    if data["name"] == "shapes":
        print_line("shapes is generated; it has no files to check")
        return
    parts = 1 if data["name"] == "folder" else 2  # columns that name a row
    head, rows, notes = _check_folder(data["root"]) if data["name"] == "folder" else _check_benchmark(data)
    table = Table(*head, "state", title=f"{data['name']} in {data['root'] or '$UNION_DATA'}", box=box.SIMPLE_HEAD)
    for cells, problem in rows:
        state = Text("incomplete", style="red") if problem else Text("complete", style="green")
        table.add_row(*map(Text, cells), state)
    TerminalConsole().print(table)
    shown = [" ".join(filter(None, cells[:parts])) + f": {problem}" for cells, problem in rows if problem]
    for note in [*shown, *notes]:
        print_line(note)
    if any(problem for _, problem in rows):
        raise SystemExit(EXIT_INCOMPLETE)


def _check_benchmark(data: Mapping[str, Any]) -> tuple[Sequence[str], list[_Row], list[str]]:
    from union_igrot.datasets.registry import find_benchmark

    declaration = find_benchmark(data["name"])
    expected = dict(declaration.expected_counts)
    if declaration.trainable and not any(split == "train" for split, _ in expected):
        expected |= {("train", next(iter(part.values()), "")): (None, None) for part in declaration.parts}
    key = next(iter(declaration.parts[0]), "")
    rows: list[_Row] = []
    for (split, part), official in expected.items():
        found, problem = _count(data, split, {key: part} if part else {})
        if not problem and any(count not in (None, number) for count, number in zip(official, found, strict=True)):
            problem = _DIFFERENT
        counts = zip(found, official, strict=True)
        cells = [f"{number:,}" + (f" of {count:,}" if count else "") for number, count in counts]
        rows.append(((split, part, *cells), problem))
    return ("split", "part", "queries", "gallery"), rows, [declaration.source] * any(problem for _, problem in rows)


def _count(data: Mapping[str, Any], split: str, part: dict[str, str]) -> tuple[tuple[int, int], str]:
    """Return the numbers of queries and gallery images, and what is wrong with them."""
    from union_igrot.datasets.loading import load_benchmark

    found = (0, 0)
    for check_images in (False, True):  # so that annotations are counted although images are missing
        try:
            benchmark = load_benchmark(data["name"], data["root"], split, check_images, **part)
            found = (len(benchmark.queries), len(benchmark.gallery))
        except UnionError as error:
            return found, str(error)
    return found, ""


def _check_folder(root: str) -> tuple[Sequence[str], list[_Row], list[str]]:
    from union_igrot.datasets.folder import (
        SPLITS,
        folder_benchmark,
        folder_training,
        read_folder,
        unusable_images,
    )
    from union_igrot.datasets.loading import benchmark_warning, refuse_indistinct

    folder = read_folder(root)
    rows: list[_Row] = []
    notes, broken = [folder.note], dict[str, str]()
    for split in SPLITS:
        items = folder.splits[split]
        labels = sorted({item.key for item in items})
        if folder.is_composed:
            paths = {path for row in items for path in (row.key, *row.targets)}
            paths |= set(folder.gallery or ()) if split != "train" else set()
            cells = [f"{len(items):,}", f"{len(paths):,}"]
        else:
            paths, sketches = {item.id for item in items}, sum(item.is_sketch for item in items)
            cells = [f"{len(labels):,}", f"{sketches:,}", f"{len(items) - sketches:,}"]
            notes.append(f"{split}: {', '.join(labels)}")
        broken |= unusable_images(folder.root, sorted(paths - broken.keys()), decode=True)
        missing = len(paths & broken.keys())
        problem = f"{missing:,} images missing or broken" if missing else ""
        try:  # what training or evaluation would refuse
            if split == "train":
                refuse_indistinct(folder_training(root, on_missing="skip"), [])
            else:
                problem = benchmark_warning(folder_benchmark(root, split, on_missing="skip")) or problem
        except UnionError as error:
            problem = str(error)
        rows.append(((split, *cells), problem))
    listed = [f"  {reason}" for _, reason in sorted(broken.items())]
    more = [f"  and {len(listed) - _LISTED:,} more"] * (len(listed) > _LISTED)
    head = ("split", "triplets", "images") if folder.is_composed else ("split", "classes", "sketches", "photos")
    return head, rows, [*notes, *listed[:_LISTED], *more]


main = partial(run_command, "check", check)
if __name__ == "__main__":
    main()
