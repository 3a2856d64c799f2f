"""Values that all packages share: queries, galleries, benchmarks, training triplets, features and scores."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, Protocol as Interface, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from union_igrot.errors import DataError

Task = Literal["cir", "sbir"]
ApNorm = Literal["min", "hits", "all"]
ApRule = Literal["step", "trapezoid", "voc"]
Average = Literal["micro", "macro"]
RecallMode = Literal["any", "fraction"]
PrecisionCut = Literal["k", "relevant", "attainable"]


@runtime_checkable
class LazyImage(Interface):
    """An image that is not simply a file: generated, cropped, held in memory.

    Attributes:
        key: Identity. Two images with equal keys have equal pixels.
    """

    @property
    def key(self) -> str:
        """Its identity, so that equal keys mean equal pixels."""
        ...

    def open(self) -> Image.Image:
        """Return the decoded image in RGB mode."""
        ...


@dataclass(frozen=True, slots=True)
class NoImage:
    """The image of a query that is a text alone: models embed the text, people see white."""

    key: str = "no image"

    def open(self) -> Image.Image:
        """Return a white image."""
        return Image.new("RGB", (224, 224), "white")


ImageSource = Path | LazyImage
"""Where an image comes from, a file or a `LazyImage`."""


_REPR = Repr()
_REPR.maxstring, _REPR.maxtuple = 30, 2


def _short(value: object) -> str:
    """Return a short form of an id, a text or an image source for a `repr`."""
    if isinstance(value, Path):
        value = value.name
    elif value is not None and not isinstance(value, str | tuple):
        value = getattr(value, "key", type(value).__name__)
    return _REPR.repr(value)


@dataclass(frozen=True, slots=True)
class Query:
    """A query to a gallery.

    Attributes:
        id: Unique within its benchmark.
        image: The reference image: a photo or a sketch.
        text: The modification text, or None. Several wordings of it are embedded one by one, and their embeddings
            averaged.
        targets: Ids of the relevant gallery images. Empty on hidden test splits.
        exclude: Gallery ids that are never ranked for this query (its own reference image).
        subset: Gallery ids of the query's subset ranking (CIRR), or None.
        label: Class of the query, for averages by class, or None.
        tags: Names of groups the query is also reported under (edit types, aspects).
    """

    id: str
    image: ImageSource
    text: str | tuple[str, ...] | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    subset: tuple[str, ...] | None = None
    label: str | None = None
    tags: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Query({_short(self.id)}, {_short(self.image)}, text={_short(self.text)}, {len(self.targets)} targets)"

    @property
    def wordings(self) -> tuple[str | None, ...]:
        """The wordings of the text; a single one, which may be None, unless it has several."""
        return self.text if isinstance(self.text, tuple) else (self.text,)


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A gallery image.

    Attributes:
        id: Unique within its gallery.
        image: The image.
        label: Its class, or None.
        caption: A text shown to people; never given to a model.
    """

    id: str
    image: ImageSource
    label: str | None = None
    caption: str | None = None

    def __repr__(self) -> str:
        return f"GalleryItem({_short(self.id)}, {_short(self.image)}, label={_short(self.label)})"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a benchmark is scored; printed next to every metric.

    Attributes:
        name: Name of the preset, `official` unless another convention was chosen.
        metrics: Names of the metrics, `R@k`, `Rs@k` (subset), `P@k`, `mAP`, `mAP@k`.
        primary: The metric by which models are compared and chosen; one of `metrics`.
        exclude_reference: Whether the queries' `exclude` ids leave the ranking.
        ap_norm: Divisor of average precision: `min(k, R)`, `hits` in the top k, or `all` R.
        ap_rule: Area rule of average precision.
        average: Mean over queries (`micro`) or mean of the groups' means (`macro`), see `groups`.
        ties: How candidates with equal scores count: by the mean over all their orders (`expected`), in the order of
            the gallery as most official evaluators, or `pessimistic`, relevant ones last (GeneCIS).
        note: Anything else a reader of the metric has to know.
        recall: `R@k` is 1 if any target is found, or the `fraction` of the targets found.
        recall_targets: Whether `R@k` looks for `all` targets, or the `first` of each query alone (CIRCO).
        precision_cut: What `P@k` divides by: `k`, see `metrics.functional.precision_at_k`.
        candidates: What is ranked: the whole `gallery`, or each query's own `subset` (GeneCIS).
        unanswered: Whether a query without any target is left out (`omit`) or counts as 0 (`zero`).
        means: Further metrics, each the mean of the named ones, such as `("R@5", "Rs@1")` for CIRR.
        prompt: The template of the queries' texts, by name or written out.
        classes: Whether the queries' classes are a sample, which intervals resample too, or all that there are.
        groups: What `macro` averages over, and what metrics over groups reduce: classes, or the queries' first tags.

    Raises:
        DataError: If `primary` is not among `metrics`.
    """

    name: str = "official"
    metrics: tuple[str, ...] = ("R@1", "R@5", "R@10", "mAP")
    primary: str = "mAP"
    exclude_reference: bool = False
    ap_norm: ApNorm = "min"
    ap_rule: ApRule = "step"
    average: Average = "micro"
    ties: Literal["expected", "gallery order", "pessimistic"] = "expected"
    note: str = ""
    recall: RecallMode = "any"
    recall_targets: Literal["all", "first"] = "all"
    precision_cut: PrecisionCut = "k"
    candidates: Literal["gallery", "subset"] = "gallery"
    unanswered: Literal["omit", "zero"] = "omit"
    means: tuple[tuple[str, ...], ...] = ()
    prompt: str = ""
    classes: Literal["sampled", "all"] = "sampled"
    groups: Literal["class", "tag"] = "class"

    def __post_init__(self) -> None:
        if self.primary not in self.metrics:
            raise DataError(f"invalid value for primary: {self.primary!r} (expected one of {', '.join(self.metrics)})")

    def __repr__(self) -> str:
        metrics = _short(", ".join(self.metrics))
        return f"Protocol({_short(self.name)}, metrics={metrics}, primary={self.primary}, average={self.average})"


@dataclass(frozen=True)
class Benchmark:
    """Queries, a gallery and the protocol that scores the rankings.

    Attributes:
        name: Name of the benchmark, such as `shapes_cir`.
        split: Name of the split.
        task: `cir` or `sbir`.
        queries: The queries, in a fixed order.
        gallery: The gallery, in a fixed order, which also breaks ties.
        protocol: How it is scored.
        skipped: How many items were left out on request (`on_missing=skip`).

    Raises:
        DataError: If it is empty, repeats a gallery id, or a target, an excluded or a subset id is not in the gallery.
    """

    name: str
    split: str
    task: Task
    queries: Sequence[Query]
    gallery: Sequence[GalleryItem]
    protocol: Protocol
    skipped: int = 0

    def __post_init__(self) -> None:
        title = f"{self.name} ({self.split})"
        if not self.queries:
            raise DataError(f"{title}: no queries; choose another split or add some")
        if not self.gallery:
            raise DataError(f"{title}: the gallery is empty; choose another split or add images")
        known: set[str] = set()
        for item in self.gallery:
            if item.id in known:
                raise DataError(f"{title}: gallery id {item.id!r} is repeated (expected unique ids)")
            known.add(item.id)
        checked: set[int] = set()
        for query in self.queries:
            for ids in (query.targets, query.exclude, query.subset or ()):
                if id(ids) in checked:  # sketch queries of one class share one tuple
                    continue
                checked.add(id(ids))
                for name in ids:
                    if name not in known:
                        text = f"; pass a tuple of ids, not the text {ids!r}" if type(ids).__name__ == "str" else ""
                        raise DataError(
                            f"{title}: query {query.id!r} names {name!r}, which is not in the gallery{text}"
                        )

    def __repr__(self) -> str:
        size = f"{len(self.queries):,} queries x {len(self.gallery):,} images"
        return f"Benchmark({_short(self.name)}, {_short(self.split)}, {self.task}, {size}, {self.protocol.primary})"

    def queries_hash(self) -> str:
        """Hash the queries' ids, texts and targets, to tell whether two runs had the same queries."""
        digest = hashlib.sha256()
        targets: dict[int, bytes] = {}
        for query in self.queries:
            if id(query.targets) not in targets:
                targets[id(query.targets)] = hashlib.sha256("|".join(query.targets).encode()).digest()
            digest.update(f"{query.id}|{query.text}|".encode() + targets[id(query.targets)])
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Triplet:
    """A training sample: a query and one of its targets.

    Attributes:
        image: The reference image: a photo or a sketch.
        text: The modification text, or None.
        target: The target image.
        group: Identity of the target's content. Targets of one group are never each other's negatives.
        task: `cir` or `sbir`. A batch holds samples of one task.
        image_group: Identity of the reference's content, in the terms of `group`; empty if it is not known, and then
            that of a target with the same image.
    """

    image: ImageSource
    text: str | None
    target: ImageSource
    group: str
    task: Task
    image_group: str = ""

    def __repr__(self) -> str:
        return f"Triplet({_short(self.image)}, {_short(self.text)}, {_short(self.target)}, {self.task})"


