"""A benchmark's queries and gallery through models, each image and text encoded once for all of them.

Images whose tokens a model needs are encoded block by block, embedded by every such model and forgotten, unless their
tokens are few enough to be stored. Then finished embeddings are stored instead, so that an interrupted evaluation
resumes.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
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
from union_igrot.types import Benchmark, Features, ImageSource, NoImage

TOKEN_BYTES: Final = 4 * 2**30
"""Bytes on disk that the tokens of a benchmark's images may take, enough for some 40,000 images at 50 tokens of 512
float32 numbers. The tokens of its texts, some 20 each, are always stored."""


class EmbeddedBenchmark(NamedTuple):
    """A benchmark's embeddings by one model.

    Attributes:
        queries: One embedding per query; of several wordings the normalized mean of their unit embeddings.
        gallery: One embedding per gallery image.
        seconds: `encode` for the backbone, which all models share (0 if everything was in the store), and `embed` for
            this model's heads.
    """

    queries: Float[Tensor, "queries dim"]
    gallery: Float[Tensor, "gallery dim"]
    seconds: dict[str, float]


def embed_benchmark(
    model: IGROTModel, benchmark: Benchmark, extractor: FeatureExtractor, *, token_budget: int = TOKEN_BYTES
) -> EmbeddedBenchmark:
    """Embed a benchmark with one model; see `embed_models`."""
    ((_, embedded),) = embed_models({"model": model}, benchmark, extractor, token_budget=token_budget)
    return embedded


def embed_models(
    models: Mapping[str, IGROTModel],
    benchmark: Benchmark,
    extractor: FeatureExtractor,
    *,
    token_budget: int = TOKEN_BYTES,
) -> Iterator[tuple[str, EmbeddedBenchmark]]:
    """Embed a benchmark's queries and gallery with several models of one backbone.

    Each image, each text and the null text passes the backbone at most once, whatever number of models, queries and
    gallery items it belongs to.

    Args:
        models: The models by name.
        benchmark: Its queries and gallery are embedded.
        extractor: Extractor with the models' backbone.
        token_budget: Bytes on disk that the tokens of its images may take, at most the store's own limit. If they
            take more, none are stored, but the embeddings of finished blocks are.

    Yields:
        Each model's name and embeddings, in the models' order. Only models that need tokens are kept in memory beside
        the yielded one.
    """
    start = time.perf_counter()
    sources, queries, gallery = _sides(benchmark)
    if "" in queries.texts:
        extractor.add_text("", next(iter(models.values())).null_text())
    extractor.extract_texts(queries.texts, label=f"{benchmark.name} texts")
    sides = {
        name: (_SideEmbedding(model, queries, extractor), _SideEmbedding(model, gallery, extractor))
        for name, model in models.items()
    }
    streamed = [side for both in sides.values() for side in both if side.needs_tokens]
    label, limit = f"{benchmark.name} images", extractor.store.limit
    _stream(streamed, sources, extractor, token_budget if limit is None else min(token_budget, limit), label)
    keys = extractor.extract_images(sources, tokens=False, label=label)
    encoding = time.perf_counter() - start - sum(side.seconds for side in streamed)
    for name in models:
        both = sides.pop(name)
        for side in both:
            side.embed_rest(keys)
        seconds = {"encode": encoding, "embed": sum(side.seconds for side in both)}
        result = EmbeddedBenchmark(both[0].per_item(), both[1].per_item(), seconds)
        del both, side
        yield name, result
        del result


@dataclass(frozen=True)
class _Side:
    """What is embedded of one side of a benchmark: rows of an image and, for queries, a text, each pair once.

    Attributes:
        name: `queries` or `gallery`.
        images: Number of each row's image; -1 for a text alone.
        texts: Each row's text; empty for a gallery.
        names: Key of each row's embedding in a store.
        items: For each query or gallery item its rows: one, or one per wording.
    """

    name: str
    images: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    items: list[list[int]] = field(default_factory=list)


def _sides(benchmark: Benchmark) -> tuple[list[ImageSource], _Side, _Side]:
    """Return the distinct images of a benchmark, and both its sides."""
    numbers: dict[str, int] = {}
    sources: list[ImageSource] = []
    queries, gallery = _Side("queries"), _Side("gallery")
    known: dict[str, int] = {}
    items: list[tuple[_Side, ImageSource, tuple[str | None, ...]]] = [
        *((queries, query.image, query.wordings) for query in benchmark.queries),
        *((gallery, item.image, (None,)) for item in benchmark.gallery),
    ]
    for side, source, wordings in items:
        key = image_key(source)
        number = -1 if isinstance(source, NoImage) else numbers.setdefault(key, len(numbers))
        if number == len(sources):
            sources.append(source)
        side.items.append([])
        for text in wordings:
            name = f"{side.name}/{key}/{text or ''}"
            row = known.setdefault(name, len(side.images))
            side.items[-1].append(row)
            if row == len(side.images):
                side.images.append(number)
                side.names.append(name)
                if side is queries:
                    side.texts.append(text or "")
    return sources, queries, gallery


@final
class _SideEmbedding:
    """The embeddings of one side of a benchmark by one model."""

    def __init__(self, model: IGROTModel, side: _Side, extractor: FeatureExtractor) -> None:
        self.model, self.side, self.seconds = model, side, 0.0
        self.needs_tokens = (model.fusion if side.name == "queries" else model.target).needs_tokens
        self._extractor = extractor
        self._embeddings: Tensor | None = None

    def embed_rest(self, keys: Sequence[str]) -> None:
        """Embed every row without an image, and those with one from pooled features if these are enough.

        Args:
            keys: Keys of the images.
        """
        images = self.side.images
        if not self.needs_tokens:
            shown = [row for row, image in enumerate(images) if image >= 0]
            self.embed(shown, lambda some: self._extractor.lookup([keys[images[row]] for row in some], tokens=False))
        self.embed([row for row, image in enumerate(images) if image < 0])

    @torch.inference_mode()
    def embed(self, rows: Sequence[int], features: Callable[[Sequence[int]], Features] | None = None) -> None:
        """Embed some rows; `features` returns those of the images of rows, None if they have none."""
        start = time.perf_counter()
        for at in range(0, len(rows), self._extractor.batch_size):
            some = rows[at : at + self._extractor.batch_size]
            images = None if features is None else features(some)
            if self.side.texts:
                names = [f"text/{self.side.texts[row]}" for row in some]
                texts = self._extractor.lookup(names, tokens=self.needs_tokens and images is not None)
                self.put(some, self.model.embed_queries(images, texts))
            elif images is not None:
                self.put(some, self.model.embed_gallery(images))
        self.seconds += time.perf_counter() - start

    def put(self, rows: Sequence[int], embeddings: Float[Tensor, "rows dim"]) -> None:
        """Set the embeddings of some rows."""
        if self._embeddings is None:
            self._embeddings = embeddings.new_empty(len(self.side.images), embeddings.shape[1])
        self._embeddings[list(rows)] = embeddings

    def get(self, rows: Sequence[int]) -> Float[Tensor, "rows dim"]:
        """Return the embeddings of some rows."""
        assert self._embeddings is not None
        return self._embeddings[list(rows)]

    @torch.inference_mode()
    def per_item(self) -> Float[Tensor, "items dim"]:
        """Return one embedding per query or gallery item."""
        embeddings = self.get([rows[0] for rows in self.side.items])
        for position, rows in enumerate(self.side.items):
            if len(rows) > 1:
                embeddings[position] = F.normalize(F.normalize(self.get(rows), dim=-1).mean(0), dim=-1)
        return embeddings

    def open_store(self, *, create: bool) -> FeatureStore | None:
        """Open the store of this model's finished embeddings, if it exists or is to be created."""
        features = self._extractor.store
        described = json.dumps([features.fingerprint, self.model.describe(), union_igrot.__version__])
        name = f"embedded-{hashlib.sha256(described.encode()).hexdigest()[:32]}"
        if not create and not feature_folder(features.root, name).is_dir():
            return None
        label = f"{features.backbone}, embeddings of one model"
        return FeatureStore(features.root, name, backbone=label, limit=features.limit)

    def load(self) -> list[int]:
        """Take the rows that an interrupted evaluation finished; return the others."""
        names, store = self.side.names, self.open_store(create=False)
        if store is None:
            return list(range(len(names)))
        missing = store.missing(names)
        found = sorted(set(range(len(names))).difference(missing))
        if found:
            self.put(found, store.get([names[row] for row in found]).pooled.to(self.model.device))
        return missing


