"""`Gallery`: your own images, indexed with a model and searched with images, sketches and text."""

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, final

from union_igrot.errors import ConfigError, DataError, UnionError, check_count, names_arguments, wrong_type
from union_igrot.gallery.duplicates import THRESHOLD, find_duplicates
from union_igrot.gallery.engines.base import SearchMode, VectorIndex
from union_igrot.gallery.engines.factory import MEMORY, check_uri, local_path, open_index, without_password
from union_igrot.gallery.ingest.embedding import read_vectors, vectors_by_id
from union_igrot.gallery.ingest.entries import Listing, list_additions
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import EMBED_TEXT, IngestOptions, IngestReport
from union_igrot.gallery.ingest.sources import is_list, list_source
from union_igrot.gallery.metadata import (
    EARLIER,
    check_calibration,
    check_metadata,
    check_text_column,
    describe_calibration,
    extra_width,
    index_metadata,
    model_of_index,
    read_metadata,
    stored_weight,
    widen_queries,
)
from union_igrot.gallery.near import QueryKind, near_score, query_kind
from union_igrot.gallery.queries import (
    GalleryQuery,
    as_items,
    embed_gallery_queries,
    named_errors,
    parse_query,
    read_feedback,
    resolve_ids,
    resolve_queries,
    row_ids,
)
from union_igrot.gallery.results import THUMBNAIL, SearchResult, make_result
from union_igrot.models.backbones.base import PreprocessChoice
from union_igrot.models.devices import resolve_device
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import absolute_path, is_folder

_ADD_WAIT_SECONDS: Final = 600.0