@dataclass(frozen=True)
class TrainingSet:
    """Training triplets.

    Attributes:
        name: Name of the data.
        triplets: The samples.
        classes: Names of the classes in it, for the overlap check of zero-shot metrics.
        skipped: How many items were left out on request.
    """

    name: str
    triplets: Sequence[Triplet]
    classes: tuple[str, ...] = ()
    skipped: int = 0

    def __repr__(self) -> str:
        return f"TrainingSet({_short(self.name)}, {len(self.triplets):,} triplets, {len(self.classes):,} classes)"


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an image becomes a tensor.

    Attributes:
        size: Height and width of the result in pixels.
        mean: Channel means, subtracted after scaling to 0..1.
        std: Channel standard deviations, divided by.
        fit: `squash` resizes both sides, `crop` resizes the short side and cuts the
            center, `pad` first pads an image longer than `pad_ratio` to that ratio.
        interpolation: Filter of the resize.
        pad_ratio: Longest allowed side ratio under `pad` (1.25 in TransAgg's code).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["squash", "crop", "pad"] = "crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    pad_ratio: float = 1.25

    def fingerprint(self) -> str:
        """Return a short hash of every setting."""
        text = repr([(f.name, getattr(self, f.name)) for f in fields(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shapes(**tensors: Tensor | None) -> str:
    return ", ".join(f"{name}={list(x.shape)}" for name, x in tensors.items() if x is not None)


@dataclass(frozen=True, repr=False)
class Features:
    """Unnormalized features of a batch of images or texts.

    Attributes:
        pooled: The embedding of each item in the joint space.
        tokens: All tokens projected into the same space, or None if they are not needed.
        mask: True at real tokens, False at padding. None if `tokens` is None.
        pooled_at: Position among the tokens that `pooled` was read from.
    """

    pooled: Float[Tensor, "batch dim"]
    tokens: Float[Tensor, "batch length dim"] | None = None
    mask: Bool[Tensor, "batch length"] | None = None
    pooled_at: Int[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __repr__(self) -> str:
        return f"Features({_shapes(pooled=self.pooled, tokens=self.tokens)}, device={self.pooled.device})"

    def to(self, device: torch.device | str) -> "Features":
        """Move every tensor to a device."""
        return self.map(lambda x: x.to(device))

    def select(self, rows: Int[Tensor, " rows"]) -> "Features":
        """Select some items, in the given order."""
        return self.map(lambda x: x[rows])

    def expand(self, batch: int) -> "Features":
        """Repeat a single item `batch` times without copying."""
        return self.map(lambda x: x.expand(batch, *x.shape[1:]))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """Apply a function to every tensor."""
        tensors = (self.pooled, self.tokens, self.mask, self.pooled_at)
        changed: list[Any] = [None if x is None else change(x) for x in tensors]
        return Features(*changed)


@dataclass(frozen=True, repr=False)
class Ranking:
    """The first hits of each query, best first.

    Attributes:
        positions: Positions in the gallery.
        scores: Cosine similarities, -1..1, not increasing along a row.
    """

    positions: Int[Tensor, "queries k"]
    scores: Float[Tensor, "queries k"]

    def __repr__(self) -> str:
        return f"Ranking({_shapes(positions=self.positions)})"


@dataclass(frozen=True, repr=False)
class Scores:
    """The metrics of one method on one benchmark, query by query.

    Attributes:
        values: For each metric's name one value per query, 0..1; nan if the metric is not defined for the query (no
            target, no subset).
        ranking: The first hits of each query.
        subsets: Gallery positions of each query's subset, best first, padded with -1; None if the benchmark has no
            subsets.
    """

    values: Mapping[str, Float[Tensor, " queries"]]
    ranking: Ranking
    subsets: Int[Tensor, "queries subset"] | None = None

    def __repr__(self) -> str:
        return f"Scores({_short(', '.join(self.values))}, {self.ranking})"
