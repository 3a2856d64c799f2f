"""Files of predictions: CIRR's and CIRCO's submissions written and checked, others' read for scoring.

Formats: Cuberick-Orion/CIRR, `Test-split_server.md`; miccunifi/CIRCO, README and `src/evaluation.py`. A ranking is a
sequence of gallery ids, best first. Does not know how a ranking came about.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from union_igrot.datasets.annotations import as_record, read_json
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.atomic import write_atomic
from union_igrot.types import Benchmark, Query

CIRR_VERSION = "rc2"
CIRCO_LENGTH = 50


@final
@dataclass(frozen=True, slots=True)
class _Format:
    """What a file must hold.

    Attributes:
        header: Keys that are no query, with their values.
        length: Number of ids a query.
        numbers: Whether ids are whole numbers.
        subset: Whether ids come from the query's subset.
    """

    header: Mapping[str, str]
    length: int
    numbers: bool = False
    subset: bool = False


_CIRR = {
    "recall": _Format({"version": CIRR_VERSION, "metric": "recall"}, 50),
    "recall_subset": _Format({"version": CIRR_VERSION, "metric": "recall_subset"}, 3, subset=True),
}
_CIRCO = _Format({}, CIRCO_LENGTH, numbers=True)


def write_cirr(
    folder: str | Path,
    benchmark: Benchmark,
    rankings: Sequence[Sequence[str]],
    subset_rankings: Sequence[Sequence[str]],
) -> tuple[Path, Path]:
    """Write CIRR's two submission files, `cirr_recall.json` and `cirr_recall_subset.json`.

    Args:
        folder: Where to; it is made if need be.
        benchmark: CIRR, any split.
        rankings: For each query, in the benchmark's order, 50 ids or more. A reference among them is dropped.
        subset_rankings: For each query 3 ids of its subset or more.

    Returns:
        The two files.

    Raises:
        ConfigError: Where the benchmark is not CIRR.
        DataError: Where a ranking is too short or holds what it must not. Nothing is written then.
    """
    _need(benchmark, "cirr")
    folder = Path(folder)
    contents = {}
    for form, rows in ((_CIRR["recall"], rankings), (_CIRR["recall_subset"], subset_rankings)):
        path = folder / f"cirr_{form.header['metric']}.json"
        contents[path] = {**form.header, **_answers(benchmark, rows, form)}
        _refuse(path, _problems(contents[path], benchmark, form))
    for path, content in contents.items():
        _write(path, content)
    first, second = contents
    return first, second


def write_circo(path: str | Path, benchmark: Benchmark, rankings: Sequence[Sequence[str]]) -> Path:
    """Write CIRCO's submission file.

    Args:
        path: The file; its folder is made if need be.
        benchmark: CIRCO, any split.
        rankings: For each query, in the benchmark's order, 50 ids or more. A reference is kept or dropped as the
            benchmark's protocol says.

    Returns:
        The file.

    Raises:
        ConfigError: Where the benchmark is not CIRCO.
        DataError: Where a ranking is too short or holds what it must not. Nothing is written then.
    """
    _need(benchmark, "circo")
    answers = _answers(benchmark, rankings, _CIRCO)
    content = {key: [int(name) if name.isdecimal() else name for name in names] for key, names in answers.items()}
    _refuse(Path(path), _problems(content, benchmark, _CIRCO))
    _write(Path(path), content)
    return Path(path)


def check_submission(path: str | Path, benchmark: Benchmark) -> list[str]:
    """Say what is wrong with a submission file.

    Args:
        path: The file. Which of CIRR's two it is, its header says.
        benchmark: CIRR or CIRCO, of the file's split.

    Returns:
        One line a problem, naming the key; empty where the file is right.

    Raises:
        ConfigError: Where the benchmark has no submission file.
    """
    _need(benchmark, "cirr", "circo")
    try:
        content = as_record(read_json(Path(path)), str(path)).fields
    except DataError as error:
        return [str(error)]
    if benchmark.name == "circo":
        return _problems(content, benchmark, _CIRCO)
    metric = content.get("metric")
    if not isinstance(metric, str) or metric not in _CIRR:
        return [f"key 'metric': is {reprlib.repr(metric)}; it must be one of {', '.join(_CIRR)}"]
    return _problems(content, benchmark, _CIRR[metric])


def read_predictions(path: str | Path, benchmark: Benchmark) -> list[list[str]]:
    """Read the rankings of any method, for scoring: an object of lists of ids by query id.

    Lists may have any length; ids may be strings or whole numbers, with leading zeros or without. CIRR's two header
    keys are passed over.

    Args:
        path: The file.
        benchmark: Whose queries were answered.

    Returns:
        A list of gallery ids for each query, in the benchmark's order.

    Raises:
        DataError: Where it is no such file; a query lacks an answer; or an id is unknown, stands twice, or is
            excluded by the protocol. Names the file and the key.
    """
    content = as_record(read_json(Path(path)), str(path)).fields
    queries = {query.id: query for query in benchmark.queries}
    extra = content.keys() - queries.keys() - ({"version", "metric"} if benchmark.name == "cirr" else set())
    if extra:
        raise DataError(f"{path}, key {min(extra)!r}: is no query of {benchmark.name} ({benchmark.split})")
    known = {item.id for item in benchmark.gallery}
    rankings = []
    for query in benchmark.queries:
        where = f"{path}, key {query.id!r}"
        if query.id not in content:
            raise DataError(f"{where}: is missing; every query of {benchmark.name} ({benchmark.split}) needs a list")
        names = content[query.id]
        if not isinstance(names, list) or not names:
            raise DataError(f"{where}: is {reprlib.repr(names)}; it must be a list of one id or more")
        ranking = [_plain(name, known) for name in names]
        faults = _list_problems(ranking, names, query, known, excluded=benchmark.protocol.exclude_reference)
        if faults:
            raise DataError(f"{where}: {faults[0]}; mend the file")
        rankings.append(ranking)
    return rankings


def _plain(name: object, known: set[str]) -> str:
    text = str(name) if isinstance(name, str) or type(name) is int else ""
    short = text.lstrip("0") or "0"
    return text if text in known or not text.isdecimal() or short not in known else short


def _answers(benchmark: Benchmark, rankings: Sequence[Sequence[str]], form: _Format) -> dict[str, list[str]]:
    if len(rankings) != len(benchmark.queries):
        raise DataError(f"{len(rankings)} rankings for {len(benchmark.queries)} queries; give one a query, in order")
    drop = benchmark.protocol.exclude_reference
    return {
        query.id: [name for name in names if not (drop and name in query.exclude)][: form.length]
        for query, names in zip(benchmark.queries, rankings, strict=True)
    }


def _problems(content: Mapping[str, Any], benchmark: Benchmark, form: _Format) -> list[str]:
    """List everything that a server would refuse, key by key."""
    problems = [
        f"key {key!r}: is {reprlib.repr(content.get(key))}; it must be {value!r}"
        for key, value in form.header.items()
        if content.get(key) != value
    ]
    known = {item.id for item in benchmark.gallery}
    queries = {query.id: query for query in benchmark.queries}
    problems += [
        f"key {key!r}: is no query of {benchmark.name} ({benchmark.split})"
        for key in content
        if key not in queries and key not in form.header
    ]
    for query in benchmark.queries:
        problems += [f"key {query.id!r}: {fault}" for fault in _query_problems(content, query, known, form)]
    return problems


def _query_problems(content: Mapping[str, Any], query: Query, known: set[str], form: _Format) -> list[str]:
    if query.id not in content:
        return ["is missing; every query needs a list, without gaps"]
    names = content[query.id]
    if not isinstance(names, list):
        return [f"is {reprlib.repr(names)}; it must be a list of {form.length} ids"]
    faults = []
    if len(names) != form.length:
        faults.append(f"has {len(names)} entries; it must have exactly {form.length}")
    kind, word = (int, "a whole number") if form.numbers else (str, "a text")
    strange = [name for name in names if type(name) is not kind]
    if strange:
        return [*faults, f"holds {reprlib.repr(strange[0])}, which is not {word}"]
    faults += _list_problems([str(name) for name in names], names, query, known, excluded=True)
    outside = [name for name in names if form.subset and name in known and name not in (query.subset or ())]
    outside = [name for name in outside if name not in query.exclude]
    if outside:
        faults.append(f"holds {outside[0]!r}, which is not in the query's subset")
    return faults


def _list_problems(
    ranking: Sequence[str], given: Sequence[object], query: Query, known: set[str], excluded: bool
) -> list[str]:
    faults = []
    unknown = [at for at, name in enumerate(ranking) if name not in known]
    if unknown:
        hint = " (names have no folder and no suffix)" if _has_suffix(ranking[unknown[0]]) else ""
        faults.append(f"holds {reprlib.repr(given[unknown[0]])}, which is not in the gallery{hint}")
    if len(set(ranking)) < len(ranking):
        twice = next(name for at, name in enumerate(ranking) if name in ranking[:at])
        faults.append(f"holds {twice!r} twice")
    inside = [name for name in query.exclude if name in ranking]
    if excluded and inside:
        faults.append(f"holds the reference {inside[0]!r}, which the protocol takes out")
    return faults


def _has_suffix(name: str) -> bool:
    return "/" in name or name.lower().endswith((".png", ".jpg", ".jpeg"))


def _need(benchmark: Benchmark, *names: str) -> None:
    if benchmark.name not in names:
        raise ConfigError(f"{benchmark.name} is not submitted this way; give a benchmark of {' or '.join(names)}")


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(f"{path} was not written: {problems[0]}{more}; rank the whole gallery and try again")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
