"""`Gallery`: images of one's own, indexed with a model and searched with images, sketches and text.

Joins model, index and indexing. Does not know how an engine keeps rows, how images are decoded
ahead, nor how results are drawn.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final, get_args

from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.gallery.additions import listing_of
from union_igrot.gallery.engines.base import SearchMode, VectorIndex
from union_igrot.gallery.engines.factory import open_index, without_password
from union_igrot.gallery.ingest.entries import Listing
from union_igrot.gallery.ingest.report import IngestOptions, IngestReport
from union_igrot.gallery.ingest.sources import list_images
from union_igrot.gallery.lookup import judged_rows, named_rows, rows_named
from union_igrot.gallery.metadata import (
    check_backbone_name,
    check_metadata,
    index_metadata,
    load_checkpoint,
    load_recorded_model,
    open_or_create,
)
from union_igrot.gallery.queries import Wanted, all_wanted, embed_wanted, ids_of, several
from union_igrot.gallery.results import THUMBNAIL, SearchResult, search_result
from union_igrot.models.devices import resolve_device
from union_igrot.models.model import IGROTModel
from union_igrot.storage.paths import absolute_path

_MEMORY = "memory:"


@final
class Gallery:
    """Images that can be searched.

    Made by `Gallery.open`. Belongs to one thread; several processes may have one index open at once.

    Args:
        index: Where the rows lie; None until the first image is added.
        model: The model that embeds images and queries.
        uri: Where the index lies or will lie.
        checkpoint: Where the model is loaded from, for the index's metadata.
        weights: Weights of its backbone, where they were named, for the metadata too.
    """

    def __init__(
        self,
        index: VectorIndex | None,
        model: IGROTModel,
        uri: str,
        checkpoint: str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.model, self.uri = model.eval(), without_password(uri)
        self._where, self._index, self._origin = uri, index, (checkpoint, weights)
        self._card: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        uri: str | Path,
        model: IGROTModel | str | Path | None = None,
        *,
        create: bool = True,
        weights: str | Path | None = None,
        device: str = "auto",
    ) -> "Gallery":
        """Open a gallery.

        Args:
            uri: Where its index lies: a folder `photos.lance`, an object store `s3://bucket/photos.lance`, a cluster
                `milvus://host:19530/collection`, or `memory:`, which ends with the process.
            model: A model, or the name of one, as `load` has it: `tiny`, a folder, a repository, a backbone alone.
                Where None, the one that the index says it was made with.
            create: What to do where there is no index. True: one on this machine is made by the first `add` or
                `update`, and until then nothing is written; one on a server or object store is made now. False: it
                is an error. `memory:` is always made.
            weights: Weights of the backbone, where a model is loaded by name.
            device: Where such a model is put: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, `mps`. A
                model that is given stays where it lies.

        Returns:
            The gallery.

        Raises:
            CheckpointError: Where the index was made with another model; names both.
            ConfigError: Where there is no index and none is to be made, the URI's engine is not installed, or there
                is no such device.
            DataError: Where it cannot be read or reached.
        """
        uri = str(uri)
        checkpoint = None
        if ":" not in uri:
            uri = absolute_path(uri)  # whoever changes the folder later means the same gallery
        if isinstance(model, str | Path):
            check_backbone_name(uri, str(model))
            model, checkpoint = load_checkpoint(model, weights)
            model.to(resolve_device(device))
        absent = uri == _MEMORY or (create and ":" not in uri and not os.path.exists(uri))  # noqa: PTH110 - Path's raises for long names
        if absent and model is None:
            raise ConfigError(f"{uri} has to be made: give a model, such as 'tiny'")
        if model is not None and (absent or create):
            gallery = cls(None, model, uri, checkpoint, weights)
            if not absent:
                gallery._made()
            return gallery
        index = open_index(uri)
        try:
            if model is None:
                model, checkpoint = load_recorded_model(index.metadata, uri, weights)
                model.to(resolve_device(device))
            gallery = cls(index, model, uri, checkpoint, weights)
            check_metadata(index.metadata, gallery.metadata, index.uri)
        except BaseException:
            index.close()
            raise
        return gallery

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What says which model this is; see `index_metadata`."""
        if not self._card:  # once: all weights are hashed for it
            self._card = index_metadata(self.model, *self._origin)
        return self._card

    def _made(self) -> VectorIndex:
        """Return the index, made if it is not there yet."""
        if self._index is None:
            self._index = open_or_create(self._where, self.model.backbone.dim, self.metadata)
        return self._index

    @property
    def index(self) -> VectorIndex:
        """Where the rows lie, for what a gallery does not do itself.

        Raises:
            DataError: Where there is none yet.
        """
        if self._index is None:
            raise DataError(f"there is no gallery at {self.uri} yet; add images first, or check its name")
        return self._index

    def add(
        self,
        images: object,
        ids: Iterable[str] | None = None,
        columns: Mapping[str, Iterable[Any]] | None = None,
        *,
        on_broken: Literal["fail", "skip"] | None = None,
        options: IngestOptions | None = None,
    ) -> IngestReport:
        """Add images, or bring those of the same id up to date.

        Args:
            images: One or several, in any form that `as_image` takes: paths, PIL images, bytes, open files,
                arrays, tensors.
            ids: What they are called; a file's absolute path, and `sha256:` with the hash of its content for a
                image that is no file, where None.
            columns: Values to keep beside them by column name, one an image. Of an image that is there already,
                columns that are not given keep their values; None empties one.
            on_broken: Whether an image that cannot be read is an error, or listed and left out; None for what `options`
                say, or an error.
            options: How to do it; for large additions.

        Returns:
            How many were added, updated, unchanged and left out. A row that is right is not embedded again.

        Raises:
            ImageError: Where an image cannot be read, under `fail`; what was embedded before it is kept.
            DataError: Where ids repeat, or ids or columns are not as many as images.
            UnionError: Where another process is putting images into the gallery.
        """
        listing = listing_of(several(images), ids, columns)
        options = options or IngestOptions(workers=0, progress=False, on_broken="fail")
        return self._ingest(listing, replace(options, on_broken=on_broken or options.on_broken, prune=False))

    def update(
        self,
        images: str | Path,
        options: IngestOptions | None = None,
        *,
        executor: Literal["local", "ray"] | None = None,
    ) -> IngestReport:
        """Bring the gallery up to date with a folder: new and changed files are embedded, files that are gone leave.

        Args:
            images: A folder (with all below), a pattern, a list or tar shards, as `union-index images=` takes them.
            options: How to do it.
            executor: `local` or `ray`; None for what `options` say.

        Returns:
            How many were added, updated, unchanged, removed and left out since they cannot be read.
        """
        options = options or IngestOptions()
        return self._ingest(list_images(str(images)), replace(options, executor=executor or options.executor))

    def _ingest(self, listing: Listing, options: IngestOptions) -> IngestReport:
        from union_igrot.gallery.ingest.pipeline import ingest_images  # noqa: PLC0415 - which no search needs

        index = self._made()
        return ingest_images(index, self.model, listing, options)

    def ids(self, where: str | None = None) -> list[str]:
        """Name the images that pass a filter, in the order in which they were added.

        Raises:
            ConfigError: Where the filter is wrong.
        """
        return [str(name) for batch in self.index.scan(["id"], where) for name in batch["id"]]

    def delete(self, ids: object) -> int:
        """Remove images from the gallery; files stay.

        Args:
            ids: Ids, paths or hits, one or several.

        Returns:
            How many of them were there.
        """
        return self.index.delete(rows_named(self.index, ids_of(ids), gone=True))

    def search(
        self,
        image: object = None,
        text: str | None = None,
        k: int = 10,
        where: str | None = None,
        *,
        liked: object = (),
        disliked: object = (),
        exclude: object = (),
        mode: SearchMode = "auto",
        thumbnails: bool = True,
    ) -> SearchResult:
        """Find images.

        Args:
            image: A photo or a sketch, or several, in any form that `as_image` takes. Several are asked as the mean
                of their embeddings.
            text: With an image, what should be different; alone, what is looked for.
            k: How many answers.
            where: A filter on columns, `class = 'dog' and year > 2020`; see `index.where`.
            liked: Results to come closer to: ids, paths or hits. They alone are a query too.
            disliked: Results to go away from; they are not among the answers.
            exclude: Rows that are not among the answers, such as the query itself.
            mode: `exact`, `ann` (approximate) or `auto`.
            thumbnails: Whether small images are read along.

        Returns:
            The answers, best first; fewer than k where fewer images pass the filter.

        Raises:
            ConfigError: Where nothing is asked, or the filter is wrong.
            ImageError: Where an image cannot be read.
            DataError: Where a liked or disliked image is not in the gallery.
        """
        given = {"image": image, "text": text, "liked": liked, "disliked": disliked, "exclude": exclude}
        return self.search_many([given], k, where, mode=mode, thumbnails=thumbnails)[0]

    def search_many(
        self,
        queries: Sequence[Mapping[str, Any]],
        k: int = 10,
        where: str | None = None,
        *,
        mode: SearchMode = "auto",
        thumbnails: bool = True,
        names: Sequence[str] | None = None,
    ) -> list[SearchResult]:
        """Find images for many queries at once.

        Args:
            queries: Each with some of `image`, `text`, `liked`, `disliked` and `exclude`, as `search` takes them.
            k: How many answers to each.
            where: A filter for all of them.
            mode: `exact`, `ann` or `auto`.
            thumbnails: Whether small images are read along.
            names: What the queries are called in an error; `query 1` and so on where None and there are several.

        Returns:
            The answers to each query, in order.

        Raises:
            ConfigError: As `search`; says which query.
        """
        if type(k) is not int or k < 1:
            raise ConfigError(f"k is {k}; ask for a whole number of answers, at least 1")
        if mode not in get_args(SearchMode):
            raise ConfigError(f"mode is {mode!r}; give one of {', '.join(get_args(SearchMode))}")
        if names is None:
            names = [""] if len(queries) == 1 else [f"query {place}" for place in range(1, len(queries) + 1)]
        wanted = all_wanted(queries, names)
        if not wanted:
            return []
        index = self.index
        wanted = named_rows(index, wanted)
        embedded = embed_wanted(self.model, wanted, judged_rows(index, wanted, names, self.uri), names)
        columns = [name for name in sorted(index.columns) if thumbnails or name != THUMBNAIL]
        answers: dict[int, SearchResult] = {}
        groups: dict[int, list[int]] = {}
        for place, one in enumerate(wanted):
            groups.setdefault(_spare(one), []).append(place)
        for spare, places in groups.items():  # each reads as many rows more as the one that leaves out most
            found = index.search(embedded[places], k + spare, where=where, mode=mode, columns=columns)
            answers |= {at: search_result(hits, k, wanted[at].without) for at, hits in zip(places, found, strict=True)}
        return [answers[at] for at in range(len(wanted))]

    def describe(self) -> dict[str, Any]:
        """Say what the gallery is: where it lies, how many images and which columns it has, and its model."""
        index = self._index
        metadata = self.metadata if index is None else index.metadata
        return {
            "uri": self.uri,
            "pictures": len(self),
            "dim": self.model.backbone.dim,
            "columns": {} if index is None else dict(index.columns),
            **{name: metadata.get(name) for name in ("model", "fingerprint", "checkpoint", "weights")},
        }

    def optimize(self) -> None:
        """Build or renew the approximate index and tidy the storage."""
        self.index.optimize()

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    def __repr__(self) -> str:
        try:
            count = f"{len(self):,} images"
        except UnionError:  # the index is gone, or its server away: no reason to fail where something is shown
            count = "not to be reached"
        return f"Gallery({self.uri!r}: {count}, {self.model.backbone.name})"

    def close(self) -> None:
        """Let go of the index."""
        if self._index is not None:
            self._index.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _spare(one: Wanted) -> int:
    """Return how many rows more than asked are read, so that what is left out leaves enough: few different numbers."""
    return 0 if not one.without else 1 << (len(one.without) - 1).bit_length()