def _select(images: Features, positions: Mapping[int, int], rows: Sequence[int]) -> Features:
    return images.select(torch.tensor([positions[row] for row in rows], device=images.pooled.device))


def _stream(
    sides: Sequence[_SideEmbedding],
    sources: Sequence[ImageSource],
    extractor: FeatureExtractor,
    budget: int,
    label: str,
) -> None:
    """Pass the images of sides that need tokens through the backbone, and embed each block for all sides at once."""
    waiting: list[dict[int, list[int]]] = []
    for side in sides:
        waiting.append(defaultdict(list))
        for row in side.load():
            waiting[-1][side.side.images[row]].append(row)
        waiting[-1].pop(-1, None)
    needed = sorted(set().union(*waiting))
    writers: dict[int, BufferedWriter] = {}
    with ExitStack() as stack:
        images = [sources[number] for number in needed]
        blocks = stack.enter_context(closing(extractor.stream(images, token_budget=budget, label=label)))
        for block in blocks:
            for number, (side, by_image) in enumerate(zip(sides, waiting, strict=True)):
                positions = {row: at for at, one in enumerate(block.rows) for row in by_image.get(needed[one], ())}
                rows = list(positions)
                if not rows:
                    continue
                side.embed(rows, partial(_select, block.features, positions))
                if not block.stored:
                    if number not in writers:
                        store = side.open_store(create=True)
                        assert store is not None
                        writers[number] = stack.enter_context(BufferedWriter(store, extractor.shard))
                    writers[number].add([side.side.names[row] for row in rows], Features(side.get(rows).float()))
