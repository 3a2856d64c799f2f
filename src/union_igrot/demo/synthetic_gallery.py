"""The generated world as a gallery in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from union_igrot.demo.backends import DisplayedImage
from union_igrot.demo.gallery_backend import GalleryBackend, ItemRenderer
from union_igrot.demo.uploads import encode_thumbnail
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.gallery.engines.base import ColumnValue, Rows
from union_igrot.gallery.engines.memory import MemoryIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir
from union_igrot.types import GalleryItem, ImageSource

QUERIES: Final = 1000
"""Queries whose gallery is used, about 6,000 images, embedded in 15 s on two cores."""
_STEP: Final = 256


@final
class SyntheticItems(ItemRenderer):
    """Images that are rendered on demand.

    Args:
        items: The images; captions are their titles.
    """

    title = "a generated world of colored shapes"
    hint = "Try “make the star blue”, “remove the house”, “put it on sand”, “add a red circle on the left”."
    example = "class = 'star' or caption like '%red%'"
    pixelated = True
    thumbnails = False

    def __init__(self, items: Sequence[GalleryItem]) -> None:
        self._images = {item.id: item.image for item in items}

    def answer(
        self, name: str, columns: Mapping[str, ColumnValue], jpeg: bytes | None, score: float | None = None
    ) -> DisplayedImage:
        """See `ItemRenderer`."""
        del jpeg
        details = {"class": str(columns["class"])} if columns.get("class") is not None else {}
        return DisplayedImage(name, str(columns["caption"]), _small(self._images[name]), score, None, details)  # type: ignore[arg-type]  # the world's images are frozen values

    def image(self, name: str, columns: Mapping[str, ColumnValue]) -> Image.Image:
        """See `ItemRenderer`."""
        del columns
        return open_image(self._images[name])


@final
class SyntheticGallery:
    """The test galleries of both generated benchmarks as one gallery.

    Args:
        queries: Composed queries whose gallery is used; as many photos of single objects are added.
    """

    def __init__(self, queries: int = QUERIES) -> None:
        cir = shapes_cir("test", queries, distractors=queries // 4)
        sbir = shapes_sbir("test", 1, gallery=queries)
        images = [*cir.gallery, *sbir.gallery]
        self.items = [replace(item, id=f"photo-{number:05d}") for number, item in enumerate(images)]

    def engine(self, name: str, model: IGROTModel, extractor: FeatureExtractor) -> GalleryBackend:
        """Embed the gallery with a model.

        Args:
            name: Name of the model on the page.
            model: The model.
            extractor: Encodes images with the model's backbone and caches their features.
        """
        sources = [item.image for item in self.items]
        keys = extractor.extract_images(sources, tokens=model.target.needs_tokens, label="the generated world")
        rows = MemoryIndex(model.backbone.dim)
        columns = {"class": [item.label for item in self.items], "caption": [item.caption for item in self.items]}
        rows.upsert(Rows([item.id for item in self.items], _embedded(model, extractor, keys), columns))
        return GalleryBackend(Gallery(rows, model, rows.uri), rows, SyntheticItems(self.items), name)


@lru_cache(8192)
def _small(source: ImageSource) -> bytes:
    """Render each image once: 5 kB each, 40 MB in total."""
    return encode_thumbnail(open_image(source))


@torch.inference_mode()
def _embedded(model: IGROTModel, extractor: FeatureExtractor, keys: Sequence[str]) -> Float[Tensor, "gallery dim"]:
    tokens = model.target.needs_tokens
    steps = range(0, len(keys), _STEP)
    return torch.cat(
        [model.embed_gallery(extractor.lookup(keys[at : at + _STEP], tokens=tokens)).cpu() for at in steps]
    )
