"""A benchmark's queries and gallery through models, each image and text encoded once for all of them.

Images whose tokens a model reads pass through in blocks: encoded, embedded by every model
that reads tokens, and forgotten, unless their tokens are few enough to be kept for a next
time. Then finished embeddings are kept instead, so that an interrupted evaluation goes on.
Knows models, the extractor and the store. Does not know rankings, nor what a metric is.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

import union_igrot
from union_igrot.features.extractor import BufferedWriter, FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.images.decode import image_key
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import feature_folder
from union_igrot.types import Benchmark, Features, ImageSource

TOKEN_BYTES: Final = 4 * 2**30
"""Disk that the tokens of a benchmark's images may take; those of some 40,000 at 50 tokens of 512 float32 numbers.
The tokens of its texts, some 20 each, are always kept."""


class Embedded(NamedTuple):
    """A benchmark as one model sees it.

    Attributes:
        queries: An embedding a query; of several wordings the normalized mean of their unit embeddings.
        gallery: An embedding a gallery image.
        seconds: `encode` for the backbone, which all models share (0 where everything was in
            the store), and `embed` for this model's heads.
    """

    queries: Float[Tensor, "queries dim"]
    gallery: Float[Tensor, "gallery dim"]
    seconds: dict[str, float]


def embed_benchmark(
    model: IGROTModel, benchmark: Benchmark, extractor: FeatureExtractor, *, room: int = TOKEN_BYTES
) -> tuple[Float[Tensor, "queries dim"], Float[Tensor, "gallery dim"], dict[str, float]]:
    """Embed a benchmark with one model; see `embed_models`.

    Returns:
        Query embeddings, gallery embeddings, seconds.
    """
    ((_, embedded),) = embed_models({"model": model}, benchmark, extractor, room=room)
    return embedded


def embed_models(
    models: Mapping[str, IGROTModel], benchmark: Benchmark, extractor: FeatureExtractor, *, room: int = TOKEN_BYTES
) -> Iterator[tuple[str, Embedded]]:
    """Embed a benchmark's queries and gallery with several models of one backbone.

    Each image, each text and the null text passes the backbone at most once, whatever
    number of models, queries and gallery items it belongs to.

    Args:
        models: The models by name.
        benchmark: Whose queries and gallery.
        extractor: Of the models' backbone.
        room: Bytes on disk that the tokens of its images may take, at most the store's
            own limit. Where they take more, none are kept, and embeddings of finished
            blocks are kept in their place.

    Yields:
        Each model's name and embeddings, in the models' order. Only models that read
        tokens are held beside the one that is given out.
    """
    start = time.perf_counter()
    limit = extractor.store.limit
    sources, queries, gallery = _sides(benchmark)
    null = next(iter(models.values())).null_text()
    if "" in queries.texts:
        extractor.add_text("", null)
    extractor.extract_texts(queries.texts, label=f"{benchmark.name} texts")
    jobs = {name: (_Job(model, queries, extractor), _Job(model, gallery, extractor)) for name, model in models.items()}
    hungry = [job for both in jobs.values() for job in both if job.reads_tokens]
    _stream(hungry, sources, extractor, room if limit is None else min(room, limit), f"{benchmark.name} images")
    keys = extractor.extract_images(sources, tokens=False, label=f"{benchmark.name} images")
    encoding = time.perf_counter() - start - sum(job.seconds for job in hungry)
    for name in models:
        both = jobs.pop(name)
        for job in both:
            if not job.reads_tokens:
                job.run_all(keys)
        whole = [job.whole() for job in both]
        yield name, Embedded(whole[0], whole[1], {"encode": encoding, "embed": sum(job.seconds for job in both)})
        del both, whole, job


@dataclass(frozen=True)
class _Side:
    """What is embedded of one side: rows of an image and, of queries, a text, each pair once.

    Attributes:
        name: `queries` or `gallery`.
        images: Number of each row's image.
        texts: Each row's text; empty for a gallery.
        names: What each row's embedding is called in a store.
        items: For each query or gallery item its rows: one, or one a wording.
    """

    name: str
    images: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    items: list[list[int]] = field(default_factory=list)


_Item = tuple[ImageSource, tuple[str | None, ...]]


def _sides(benchmark: Benchmark) -> tuple[list[ImageSource], _Side, _Side]:
    """Return the distinct images of a benchmark, and both its sides."""
    numbers: dict[str, int] = {}
    sources: list[ImageSource] = []
    sides = _Side("queries"), _Side("gallery")
    known: dict[tuple[str, int, str], int] = {}
    asked: list[_Item] = [(query.image, query.wordings) for query in benchmark.queries]
    shown: list[_Item] = [(item.image, (None,)) for item in benchmark.gallery]
    for side, items in zip(sides, (asked, shown), strict=True):
        for source, wordings in items:
            key = image_key(source)
            number = numbers.setdefault(key, len(numbers))
            if number == len(sources):
                sources.append(source)
            rows = []
            for text in wordings:
                row = known.setdefault((side.name, number, text or ""), len(side.images))
                rows.append(row)
                if row == len(side.images):
                    side.images.append(number)
                    side.names.append(f"{side.name}/{key}/{text or ''}")
                    if side is sides[0]:
                        side.texts.append(text or "")
            side.items.append(rows)
    return sources, *sides


@final
class _Job:
    """One side of a benchmark for one model."""

    def __init__(self, model: IGROTModel, side: _Side, extractor: FeatureExtractor) -> None:
        self.model, self.side, self.seconds = model, side, 0.0
        self.reads_tokens = (model.fusion if side.name == "queries" else model.target).needs_tokens
        self._extractor = extractor
        self._embeddings: Tensor | None = None

    def run_all(self, keys: Sequence[str]) -> None:
        """Embed every row from pooled features, given the images' keys."""
        step = self._extractor.batch_size
        for at in range(0, len(self.side.images), step):
            rows = list(range(at, min(at + step, len(self.side.images))))
            images = self._extractor.lookup([keys[self.side.images[row]] for row in rows], tokens=False)
            self.run(rows, images, list(range(len(rows))))

    @torch.inference_mode()
    def run(self, rows: Sequence[int], images: Features, places: Sequence[int]) -> None:
        """Embed some rows, given features of images and each row's place among them."""
        start = time.perf_counter()
        step = self._extractor.batch_size
        for at in range(0, len(rows), step):
            some = list(rows[at : at + step])
            seen = images.select(torch.tensor(places[at : at + step], device=images.pooled.device))
            if self.side.texts:
                keys = [f"text/{self.side.texts[row]}" for row in some]
                embedded = self.model.embed_queries(seen, self._extractor.lookup(keys, tokens=self.reads_tokens))
            else:
                embedded = self.model.embed_gallery(seen)
            self.put(some, embedded)
        self.seconds += time.perf_counter() - start

    def put(self, rows: Sequence[int], embedded: Float[Tensor, "rows dim"]) -> None:
        """Take the embeddings of some rows."""
        if self._embeddings is None:
            self._embeddings = embedded.new_empty(len(self.side.images), embedded.shape[1])
        self._embeddings[torch.tensor(rows, device=embedded.device)] = embedded

    def of(self, rows: Sequence[int]) -> Float[Tensor, "rows dim"]:
        """Return the embeddings of some rows."""
        assert self._embeddings is not None
        return self._embeddings[torch.tensor(rows, device=self._embeddings.device)]

    @torch.inference_mode()
    def whole(self) -> Float[Tensor, "items dim"]:
        """Return an embedding a query or gallery item."""
        items = self.side.items
        assert self._embeddings is not None
        if all(rows == [place] for place, rows in enumerate(items)):
            return self._embeddings
        first = self.of([rows[0] for rows in items])
        several = [place for place, rows in enumerate(items) if len(rows) > 1]
        for place in several:
            first[place] = F.normalize(F.normalize(self.of(items[place]), dim=-1).mean(0), dim=-1)
        return first


