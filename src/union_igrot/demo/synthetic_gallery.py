"""The generated world as a gallery: drawn, embedded once, held in memory.

Knows models, features and the world. Does not know pages, turns or users.
"""

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
from union_igrot.features.extractor import Encoder
from union_igrot.gallery.engines.base import ColumnValue, Rows
from union_igrot.gallery.engines.memory import MemoryIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir
from union_igrot.types import GalleryItem, ImageSource

QUERIES: Final = 1000
"""Queries whose galleries are shown, some 6,000 pictures, which two cores embed in a quarter of a minute."""
_STEP: Final = 256


@final
class SyntheticItems(ItemRenderer):
    """Pictures that are drawn when they are looked at.

    Args:
        items: The pictures; captions are their titles.
    """

    title = "a generated world of coloured shapes"
    hint = "The model knows “make the star blue”, “remove the house”, “put it on sand”, “add a red circle on the left”."
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
        return DisplayedImage(name, str(columns["caption"]), _small(self._images[name]), score, None, details)  # type: ignore[arg-type]  # the world's pictures are frozen values

    def picture(self, name: str, columns: Mapping[str, ColumnValue]) -> Image.Image:
        """See `ItemRenderer`."""
        del columns
        return open_image(self._images[name])


@final
class SyntheticGallery:
    """The generated world's test galleries of both tasks as one gallery, for any number of models.

    Args:
        queries: Composed queries whose gallery is taken; as many photos of single things are added.
    """

    def __init__(self, queries: int = QUERIES) -> None:
        cir = shapes_cir("test", queries, distractors=queries // 4)
        sbir = shapes_sbir("test", 1, gallery=queries)
        pictures = [*cir.gallery, *sbir.gallery]
        self.items = [replace(item, id=f"photo-{number:05d}") for number, item in enumerate(pictures)]

    def engine(self, name: str, model: IGROTModel, encoder: Encoder) -> GalleryBackend:
        """Embed it with a model.

        Args:
            name: What the model is called on the page.
            model: The model.
            encoder: Of the model's backbone; pictures pass it once, and its store keeps their features.
        """
        sources = [item.image for item in self.items]
        keys = encoder.fill_images(sources, tokens=model.target.needs_tokens, what="the generated world")
        rows = MemoryIndex(model.backbone.dim)
        columns = {"class": [item.label for item in self.items], "caption": [item.caption for item in self.items]}
        rows.upsert(Rows([item.id for item in self.items], _embedded(model, encoder, keys), columns))
        return GalleryBackend(Gallery(rows, model, rows.uri), rows, SyntheticItems(self.items), name)


@lru_cache(8192)
def _small(source: ImageSource) -> bytes:
    """Draw a picture once, not in every answer: 5 kB each, 40 MB in all."""
    return encode_thumbnail(open_image(source))


@torch.inference_mode()
def _embedded(model: IGROTModel, encoder: Encoder, keys: Sequence[str]) -> Float[Tensor, "gallery dim"]:
    tokens = model.target.needs_tokens
    steps = range(0, len(keys), _STEP)
    return torch.cat([model.embed_gallery(encoder.lookup(keys[at : at + _STEP], tokens=tokens)).cpu() for at in steps])
