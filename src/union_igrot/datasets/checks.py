"""Whether anything can be told apart: checks of training triplets and benchmarks before a metric is computed."""

from collections.abc import Sequence

from union_igrot.errors import DataError
from union_igrot.types import Benchmark, TrainingSet

_REMEDY = {
    "sbir": "make every instance a class of its own, or assign at least two classes to each split in manifest.csv",
    "cir": "add rows with other targets, or list more images in gallery.txt",
}


def benchmark_warning(benchmark: Benchmark) -> str:
    """Describe why the metrics of a benchmark have no meaning; return an empty text if they may have one."""
    queries = [query for query in benchmark.queries if query.targets]
    if not queries:
        return ""
    targets = {id(query.targets): frozenset(query.targets) for query in queries}
    where = f"{benchmark.name} {benchmark.split}"
    classes = {query.label for query in queries}
    single = f"there is a single class, {next(iter(classes))!r}; " if len(classes) == 1 and None not in classes else ""
    gallery = frozenset(item.id for item in benchmark.gallery)
    protocol = benchmark.protocol

    def relevant_alone(index: int) -> bool:
        query = queries[index]
        candidates = frozenset(query.subset or ()) if protocol.candidates == "subset" else gallery
        candidates -= frozenset(query.exclude if protocol.exclude_reference else ())
        return candidates <= targets[id(query.targets)]

    if all(map(relevant_alone, range(len(queries)))):
        return f"{where}: {single}every candidate is relevant, so every ranking is perfect and the metrics mean nothing"
    if len(queries) > 1 and len(set(targets.values())) == 1:
        return (
            f"{where}: {single}all {len(queries):,} queries have the same targets, so a ranking that ignores the query "
            "can be perfect and the metrics mean nothing"
        )
    return ""


def refuse_indistinct(training: TrainingSet, benchmarks: Sequence[Benchmark]) -> None:
    """Check before training that there is something to learn and to measure.

    Args:
        training: The training triplets.
        benchmarks: What the model is selected by and tested on.

    Raises:
        DataError: If all triplets of a task have targets of one group, so that there are no negatives; or if the
            metrics of a benchmark have no meaning. Says what to do.
    """
    for task, remedy in _REMEDY.items():
        groups = {triplet.group for triplet in training.triplets if triplet.task == task}
        if len(groups) == 1:
            kind = "class" if task == "sbir" else "target"
            raise DataError(
                f"{training.name} train: all triplets have one {kind}, {next(iter(groups))!r}, so there is nothing to "
                f"tell apart; {remedy}"
            )
    for benchmark in benchmarks:
        if warning := benchmark_warning(benchmark):
            raise DataError(f"{warning}; {_REMEDY[benchmark.task]}")