@final
class _Finished:
    """Embeddings of one job that an interrupted evaluation left, and those of this one."""

    def __init__(self, job: _Job, extractor: FeatureExtractor) -> None:
        self.job = job
        self._shard = extractor.shard
        self._beside = extractor.store
        described = json.dumps([extractor.store.fingerprint, job.model.describe(), union_igrot.__version__])
        self._name = f"embedded-{hashlib.sha256(described.encode()).hexdigest()[:32]}"
        self._store: FeatureStore | None = None
        self._shelf: BufferedWriter | None = None
        if feature_folder(extractor.store.root, self._name).is_dir():
            self._open()

    def _open(self) -> BufferedWriter:
        if self._store is None or self._shelf is None:
            features = self._beside
            label = f"{features.backbone}, embeddings of one model"
            self._store = FeatureStore(features.root, self._name, backbone=label, limit=features.limit)
            self._shelf = BufferedWriter(self._store, self._shard)
        return self._shelf

    def take(self) -> set[int]:
        """Return the job what is there; returns the rows that are not."""
        names = self.job.side.names
        todo = set(range(len(names))) if self._store is None else set(self._store.missing(names))
        there = [row for row in range(len(names)) if row not in todo]
        if there and self._store is not None:
            kept = self._store.get([names[row] for row in there]).pooled
            self.job.put(there, kept.to(self.job.model.device))
        return todo

    def keep(self, rows: Sequence[int]) -> None:
        """Keep rows that the job has embedded."""
        names = self.job.side.names
        self._open().put([names[row] for row in rows], Features(self.job.of(rows).float()))

    def flush(self) -> None:
        """Write what was not yet written."""
        if self._shelf is not None:
            self._shelf.flush()


def _stream(
    jobs: Sequence[_Job], sources: Sequence[ImageSource], extractor: FeatureExtractor, room: int, label: str
) -> None:
    """Pass the images of jobs that read tokens through the backbone, and embed each block for all jobs at once."""
    finished = [_Finished(job, extractor) for job in jobs]
    waiting: list[dict[int, list[int]]] = []
    for one in finished:
        waiting.append(defaultdict(list))
        for row in sorted(one.take()):
            waiting[-1][one.job.side.images[row]].append(row)
    needed = sorted(set().union(*waiting))
    try:
        for block in extractor.stream([sources[number] for number in needed], room=room, label=label):
            for one, by_image in zip(finished, waiting, strict=True):
                pairs = [(row, place) for place, at in enumerate(block.rows) for row in by_image.get(needed[at], ())]
                if pairs:
                    rows = [row for row, _ in pairs]
                    one.job.run(rows, block.features, [place for _, place in pairs])
                    if not block.kept:
                        one.keep(rows)
    finally:
        for one in finished:
            one.flush()