@final
class Gallery:
    """Images that can be searched.

    Made by `Gallery.open`. Use it from one thread; several processes may open the same index at once.

    Args:
        index: The index; None until the first image is added.
        model: The model that embeds images and queries.
        uri: Location of the index.
        checkpoint: Where the model was loaded from, stored with the index.
        weights: Explicit weights of its backbone, stored with the index.
        calibration: Weight of the calibration, see `open`.
    """

    def __init__(
        self,
        index: VectorIndex | None,
        model: IGROTModel | None = None,
        uri: str = "",
        checkpoint: str | None = None,
        weights: str | Path | None = None,
        calibration: float | None = None,
    ) -> None:
        if not isinstance(model, IGROTModel):
            raise wrong_type("model", model, "a model; Gallery.open(uri) opens a gallery by its location")
        self.model, self.uri = model.eval(), without_password(uri)
        self._full_uri, self._index = uri, index
        self._checkpoint, self._weights, self._calibration = checkpoint, weights, calibration
        self._metadata: dict[str, Any] = {}
        self._near: dict[str, Any] = {}  # see `near.near_score`

    @classmethod
    @names_arguments
    def open(
        cls,
        uri: str | Path,
        model: IGROTModel | str | Path | None = None,
        *,
        create: bool = True,
        weights: str | Path | None = None,
        device: str = "auto",
        preprocess: PreprocessChoice | None = None,
        calibration: float | None = None,
    ) -> "Gallery":
        """Open a gallery.

        Args:
            uri: Location of its index: a folder `photos.lance`, an object store `s3://bucket/photos.lance`, a cluster
                `milvus://host:19530/collection`, or `memory:`, which is lost when the process ends.
            model: A model, or a name for `load`: `photos`, `tiny`, a folder, a repository, or a backbone alone. None
                for the model that the index was made with, and `photos` for a new index.
            create: Whether a missing index is created: a local one by the first `add` or `update`, one on a server or
                object store at once. `memory:` is always created.
            weights: Weights of the backbone, for a model given by name.
            device: Device of a model given by name: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
            preprocess: `model` or `pad`, for a backbone given by name, see `load`; None for its usual one, or the one
                recorded in the index.
            calibration: Weight of a correction of the scores by the model's training queries, such as 0.25, stored with
                a new index; 0 for none. None for that of the index. See `evaluation.calibration`.

        Raises:
            CheckpointError: If the index was made with another model; names both.
            ConfigError: If the index has another calibration, there is no index and `create` is not set, the URI is
                invalid, the package of its engine is not installed, or there is no such device.
            DataError: If it cannot be read or reached.
        """
        if not isinstance(uri, str | Path):
            raise wrong_type("uri", uri, "a location such as photos.lance")
        if not isinstance(model, IGROTModel | str | Path | None):
            raise wrong_type("model", model, "a model, or the name of one")
        path = local_path(str(uri))
        uri = str(uri) if path is None else path  # absolute, so that the working directory may change
        check_uri(uri)
        absent = uri == MEMORY or (create and path is not None and not os.path.exists(path))  # noqa: PTH110 - Path's raises for long names
        try:
            index = None if absent else open_index(uri)
        except ConfigError:
            if path is not None or not create:
                raise
            index = None  # created below, which repeats any other error
        with ExitStack() as opened:
            if index is not None:
                opened.enter_context(index)
            checkpoint = None
            if not isinstance(model, IGROTModel):
                recorded = {} if index is None else index.metadata
                model, checkpoint = model_of_index(recorded, uri, model, weights, preprocess)
                model.to(resolve_device(device))
            gallery = cls(index, model, uri, checkpoint, weights, calibration)
            if index is not None:
                check_metadata(index.metadata, gallery.metadata, index.uri)
                check_calibration(index.metadata, calibration, index.uri)
            opened.pop_all()
        if not absent:
            gallery._open_index()
        return gallery

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata that identifies the model; see `index_metadata`."""
        if not self._metadata:  # once, as all weights are hashed for it
            self._metadata = index_metadata(self.model, self._checkpoint, self._weights)
        return self._metadata

    @property
    def index(self) -> VectorIndex:
        """The index, for direct access; a DataError if it does not exist yet."""
        if self._index is None:
            raise DataError(f"there is no gallery at {self.uri} yet; add images first, or check its name")
        return self._index

    def _open_index(self, precision: str = "32-true", embed_text: str | None = None) -> VectorIndex:
        """Return the index, which is opened or created; the precision and the column are recorded in a new one."""
        if self._index is None:
            recorded = read_metadata(self._full_uri)
            if not recorded:
                recorded = describe_calibration(self.model, self._calibration or 0.0)
                recorded |= {"precision": precision} if precision == "int8" else {}
                recorded |= {EMBED_TEXT: embed_text} if embed_text is not None else {}
            created = {name: value for name, value in {**recorded, **self.metadata}.items() if name != EARLIER}
            dim = self.model.backbone.dim + extra_width(recorded)
            with ExitStack() as opened:
                index = opened.enter_context(open_index(self._full_uri, dim=dim, metadata=created, create=True))
                check_metadata(index.metadata, self.metadata, index.uri)  # another process may have created it
                check_calibration(index.metadata, self._calibration, index.uri)
                opened.pop_all()
            self._index = index
        return self._index

    @names_arguments
    def add(
        self,
        images: object,
        ids: Iterable[str] | None = None,
        columns: Mapping[str, Iterable[Any]] | None = None,
        *,
        on_broken: Literal["fail", "skip"] | None = None,
        options: IngestOptions | None = None,
        vectors: object = None,
    ) -> IngestReport:
        """Add images, or update those with the same id.

        Args:
            images: One image or several, in any form that `as_image` accepts (paths, PIL images, bytes, open files,
                arrays, tensors); or a folder, a pattern such as `photos/**/*.jpg`, a list file or tar shards, as for
                `update`.
            ids: Ids of single images; by default the absolute path of a file, or `sha256:` and the hash of the content.
            columns: Values of single images by column name. For an existing image, other columns keep their values;
                None clears a value.
            on_broken: Whether an image that cannot be read is an error or skipped. By default it is an error among
                single images, and skipped in a folder, which may hold other files.
            options: Options for large additions.
            vectors: Embeddings of single images or of a list, in order, instead of computed ones: a file or an array,
                see `read_vectors`. A few of them are compared with the model's own.

        Returns:
            Numbers of images added, updated, unchanged and skipped. Unchanged images are not embedded again.

        Raises:
            ImageError: If an image cannot be read, with `fail`; what was embedded before stays.
            DataError: If ids repeat, or ids or columns are not as many as images.
            UnionError: If another process is adding images to the gallery, and has not finished after ten minutes.
        """
        if images is None:
            raise wrong_type("images", images, "images, a folder, a pattern or a list file")
        if columns is not None and not hasattr(columns, "items"):
            raise wrong_type("columns", columns, "values by name, such as {'year': [2024, 2025]}")
        if _is_source(images):
            if ids is not None or columns is not None:
                raise DataError(
                    f"ids and columns cannot be given for {images}; pass single images, or a list file with columns"
                )
            options = options or IngestOptions()
            listing = list_source(str(images), options)
        else:
            listing = list_additions(as_items(images), ids, columns)
            options = options or IngestOptions(workers=0, progress=False, on_broken="fail")
        options = replace(options, on_broken=on_broken or options.on_broken, prune=False)
        return self.ingest(listing, options, vectors, wait=_ADD_WAIT_SECONDS)

    @names_arguments
    def update(
        self,
        images: str | Path,
        options: IngestOptions | None = None,
        *,
        executor: Literal["local", "ray"] | None = None,
        vectors: object = None,
    ) -> IngestReport:
        """Synchronize the gallery with a folder: embed new and changed files, remove the rows of deleted files.

        Args:
            images: A folder with its subfolders, a pattern, a list or tar shards, as for `union-index images=`.
            options: Options such as the batch size.
            executor: `local` or `ray`; None for that of the options.
            vectors: Embeddings of the images of a list, as for `add`.

        Returns:
            Numbers of images added, updated, unchanged, removed and skipped as they cannot be read.
        """
        options = options or IngestOptions()
        listing = list_source(str(images), options)
        return self.ingest(listing, replace(options, executor=executor or options.executor), vectors)

    def ingest(self, listing: Listing, options: IngestOptions, vectors: object, *, wait: float = 0.1) -> IngestReport:
        """Bring the gallery up to date with listed images; see `update`. `wait` is how long others may add images."""
        if self._index is None and not read_metadata(self._full_uri):
            if not listing.entries:  # no empty index
                return IngestReport(excluded=listing.excluded)
            if options.embed_text is not None:
                check_text_column(listing, options.embed_text)
        given = None if vectors is None else vectors_by_id(vectors, read_vectors(vectors), listing, self.model)
        index = self._open_index(options.precision, options.embed_text)
        return ingest_images(index, self.model, listing, options, wait=wait, vectors=given)

    def ids(self, where: str | None = None) -> list[str]:
        """Return the ids of images that pass a filter, in the order in which they were added."""
        return [str(name) for batch in self.index.scan(["id"], where) for name in batch["id"]]

    def delete(self, ids: object) -> int:
        """Remove images, given by id, path or hit, from the gallery and return how many existed; files stay."""
        return self.index.delete(resolve_ids(self.index, row_ids(ids), missing_files=True))

    @names_arguments
    def search(  # noqa: PLR0913 - all but the query are optional
        self,
        image: object = None,
        text: str | None = None,
        k: int = 10,
        where: str | None = None,
        *,
        vector: object = None,
        terms: object = (),
        liked: object = (),
        disliked: object = (),
        exclude: object = (),
        mode: SearchMode = "auto",
        thumbnails: bool = True,
        min_score: float | Literal["auto"] | None = None,
        offset: int = 0,
    ) -> SearchResult:
        """Find images.

        Args:
            image: A photo or sketch, or several, in any form that `as_image` accepts, or the path of a file with a
                region, such as `a.jpg#10%,20%,50%,50%` (x, y, width, height). Several are combined into the mean of
                their embeddings.
            text: The modification text of an image, or a text query alone.
            k: Number of hits.
            where: A filter on columns, such as `class = 'dog' and year > 2020`; see `gallery.engines.filters`.
            vector: An embedding of the model, as an array or a file (see `read_vectors`). It counts as a term of
                weight 1, and its scores are not calibrated.
            terms: Further images and texts with weights, such as `[("golden retriever", 2), (image, 1), ("fruit",
                -1)]`, or `((image, text), 2)`: the query is the normalized weighted sum of the unit embeddings, in
                which `image` and `text` count with weight 1. For the forms see `gallery.queries.parse_term`.
            liked: Results to move towards: ids, paths or hits. They are a query of their own too.
            disliked: Results to move away from; they are not among the hits.
            exclude: Images that are not among the hits, such as the query itself.
            mode: `exact`, `ann` (approximate) or `auto`.
            thumbnails: Whether hits have thumbnails.
            min_score: Lowest score of a hit; `auto` for `near_score`. Scores of images, texts and both are not
                comparable; see docs/searching.md.
            offset: Number of best hits to leave out, for the next page of the same search.

        Returns:
            The hits, best first; fewer than k if fewer images pass the filter and `min_score`; `nothing_near` if
            none has the score. Equal scores are ordered by the first addition of the images.

        Raises:
            ConfigError: If the query is empty or the filter invalid.
            ImageError: If an image cannot be read.
            DataError: If a liked or disliked image is not in the gallery.
        """
        query = {"image": image, "text": text, "vector": vector, "terms": terms, "liked": liked}
        query |= {"disliked": disliked, "exclude": exclude}
        return self.search_many(
            [query], k, where, mode=mode, thumbnails=thumbnails, min_score=min_score, offset=offset
        )[0]

    @names_arguments
    def search_many(
        self,
        queries: Sequence[Mapping[str, Any]],
        k: int = 10,
        where: str | None = None,
        *,
        mode: SearchMode = "auto",
        thumbnails: bool = True,
        names: Sequence[str] | None = None,
        min_score: float | Literal["auto"] | None = None,
        offset: int = 0,
    ) -> list[SearchResult]:
        """Find images for many queries at once; returns one result per query.

        Each query has some of `image`, `text`, `vector`, `terms`, `liked`, `disliked` and `exclude`, which are, like
        all other arguments, those of `search`. `names` are names of the queries in errors, by default `query 1` and so
        on.
        """
        for name, number, least in (("k", k, 1), ("offset", offset, 0)):
            check_count(name, number, least)
        if isinstance(queries, str | Mapping) or not isinstance(queries, Sequence):
            raise ConfigError("invalid value for queries (expected a list of fields such as {'text': 'a dog'})")
        if names is not None and len(names) != len(queries):
            raise ConfigError(f"got {len(names)} names for {len(queries)} queries (expected one for each)")
        if names is None:
            names = [""] if len(queries) == 1 else [f"query {number}" for number in range(1, len(queries) + 1)]
        parsed = []
        for given, name in zip(queries, names, strict=True):
            with named_errors(name):
                parsed.append(parse_query(given))
        if not parsed:
            return []
        index = self.index
        parsed = resolve_queries(index, parsed)
        feedback = read_feedback(index, parsed, names, self.model.backbone.dim)
        embedded = widen_queries(*embed_gallery_queries(self.model, parsed, feedback, names), index.metadata)
        lowest = self._lowest_scores(parsed, names, min_score)
        columns = [name for name in sorted(index.columns) if thumbnails or name != THUMBNAIL]
        groups: dict[int, list[int]] = {}
        for i, query in enumerate(parsed):  # rounded up, so that queries form few groups
            excluded = len(query.excluded)
            groups.setdefault(1 << (excluded - 1).bit_length() if excluded else 0, []).append(i)
        results: dict[int, SearchResult] = {}
        for extra, members in groups.items():
            found = index.search(embedded[members], offset + k + extra, where=where, mode=mode, columns=columns)
            for i, hits in zip(members, found, strict=True):
                results[i] = make_result(hits, k, parsed[i].excluded, lowest[i], offset)
        return [results[i] for i in range(len(parsed))]

    def _lowest_scores(
        self, queries: Sequence[GalleryQuery], names: Sequence[str], min_score: float | Literal["auto"] | None
    ) -> Sequence[float | None]:
        given: object = min_score
        number = not isinstance(given, bool) and isinstance(given, Real) and math.isfinite(given)
        if given not in (None, "auto") and not number:
            raise ConfigError(f"invalid value for min_score: {min_score!r} (expected a number or auto)")
        if min_score != "auto":
            return [min_score] * len(queries)
        kinds = []
        for query, name in zip(queries, names, strict=True):
            with named_errors(name):
                kinds.append(query_kind(query))
        scores = {kind: self.near_score(kind) for kind in dict.fromkeys(kinds)}
        return [scores[kind] for kind in kinds]

    def near_score(self, kind: QueryKind) -> float:
        """Return the score that random queries of a kind exceed in 1 % of the cases, for `min_score="auto"`.

        It is measured at the first use, for which some hundred images or texts are embedded, and again when the number
        of images has changed by a tenth. Beside an index on this disk it is stored as `INDEX.min_score.json`.

        Args:
            kind: `text`, `image` or `image + text`. Thresholds of kinds are not comparable.

        Raises:
            ConfigError: If the kind is unknown, or there are fewer than 100 images or no images of theirs.
        """
        path = local_path(self._full_uri)
        stored = None if path is None else Path(f"{path}.min_score.json")
        return near_score(self.index, self.model, kind, self._near, stored)

    def duplicates(self, threshold: float | int | None = THRESHOLD, where: str | None = None) -> list[SearchResult]:
        """Find groups of near duplicates, see `find_duplicates`; nothing is removed."""
        return find_duplicates(self.index, threshold, where)

    def describe(self) -> dict[str, Any]:
        """Return the location of the gallery, its number of images, its columns and its model."""
        index = self._index
        metadata = self.metadata if index is None else index.metadata
        return {
            "uri": self.uri,
            "images": len(self),
            "dim": self.model.backbone.dim,
            "calibration": (self._calibration or 0.0) if index is None else stored_weight(metadata),
            "columns": {} if index is None else dict(index.columns),
            **{name: metadata.get(name) for name in ("model", "fingerprint", "checkpoint", "weights")},
        }

    def optimize(self) -> None:
        """Build or update the approximate index and compact the storage."""
        self.index.optimize()

    def optimise(self) -> None:
        """Deprecated alias of `optimize`."""
        warnings.warn("Gallery.optimise is deprecated; use Gallery.optimize", DeprecationWarning, stacklevel=2)
        self.optimize()

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    def __repr__(self) -> str:
        model = Path(self._checkpoint).name if self._checkpoint else self.model.backbone.name
        try:
            mode = "exact" if self._index is None else self._index.auto_mode()
            return f"Gallery({self.uri!r}, {len(self):,} images, model {model}, {mode})"
        except UnionError:  # the index is gone or its server is unreachable: a repr does not fail
            return f"Gallery({self.uri!r}, unreachable, model {model})"

    def close(self) -> None:
        """Close the index."""
        if self._index is not None:
            self._index.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _is_source(images: object) -> bool:
    """Whether images are given by a folder, a pattern, a list file or tar shards."""
    if not isinstance(images, str | Path):
        return False
    path = absolute_path(images)
    if not os.path.lexists(path):
        return re.search(r"[*?\[{]", path) is not None
    return is_folder(path) or path.lower().endswith(".tar") or is_list(path)
