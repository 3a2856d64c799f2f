"""Published results of other methods (`published.csv`), shown beside ours.

Each entry states where it was read and what is known of its protocol. Two metrics are comparable only if split,
gallery, text and convention agree. Results that nobody could look up again are not included.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import final

HIDDEN = ("cirr", "circo")
"""Benchmarks whose published results are of a split without public targets, so they are shown beside ours of `val`."""


@final
@dataclass(frozen=True, slots=True)
class Published:
    """What a method is published to reach on a benchmark.

    Attributes:
        method: The method's name.
        backbone: Its backbone.
        benchmark: Name of the benchmark, as in our results.
        split: Name of the split; `not stated` if the source does not say.
        metrics: Metrics in percent by name, as in our results.
        mark: `V` if it was read where the authors published it; `S` if in another paper's table.
        source: Where it was read.
        note: What is known of the protocol; may be empty.
    """

    method: str
    backbone: str
    benchmark: str
    split: str
    metrics: Mapping[str, float]
    mark: str
    source: str
    note: str = ""


@cache
def published_results() -> tuple[Published, ...]:
    """Return all published results, by benchmark."""
    found = []
    with (files("union_igrot.reporting") / "published.csv").open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            pairs = (pair.split("=") for pair in line.pop("metrics").split())
            found.append(Published(**line, metrics={name: float(value) for name, value in pairs}))
    return tuple(found)


def published_for(benchmark: str, split: str) -> list[Published]:
    """Return the published results to show beside ours on a benchmark.

    Returns:
        Those of the same split; for CIRR and CIRCO all of them, which are to be shown with their split.
    """
    return [
        one for one in published_results() if one.benchmark == benchmark and (one.split == split or benchmark in HIDDEN)
    ]
