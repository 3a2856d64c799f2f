"""Metric names such as `R@10`, and the registry of the metric families behind them; imports no torch."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple, final

from union_igrot.errors import ConfigError

Reduction = Literal["mean", "minimum", "maximum"]
ENTRY_POINTS = "union_igrot.metrics"
"""Entry point group in which other packages offer a `MetricFamily`."""


@final
@dataclass(frozen=True)
class MetricFamily:
    """Metrics that differ in their cut-off k alone, such as `R@1` and `R@10`.

    Attributes:
        name: What a metric's name begins with.
        compute: Takes hit masks, the number of relevant candidates of each query, k and the options of `conventions`;
            returns one value per query, 0..1 or nan. Or `module:function`, imported at the first use.
        cutoff: Whether names have an `@k`; without one the whole ranking counts and `compute` gets None.
        ranking: Whether the hit masks are of the whole `gallery` or of each query's `subset`.
        conventions: Options of `compute` that a protocol decides, by name: `recall`, `precision_cut`, `ap_norm`
            or `ap_rule` of `types.Protocol`.
        first_target: Whether `Protocol.recall_targets` applies.
        describe: Returns a phrase on the conventions of a protocol, for captions; empty if there is nothing to say.
        reduction: If given, the values of each group of queries are reduced to one, and the metric is their mean.
        average: `protocol`, or `median` over queries whatever the protocol says.
        unit: `percent` of values 0..1, higher is better; or `rank`, a rank from 1, lower is better.
        expected: Like `compute` for rankings with ties: takes `metrics.functional.TieGroups`, k and the options, and
            returns the expected values, or None if there is no closed form. Without it, seeded orders are averaged.
    """

    name: str
    compute: Callable[..., Any] | str
    cutoff: Literal["required", "optional", "none"] = "required"
    ranking: Literal["gallery", "subset"] = "gallery"
    conventions: Mapping[str, str] = field(default_factory=dict)
    first_target: bool = False
    describe: Callable[[Any], str] | None = None
    reduction: Reduction | None = None
    average: Literal["protocol", "median"] = "protocol"
    unit: Literal["percent", "rank"] = "percent"
    expected: Callable[..., Any] | str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name, flags=re.ASCII):
            raise ConfigError(f"invalid name for a metric family: {self.name!r} (expected letters and digits)")
        unknown = set(self.conventions.values()) - {"recall", "precision_cut", "ap_norm", "ap_rule"}
        if unknown:
            raise ConfigError(f"metric family {self.name}: {sorted(unknown)} are no conventions of a protocol")

    @property
    def forms(self) -> list[str]:
        """The names of this family, with `k` as a placeholder."""
        plain = [] if self.cutoff == "required" else [self.name]
        return plain + ([] if self.cutoff == "none" else [f"{self.name}@k"])

    def function(self) -> Callable[..., Any]:
        """Return `compute`, imported if necessary."""
        return resolve_name(self.compute) if isinstance(self.compute, str) else self.compute

    def options(self, protocol: Any) -> dict[str, Any]:
        """Return the options of `compute` under a protocol."""
        return {option: getattr(protocol, convention) for option, convention in self.conventions.items()}

    def expected_function(self) -> Callable[..., Any] | None:
        """Return `expected`, imported if necessary."""
        return resolve_name(self.expected) if isinstance(self.expected, str) else self.expected


class ParsedMetric(NamedTuple):
    """The name of a metric, taken apart; `k` is None if the whole ranking counts."""

    kind: str
    k: int | None

    @property
    def family(self) -> MetricFamily:
        """The family of this metric."""
        return _FAMILIES[self.kind]

    def ranking(self, protocol: Any) -> Literal["gallery", "subset", "first"]:
        """Return what is ranked: the gallery, each query's subset, or the gallery for its first target alone."""
        first = self.family.first_target and protocol.recall_targets == "first"
        return "first" if first else self.family.ranking


def _recall(protocol: Any) -> str:
    return "R@k is the share of the targets found" if protocol.recall == "fraction" else ""


def _precision(protocol: Any) -> str:
    cuts = {"k": "", "relevant": "P@k over the first min(k, R)", "attainable": "P@k divided by min(k, R)"}
    return cuts[protocol.precision_cut]


