"""Galleries that the page searches: an index with a model, and the generated world."""

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from union_igrot.demo.session import decode_thumbnail, encode_thumbnail
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import THUMBNAIL, Hit, as_hits
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel
from union_igrot.service.uploads import KEPT_SIDE
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir
from union_igrot.types import GalleryItem, ImageSource

SAMPLE_POOL: Final = 20_000  # rows from which the images of the start page are sampled
_SYNTHETIC_QUERIES: Final = 1000  # queries whose gallery is used, about 6,000 images, embedded in 15 s on two cores
_STEP: Final = 256
_INTERNAL_COLUMNS: Final = {THUMBNAIL, "hash", "size", "mtime", "width", "height", "source"}
"""Columns that are not shown."""


@dataclass(frozen=True, slots=True)
class DisplayedImage:
    """A gallery image on the page."""

    id: str  # unique in its gallery
    title: str  # title on the page
    thumbnail: bytes  # a small PNG or JPEG
    score: float | None = None  # cosine similarity to the query, -1..1; None without a query
    path: str | None = None  # its file, or None
    details: Mapping[str, str] = field(default_factory=dict)


class GalleryBackend:
    """A gallery and a model that searches it. Used by one thread at a time."""

    name: str  # of the method
    gallery: str  # title of the gallery
    model: str
    hint: str = ""
    warning: str = ""  # a limit of the model for this gallery
    example: str = "width >= 1000"  # a filter
    sketch_scale: float = 1.0  # see `draw_strokes`
    pixelated: bool = False  # whether images are shown without smoothing
    thumbnails: bool = True  # whether the index holds them

    def __init__(self, gallery: Gallery, title: str, name: str = "") -> None:
        self.gallery, self.model = title, model_name(gallery.model)
        self.name = name or f"{title}: {self.model}"
        if gallery.model.backbone.name == "tiny":
            self.sketch_scale = 0.55  # relative size of the drawings that it was trained on
            if self.thumbnails:
                self.warning = (
                    "The bundled model only knows generated shapes; its results on photographs are arbitrary."
                )
        self._gallery, self._rows = gallery, gallery.index
        self._pool: list[str] = []

    def __len__(self) -> int:
        return len(self._gallery)

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that filters can use."""
        return ["id", *(name for name, kind in self._rows.columns.items() if kind != "bytes")]

    def search(
        self, skip: int, count: int, image: Image.Image | None = None, text: str | None = None, **query: Any
    ) -> list[DisplayedImage]:
        """Return the best results, best first, behind the first `skip`; the query is that of `Gallery.search`."""
        try:
            if marked := [*query.get("liked", ()), *query.get("disliked", ())]:
                self._rows.fetch(marked)
        except DataError:
            raise DataError(f"{self.gallery} no longer contains all marked images; clear the marks.") from None
        try:
            found = self._gallery.search(image, text, count, offset=skip, thumbnails=self.thumbnails, **query)
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "Filter ", 1)) from None
        return [self.show(hit) for hit in found]

    def show(self, hit: Hit) -> DisplayedImage:
        """Return a hit as the page shows it."""
        shown = {name: value for name, value in hit.columns.items() if name not in _INTERNAL_COLUMNS}
        details = {name: str(value) for name, value in shown.items() if value is not None}
        small = encode_thumbnail(Image.new("RGB", (8, 8), "grey")) if hit.jpeg is None else hit.jpeg
        return DisplayedImage(hit.id, Path(hit.id).name or hit.id, small, hit.score, hit.id, details)

    def sample(self, count: int, seed: int) -> list[DisplayedImage]:
        """Return some images to start from; deterministic in `seed`."""
        for fresh in (False, True):
            if fresh or not self._pool:
                names = (str(name) for batch in self._rows.scan(["id"]) for name in batch["id"])
                self._pool = list(islice(names, SAMPLE_POOL))
            chosen = random.Random(seed).sample(self._pool, min(count, len(self._pool)))
            with suppress(DataError):  # an image was removed meanwhile; read the ids again
                return self._items(chosen)
        raise DataError(f"{self.gallery} is being changed; try again in a moment.")

    def item(self, name: str) -> DisplayedImage:
        """Return one image by its id."""
        return self._items([name])[0]

    def image(self, name: str) -> Image.Image:
        """Decode one image by its id, or its thumbnail if there is no readable file."""
        return self._decode(*self._hits([name]))  # raises for a name that is not in the index: no other file is opened

    def _decode(self, hit: Hit) -> Image.Image:
        if hit.path is not None:
            with suppress(ImageError):
                return open_image(hit.path, at_least=KEPT_SIDE)
        if hit.jpeg is None:
            raise ImageError(f"{Path(hit.id).name} cannot be opened, and the index has no thumbnail of it.")
        return decode_thumbnail(hit.jpeg)

    def _hits(self, names: Sequence[str]) -> list[Hit]:
        rows = self._rows.fetch(names)
        return as_hits(rows.ids, [0.0] * len(names), rows.columns)

    def _items(self, names: Sequence[str]) -> list[DisplayedImage]:
        return [replace(self.show(hit), score=None) for hit in self._hits(names)]


def open_gallery(uri: str, checkpoint: str | None = None, device: str = "auto") -> Gallery:
    """Open an index that has images."""
    gallery = Gallery.open(uri, checkpoint, create=False, device=device)
    if not len(gallery):
        gallery.close()
        raise DataError(f"{uri} contains no images; add some with union-index")
    return gallery


def open_backend(uri: str, checkpoint: str | None = None, device: str = "auto") -> GalleryBackend:
    """Open an index for the page."""
    gallery = open_gallery(uri, checkpoint, device)
    return GalleryBackend(gallery, Path(gallery.uri).name)


def model_name(model: IGROTModel) -> str:
    """Return the names of a model's backbone and heads, such as `tiny, transagg + union`."""
    return f"{model.backbone.name}, {model.fusion.kind} + {model.target.kind}"


