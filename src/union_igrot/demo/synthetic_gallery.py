"""The generated world as a gallery in memory."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from union_igrot.demo.backends import Columns, DisplayedImage, GalleryBackend
from union_igrot.demo.uploads import encode_thumbnail
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.gallery.engines.base import Rows
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
class SyntheticBackend(GalleryBackend):
    """Images that are rendered on demand; captions are their titles.

    Args:
        gallery: The gallery.
        name: Name of the method on the page.
        items: Its images.
    """

    hint = "Try “make the star blue”, “remove the house”, “put it on sand”, “add a red circle on the left”."
    example = "class = 'star' or caption like '%red%'"
    pixelated = True
    thumbnails = False

    def __init__(self, gallery: Gallery, name: str, items: Sequence[GalleryItem]) -> None:
        super().__init__(gallery, "a generated world of colored shapes", name)
        self._images = {item.id: item.image for item in items}

    def _show(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> DisplayedImage:
        del jpeg
        details = {"class": str(columns["class"])} if columns.get("class") is not None else {}
        return DisplayedImage(name, str(columns["caption"]), _thumbnail(self._images[name]), score, None, details)  # type: ignore[arg-type]  # images are hashable

    def _decode(self, name: str, columns: Columns) -> Image.Image:
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

    def backend(self, name: str, model: IGROTModel, extractor: FeatureExtractor) -> SyntheticBackend:
        """Embed the gallery with a model.

        Args:
            name: Name of the method on the page.
            model: The model.
            extractor: Encodes images with the model's backbone and caches their features.
        """
        sources = [item.image for item in self.items]
        keys = extractor.extract_images(sources, tokens=model.target.needs_tokens, label="the generated world")
        rows = MemoryIndex(model.backbone.dim)
        columns = {"class": [item.label for item in self.items], "caption": [item.caption for item in self.items]}
        rows.upsert(Rows([item.id for item in self.items], _embed(model, extractor, keys), columns))
        return SyntheticBackend(Gallery(rows, model, rows.uri), name, self.items)


@lru_cache(8192)
def _thumbnail(source: ImageSource) -> bytes:
    """Render each image once: 5 kB each, 40 MB in total."""
    return encode_thumbnail(open_image(source))


@torch.inference_mode()
def _embed(model: IGROTModel, extractor: FeatureExtractor, keys: Sequence[str]) -> Float[Tensor, "gallery dim"]:
    tokens = model.target.needs_tokens
    steps = range(0, len(keys), _STEP)
    return torch.cat(
        [model.embed_gallery(extractor.lookup(keys[at : at + _STEP], tokens=tokens)).cpu() for at in steps]
    )
