"""Submission files of CIRR and CIRCO, written and checked, and prediction files of any method, read for scoring.

Formats: Cuberick-Orion/CIRR, `Test-split_server.md`; miccunifi/CIRCO, README and `src/evaluation.py`. A ranking is a
sequence of gallery ids, best first.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from union_igrot.datasets.annotations import check_record
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.files import write_atomic
from union_igrot.storage.text import read_json
from union_igrot.types import Benchmark, Query


@final
@dataclass(frozen=True, slots=True)
class _SubmissionFormat:
    """What a file must contain: `header` are keys that are not query ids, `length` is the number of ids per query."""

    header: Mapping[str, str]
    length: int
    numbers: bool = False
    subset: bool = False


_CIRR = {
    "recall": _SubmissionFormat({"version": "rc2", "metric": "recall"}, 50),
    "recall_subset": _SubmissionFormat({"version": "rc2", "metric": "recall_subset"}, 3, subset=True),
}
_CIRCO = _SubmissionFormat({}, 50, numbers=True)
_SUFFIXES = (".png", ".jpg", ".jpeg")


def write_cirr(
    folder: str | Path,
    benchmark: Benchmark,
    rankings: Sequence[Sequence[str]],
    subset_rankings: Sequence[Sequence[str]],
) -> tuple[Path, Path]:
    """Write CIRR's two submission files, `cirr_recall.json` and `cirr_recall_subset.json`, into a folder.

    Args:
        folder: Created if missing.
        benchmark: CIRR, any split.
        rankings: For each query, in the benchmark's order, at least 50 ids. A reference among them is dropped.
        subset_rankings: For each query at least 3 ids of its subset.

    Raises:
        ConfigError: If the benchmark is not CIRR.
        DataError: If a ranking is too short or contains what it must not; nothing is written then.
    """
    _require_benchmark(benchmark, "cirr")
    first, second = (Path(folder, f"cirr_{name}.json") for name in _CIRR)
    recall = _content(first, benchmark, rankings, _CIRR["recall"])
    subset = _content(second, benchmark, subset_rankings, _CIRR["recall_subset"])
    _write(first, recall)
    _write(second, subset)
    return first, second


def write_circo(path: str | Path, benchmark: Benchmark, rankings: Sequence[Sequence[str]]) -> Path:
    """Write CIRCO's submission file; arguments and errors are as for `write_cirr`.

    A reference is kept or dropped as the benchmark's protocol says.
    """
    _require_benchmark(benchmark, "circo")
    _write(Path(path), _content(Path(path), benchmark, rankings, _CIRCO))
    return Path(path)


def check_submission(path: str | Path, benchmark: Benchmark) -> list[str]:
    """List what is wrong with a submission file of CIRR or CIRCO, a line for each problem, naming the key.

    Raises:
        ConfigError: If the benchmark has no submission file.
    """
    _require_benchmark(benchmark, "cirr", "circo")
    try:
        content = check_record(read_json(Path(path)), str(path)).fields
    except DataError as error:
        return [str(error)]
    metric = content.get("metric")
    if benchmark.name == "cirr" and (not isinstance(metric, str) or metric not in _CIRR):
        return [f"key 'metric': is {reprlib.repr(metric)}; expected one of {', '.join(_CIRR)}"]
    return _problems(content, benchmark, _CIRCO if benchmark.name == "circo" else _CIRR[str(metric)])


def read_predictions(path: str | Path, benchmark: Benchmark) -> list[list[str]]:
    """Read the rankings of any method, for scoring: an object of lists of ids by query id.

    Lists may have any length; ids may be strings or integers, with leading zeros or without. CIRR's two header keys are
    ignored.

    Returns:
        A list of gallery ids for each query, in the benchmark's order.

    Raises:
        DataError: If the file is invalid; a query has no list; or an id is unknown, repeated, or excluded by the
            protocol. Names the file and the key.
    """
    content = check_record(read_json(Path(path)), str(path)).fields
    queries = {query.id: query for query in benchmark.queries}
    extra = content.keys() - queries.keys() - ({"version", "metric"} if benchmark.name == "cirr" else set())
    if extra:
        raise DataError(f"{path}, key {min(extra)!r}: is not a query of {benchmark.name} ({benchmark.split})")
    known = {item.id for item in benchmark.gallery}
    rankings = []
    for query in benchmark.queries:
        place = f"{path}, key {query.id!r}"
        if query.id not in content:
            raise DataError(f"{place}: is missing; every query of {benchmark.name} ({benchmark.split}) needs a list")
        names = content[query.id]
        if not isinstance(names, list) or not names:
            raise DataError(f"{place}: is {reprlib.repr(names)}; expected a list of ids that is not empty")
        ranking = [_known_id(name, known) for name in names]
        problems = _list_problems(ranking, names, query, known, excluded=benchmark.protocol.exclude_reference)
        if problems:
            raise DataError(f"{place}: {problems[0]}; correct the file")
        rankings.append(ranking)
    return rankings


def _known_id(name: object, known: set[str]) -> str:
    text = str(name) if isinstance(name, str) or type(name) is int else ""
    short = text.lstrip("0") or "0"
    return text if text in known or not text.isdecimal() or short not in known else short


def _content(
    path: Path, benchmark: Benchmark, rankings: Sequence[Sequence[str]], spec: _SubmissionFormat
) -> dict[str, Any]:
    """Return what a file has to contain; rankings that the server would refuse are an error."""
    if len(rankings) != len(benchmark.queries):
        raise DataError(f"{len(rankings)} rankings for {len(benchmark.queries)} queries; pass one for each query")
    content: dict[str, Any] = dict(spec.header)
    for query, ranking in zip(benchmark.queries, rankings, strict=True):
        drop = query.exclude if benchmark.protocol.exclude_reference else ()
        names = [name for name in ranking if name not in drop][: spec.length]
        content[query.id] = [int(name) if spec.numbers and name.isdecimal() else name for name in names]
    if problems := _problems(content, benchmark, spec):
        more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(f"{path} was not written: {problems[0]}{more}; rank the whole gallery and try again")
    return content


def _problems(content: Mapping[str, Any], benchmark: Benchmark, spec: _SubmissionFormat) -> list[str]:
    """List everything that the server would refuse, key by key."""
    problems = [
        f"key {key!r}: is {reprlib.repr(content.get(key))}; expected {value!r}"
        for key, value in spec.header.items()
        if content.get(key) != value
    ]
    known = {item.id for item in benchmark.gallery}
    queries = {query.id: query for query in benchmark.queries}
    problems += [
        f"key {key!r}: is not a query of {benchmark.name} ({benchmark.split})"
        for key in content
        if key not in queries and key not in spec.header
    ]
    for query in benchmark.queries:
        problems += [f"key {query.id!r}: {problem}" for problem in _query_problems(content, query, known, spec)]
    return problems


def _query_problems(content: Mapping[str, Any], query: Query, known: set[str], spec: _SubmissionFormat) -> list[str]:
    if query.id not in content:
        return ["is missing; every query needs a list, without gaps"]
    names = content[query.id]
    if not isinstance(names, list):
        return [f"is {reprlib.repr(names)}; expected a list of {spec.length} ids"]
    problems = []
    if len(names) != spec.length:
        problems.append(f"has {len(names)} entries; expected exactly {spec.length}")
    kind, word = (int, "an integer") if spec.numbers else (str, "a text")
    invalid = [name for name in names if type(name) is not kind]
    if invalid:
        return [*problems, f"contains {reprlib.repr(invalid[0])}, which is not {word}"]
    problems += _list_problems([str(name) for name in names], names, query, known, excluded=True)
    outside = [name for name in names if spec.subset and name in known and name not in (query.subset or ())]
    outside = [name for name in outside if name not in query.exclude]
    if outside:
        problems.append(f"contains {outside[0]!r}, which is not in the query's subset")
    return problems


def _list_problems(
    ranking: Sequence[str], given: Sequence[object], query: Query, known: set[str], excluded: bool
) -> list[str]:
    problems = []
    unknown = [at for at, name in enumerate(ranking) if name not in known]
    if unknown:
        name = ranking[unknown[0]].lower()
        hint = " (names have no folder and no suffix)" if "/" in name or name.endswith(_SUFFIXES) else ""
        problems.append(f"contains {reprlib.repr(given[unknown[0]])}, which is not in the gallery{hint}")
    if len(set(ranking)) < len(ranking):
        twice = next(name for at, name in enumerate(ranking) if name in ranking[:at])
        problems.append(f"contains {twice!r} twice")
    inside = [name for name in query.exclude if name in ranking]
    if excluded and inside:
        problems.append(f"contains the reference {inside[0]!r}, which the protocol excludes")
    return problems


def _require_benchmark(benchmark: Benchmark, *names: str) -> None:
    if benchmark.name not in names:
        raise ConfigError(f"{benchmark.name} has no such submission file (expected {' or '.join(names)})")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); use another folder") from None