@final
class SyntheticBackend(GalleryBackend):
    """Images that are rendered on demand; captions are their titles."""

    hint = "Try “make the star blue”, “remove the house”, “put it on sand”, “add a red circle on the left”."
    example = "class = 'star' or caption like '%red%'"
    pixelated = True
    thumbnails = False

    def __init__(self, gallery: Gallery, name: str, items: Sequence[GalleryItem]) -> None:
        super().__init__(gallery, "a generated world of colored shapes", name)
        self._images = {item.id: item.image for item in items}

    def show(self, hit: Hit) -> DisplayedImage:
        """Return a hit, its image rendered again."""
        small = _rendered(self._images[hit.id])  # type: ignore[arg-type]  # images are hashable
        details = {"class": str(hit.columns["class"])} if hit.columns.get("class") is not None else {}
        return DisplayedImage(hit.id, str(hit.columns["caption"]), small, hit.score, None, details)

    def _decode(self, hit: Hit) -> Image.Image:
        return open_image(self._images[hit.id])


@final
class SyntheticGallery:
    """The test galleries of both generated benchmarks as one gallery."""

    def __init__(self, queries: int = _SYNTHETIC_QUERIES) -> None:
        cir = shapes_cir("test", queries, distractors=queries // 4)
        sbir = shapes_sbir("test", 1, gallery=queries)
        images = [*cir.gallery, *sbir.gallery]
        self.items = [replace(item, id=f"photo-{number:05d}") for number, item in enumerate(images)]

    def backend(self, name: str, model: IGROTModel, extractor: FeatureExtractor) -> SyntheticBackend:
        """Embed the gallery with a model."""
        sources = [item.image for item in self.items]
        keys = extractor.extract_images(sources, tokens=model.target.needs_tokens, label="the generated world")
        rows = MemoryIndex(model.backbone.dim)
        columns = {"class": [item.label for item in self.items], "caption": [item.caption for item in self.items]}
        rows.upsert(Rows([item.id for item in self.items], _embed(model, extractor, keys), columns))
        return SyntheticBackend(Gallery(rows, model, rows.uri), name, self.items)


@lru_cache(8192)
def _rendered(source: ImageSource) -> bytes:
    """Render each image once: 5 kB each, 40 MB in total."""
    return encode_thumbnail(open_image(source))


@torch.inference_mode()
def _embed(model: IGROTModel, extractor: FeatureExtractor, keys: Sequence[str]) -> Float[Tensor, "gallery dim"]:
    tokens = model.target.needs_tokens
    steps = range(0, len(keys), _STEP)
    return torch.cat(
        [model.embed_gallery(extractor.lookup(keys[at : at + _STEP], tokens=tokens)).cpu() for at in steps]
    )
