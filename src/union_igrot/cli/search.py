"""`union-search`: find images of a gallery, printed as tables or JSON lines."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot.cli.command import check_output, run_command, writes_output
from union_igrot.errors import ConfigError, escape_controls
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.gallery.queries import QueryLine
    from union_igrot.gallery.results import SearchResult
    from union_igrot.reporting.contact_sheets import SheetRow

EXIT_NO_HITS = 1  # exit code if no query has hits
SHEET_QUERIES = 12  # queries on a contact sheet
_BATCH = 256
_FIELDS = ("image", "text", "vector", "terms", "liked", "disliked", "exclude")
_NARROW = 50  # a terminal with fewer characters shows no columns beside the image


def search(config: "DictConfig", _: Path) -> None:
    """Search as configured; exit with 1 if there are no hits."""
    _check(config)
    from union_igrot.gallery.engines.factory import uri_scheme
    from union_igrot.gallery.gallery import Gallery
    from union_igrot.gallery.ingest.entries import ADDED_SOURCE
    from union_igrot.gallery.results import is_missing
    from union_igrot.terminal import progress_bar

    lines = _query_lines(config)
    count, missing = 0, list[str]()
    far: list[tuple[QueryLine, SearchResult]] = []
    sheet: list[SheetRow] = []
    options = {"create": False, **{name: config[name] for name in ("weights", "device", "preprocess")}}
    with Gallery.open(config.index, config.checkpoint, **options) as gallery:
        # On a terminal, a bar would be among the tables, which show the progress.
        shown = config.progress and len(lines) > _BATCH and not sys.stdout.isatty()
        with progress_bar(shown=shown) as bar:
            task = bar.add_task("searching", total=len(lines))
            for at in range(0, len(lines), _BATCH):
                some = lines[at : at + _BATCH]
                results = gallery.search_many(
                    [line.query for line in some],
                    config.k,
                    config.where,
                    mode=config.search,
                    min_score=config.min_score,
                    offset=config.offset,
                    names=[line.location for line in some],
                )
                for line, result in zip(some, results, strict=True):
                    count += len(result)
                    far += [(line, result)] if result.nothing_near else []
                    listed = [hit.id for hit in result if hit.columns.get("source") != ADDED_SOURCE]
                    missing += filter(is_missing, listed)  # the id of an image that was added alone may be no path
                    _print_result(config, line, result)
                    if config.contact is not None and len(sheet) < SHEET_QUERIES:
                        sheet.append(_sheet_line(line, result))
                bar.advance(task, len(some))
    if config.contact is not None:
        from union_igrot.reporting.contact_sheets import contact_sheet

        with writes_output("contact", expand_user(config.contact)):
            contact_sheet(expand_user(config.contact), sheet)
        if len(lines) > len(sheet):
            sys.stderr.write(f"{config.contact} shows the first {len(sheet)} of {len(lines)} queries\n")
    if missing and not uri_scheme(config.index):
        sys.stderr.write(
            f"{len(missing):,} results no longer exist on this disk, such as {missing[0]!r}; run union-index on their "
            "folder again, or remove their rows with union-index remove=FILTER\n"
        )
    if far:
        line, result = far[0]
        of = "" if config.queries is None else f" for {len(far)} of {len(lines)} queries, such as {line.name}"
        best = f"the best score is {result.best_score:.4f}, below min_score={result.min_score:.4f}"
        sys.stderr.write(f"nothing near{of}: {best}\n")
    elif not count:
        sys.stderr.write("no hits\n")
    if not count:
        raise SystemExit(EXIT_NO_HITS)


def _check(config: "DictConfig") -> None:
    """Refuse settings that contradict each other."""
    single = [name for name in _FIELDS if config[name]]
    if config.queries is not None and single:
        raise ConfigError(f"{single[0]}= and queries= are both given; put {single[0]} into the lines of the file")
    if config.queries is None and not set(single) - {"disliked", "exclude"}:
        raise ConfigError(
            "the query is empty (expected image=FILE, text=TEXT, both, terms=TERM, liked=ID or queries=FILE)"
        )
    if config.contact is not None:
        check_output("contact", config.contact, ".png")


def _query_lines(config: "DictConfig") -> "list[QueryLine]":
    from union_igrot.gallery.queries import make_query_line, read_queries

    if config.queries is not None:
        return read_queries(expand_user(config.queries))
    return [make_query_line({name: config[name] for name in _FIELDS if config[name]})]


def _print_result(config: "DictConfig", line: "QueryLine", result: "SearchResult") -> None:
    if config.format == "jsonl" or (config.format == "auto" and not sys.stdout.isatty()):
        for rank, hit in enumerate(result, 1 + config.offset):
            columns = {name: value for name, value in hit.columns.items() if not isinstance(value, bytes)}
            row = {"query": line.name, "rank": rank, "id": hit.id, "score": round(hit.score, 6), "columns": columns}
            sys.stdout.write(_json_line(row))
        return
    from union_igrot.gallery.ingest.entries import OWN_COLUMNS
    from union_igrot.gallery.results import hit_table
    from union_igrot.terminal import TerminalConsole

    colored: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"} if config.thumbnails == "on" else {}
    console = TerminalConsole(**colored)
    thumbnails = config.thumbnails == "on" or (config.thumbnails == "auto" and console.color_system == "truecolor")
    columns = dict.fromkeys(name for hit in result for name, value in hit.columns.items() if value is not None)
    title = _describe(line.query) if config.queries is None else f"{line.name}: {_describe(line.query)}"
    own = [name for name in columns if name not in OWN_COLUMNS and console.width >= _NARROW]
    console.print(hit_table(result, own, title=title, thumbnails=thumbnails, first_rank=1 + config.offset))


def _json_line(row: dict[str, Any]) -> str:
    """Return a line of JSON: in ASCII if a terminal would interpret a character, or the encoding lacks it."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"
    return (text if text == escape_controls(text) else json.dumps(row)) + "\n"


def _describe(query: dict[str, Any]) -> str:
    from union_igrot.gallery.queries import describe_term

    parts = [str(image) for image in query.get("image", ())]
    parts += [f"{query['text']!r}"] if query.get("text") else []
    parts += ["an embedding"] if query.get("vector") is not None else []
    parts += [describe_term(term) for term in query.get("terms", ())]
    parts += [f"{len(query[name])} {name}" for name in ("liked", "disliked") if query.get(name)]
    return " + ".join(parts)


def _sheet_line(line: "QueryLine", result: "SearchResult") -> "SheetRow":
    from union_igrot.images.decode import open_region
    from union_igrot.reporting.contact_sheets import SheetRow

    given = (*line.query.get("image", ()), *(image for term in line.query.get("terms", ()) for image in term.images))
    images = [open_region(image, at_least=256) for image in given]
    return SheetRow(_describe({**line.query, "image": ()}), images, [(hit.score, hit.thumbnail) for hit in result])


main = partial(run_command, "search", search)
if __name__ == "__main__":
    main()