def _average_precision(protocol: Any) -> str:
    norm = {"min": "min(k, R)", "hits": "hits in the top k", "all": "R"}[protocol.ap_norm]
    return f"AP divided by {norm}, {protocol.ap_rule} rule"


def _group_recall(_: Any) -> str:
    return "groupR@k is the share of groups with a query that finds a target"


def _family(name: str, function: str, **options: Any) -> MetricFamily:
    """Declare a family by its two functions in `functional`."""
    compute = f"union_igrot.metrics.functional:{function}"
    return MetricFamily(name, compute, expected=f"union_igrot.metrics.functional:expected_{function}", **options)


_MODE = {"mode": "recall"}
_AREA = {"cutoff": "optional", "conventions": {"norm": "ap_norm", "rule": "ap_rule"}}
_RANK = {"cutoff": "none", "unit": "rank"}
_FAMILIES: dict[str, MetricFamily] = {
    family.name: family
    for family in (
        _family("R", "recall_at_k", conventions=_MODE, first_target=True, describe=_recall),
        _family("Rs", "recall_at_k", conventions=_MODE, ranking="subset"),
        _family("P", "precision_at_k", conventions={"cut": "precision_cut"}, describe=_precision),
        _family("mAP", "average_precision", describe=_average_precision, **_AREA),
        _family("hit", "recall_at_k"),
        _family("groupR", "recall_at_k", describe=_group_recall, reduction="maximum"),
        _family("mmAP", "average_precision", reduction="mean", **_AREA),
        _family("minmAP", "average_precision", reduction="minimum", **_AREA),
        _family("MeanRank", "first_rank", **_RANK),
        _family("MedianRank", "first_rank", average="median", **_RANK),
    )
}


def metric_families() -> tuple[MetricFamily, ...]:
    """Return all registered metric families."""
    return tuple(_FAMILIES.values())


def register_metric(family: MetricFamily) -> None:
    """Make a metric family available to protocols; a package can do the same with an entry point.

    Raises:
        ConfigError: If another family has the name.
    """
    if _FAMILIES.setdefault(family.name, family) != family:
        raise ConfigError(f"a metric family named {family.name} exists already; choose another name")


def parse_metric(name: str) -> ParsedMetric:
    """Parse the name of a metric, as `types.Protocol` writes it.

    Args:
        name: `R@k`, `Rs@k` (recall within the query's subset), `P@k`, `mAP`, `mAP@k` with an integer k >= 1, or a
            name of a registered family.

    Raises:
        ConfigError: If no family has such a name.
    """
    parsed = _split_name(name)
    if parsed is None:
        for entry in entry_points(group=ENTRY_POINTS):
            register_metric(entry.load())
        parsed = _split_name(name)
    if parsed is None:
        forms = ", ".join(form for family in metric_families() for form in family.forms)
        raise ConfigError(f"unknown metric {name!r} (expected {forms} with an integer k >= 1, such as R@10)")
    return parsed


def families_of(names: Iterable[str]) -> list[MetricFamily]:
    """Return the families of some metrics, without repetitions; unknown names are skipped."""
    kinds = {name.partition("@")[0] for name in names}
    return [family for family in metric_families() if family.name in kinds]


def family_of(name: str) -> MetricFamily | None:
    """Return the family of a metric; None if it is a mean of several or not known here."""
    return _FAMILIES.get(name.partition("@")[0])


def is_rank(name: str) -> bool:
    """Return whether a metric is a rank, of which lower is better, and not a percentage."""
    family = family_of(name)
    return family is not None and family.unit == "rank"


def unit_of(name: str) -> str:
    """Return the unit of a metric as results name it."""
    return "rank" if is_rank(name) else "percent"


def scale_of(name: str) -> int:
    """Return by what a value of a query is multiplied for people: 100 for percent, 1 for ranks."""
    return 1 if is_rank(name) else 100


def _split_name(name: str) -> ParsedMetric | None:
    match = re.fullmatch(r"(\w+?)(?:@([1-9][0-9]*))?", name, flags=re.ASCII)
    family = _FAMILIES.get(match[1]) if match else None
    if match is None or family is None:
        return None
    refused = "required" if match[2] is None else "none"
    return None if family.cutoff == refused else ParsedMetric(family.name, None if match[2] is None else int(match[2]))
