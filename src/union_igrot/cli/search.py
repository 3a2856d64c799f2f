"""`union-search`: find images of a gallery, shown as a table or as JSON lines.

Knows what is printed where. Does not know how anything is embedded or found.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from union_igrot.cli.command import run_command
from union_igrot.errors import ConfigError
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from rich.console import Console

    from union_igrot.gallery.query_files import Line
    from union_igrot.gallery.results import SearchResult
    from union_igrot.reporting.contact_sheets import SheetRow

EXIT_NOTHING = 1
"""Exit code where no query found anything."""
EXIT_UNREAD = 141
"""Exit code where the reader of the output went away, as shells have it for SIGPIPE."""
LITERAL = ("index", "text", "where", "queries", "contact", "checkpoint", "weights")
SEVERAL = ("image", "liked", "disliked", "exclude")
SHEET_QUERIES = 12
"""Queries on a contact sheet."""
_STEP = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-search`."""
    run_command("search", search, argv, literal=LITERAL, several=SEVERAL)


def search(config: DictConfig, fresh: Path) -> None:
    """Search as configured; end with code 1 where nothing was found."""
    del fresh
    _check(config)
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from rich.console import Console

    from union_igrot.gallery.gallery import Gallery
    from union_igrot.progress import progress_bar

    lines = _lines(config)
    said = Console(stderr=True)
    count = 0
    sheet: list[SheetRow] = []
    chosen = {"create": False, "weights": config.weights, "device": config.device}
    with Gallery.open(config.index, config.checkpoint, **chosen) as gallery:
        # Among tables on one terminal a bar would be in the way, and they show how far it is.
        shown = config.progress and len(lines) > _STEP and not sys.stdout.isatty()
        with _output(), progress_bar(shown=shown) as bar:
            task = bar.add_task("searching", total=len(lines))
            for at in range(0, len(lines), _STEP):
                some = lines[at : at + _STEP]
                answers = gallery.search_many(
                    [line.asked for line in some],
                    config.k,
                    config.where,
                    mode=config.search,
                    names=[line.place for line in some],
                )
                for line, found in zip(some, answers, strict=True):
                    count += len(found)
                    _show(config, line, found, many=config.queries is not None)
                    if config.contact is not None and len(sheet) < SHEET_QUERIES:
                        sheet.append(_sheet_line(line, found))
                bar.advance(task, len(some))
    if config.contact is not None:
        _draw(_path(config.contact), sheet, len(lines), said)
    if not count:
        said.print("nothing found", highlight=False)
        raise SystemExit(EXIT_NOTHING)


def _check(config: DictConfig) -> None:
    """Refuse what contradicts itself."""
    single = [name for name in ("image", "text", "liked", "disliked", "exclude") if config[name]]
    if config.queries is not None and single:
        raise ConfigError(
            f"{single[0]}= and queries= are both given; put it into the lines of the file, or leave queries= out"
        )
    if config.queries is None and not (config.image or config.text or config.liked):
        raise ConfigError("nothing is asked; give image=FILE, text=TEXT, both, liked=ID or queries=FILE")
    if config.contact is not None and not config.contact.lower().endswith(".png"):
        raise ConfigError(f"contact={config.contact} is not allowed; give a file that ends in .png")
    if config.contact is not None and not _path(config.contact).absolute().parent.is_dir():
        raise ConfigError(f"contact={config.contact}: the folder {_path(config.contact).parent} does not exist")


def _lines(config: DictConfig) -> "list[Line]":
    """Return what is asked, whether on the command line or in a file."""
    from union_igrot.gallery.query_files import Line, read_queries
    from union_igrot.images.decode import check_image

    if config.queries is not None:
        return read_queries(_path(config.queries))
    images = [_path(image) for image in config.image]
    for image in images:
        check_image(image)
    ids = {name: list(config[name]) for name in ("liked", "disliked", "exclude")}
    return [Line(1, {"image": images, "text": config.text, **ids})]


def _path(typed: str) -> Path:
    return expand_user(typed)


@contextmanager
def _output() -> Iterator[None]:
    """End in peace where the reader of the output goes away (`| head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails
        raise SystemExit(EXIT_UNREAD) from None


def _show(config: DictConfig, line: "Line", found: "SearchResult", *, many: bool) -> None:
    """Print the answers to one query."""
    if config.format == "jsonl" or (config.format == "auto" and not sys.stdout.isatty()):
        for rank, hit in enumerate(found, 1):
            columns = {name: value for name, value in hit.columns.items() if not isinstance(value, bytes)}
            row = {"query": line.name, "rank": rank, "id": hit.id, "score": round(hit.score, 6), "columns": columns}
            sys.stdout.write(_json_line(row))
        return
    from union_igrot.gallery.display import hit_table
    from union_igrot.gallery.ingest.entries import OWN_COLUMNS

    console = _console(config.thumbnails)
    images = config.thumbnails == "on" or (config.thumbnails == "auto" and console.color_system == "truecolor")
    named = dict.fromkeys(name for hit in found for name, value in hit.columns.items() if value is not None)
    title = f"{line.name}: {_words(line.asked)}" if many else _words(line.asked)
    own = [name for name in named if name not in OWN_COLUMNS]
    console.print(hit_table(found, own, title=title, thumbnails=images))


def _json_line(row: dict[str, Any]) -> str:
    """Write a line of JSON; in ASCII where the output's encoding lacks a letter."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    return f"{text}\n"


def _console(thumbnails: str) -> "Console":
    from rich.console import Console

    class Piped(Console):
        """Leaves it to `_output` what happens where nobody reads any more."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Piped(force_terminal=True, color_system="truecolor") if thumbnails == "on" else Piped()


def _words(asked: dict[str, Any]) -> str:
    """Say a query in one line."""
    parts = [str(image) for image in asked.get("image", ())]
    parts += [f"{asked['text']!r}"] if asked.get("text") else []
    parts += [f"{len(asked[name])} {name}" for name in ("liked", "disliked") if asked.get(name)]
    return " + ".join(parts)


def _sheet_line(line: "Line", found: "SearchResult") -> "SheetRow":
    from union_igrot.images.decode import as_image
    from union_igrot.reporting.contact_sheets import SheetRow

    images = [as_image(image, at_least=256) for image in line.asked.get("image", ())]
    return SheetRow(_words({**line.asked, "image": ()}), images, [(hit.score, hit.thumbnail) for hit in found])


def _draw(path: Path, sheet: "list[SheetRow]", queries: int, said: "Console") -> None:
    from union_igrot.errors import DataError
    from union_igrot.reporting.contact_sheets import contact_sheet

    try:
        contact_sheet(path, sheet)
    except OSError as error:
        raise DataError(f"contact={path} cannot be written ({error.strerror}); give another place") from error
    if queries > len(sheet):
        said.print(f"{path} shows the first {len(sheet)} of {queries} queries", highlight=False, markup=False)


if __name__ == "__main__":
    main()
