"""The generated world as something to search: drawn, embedded once, held in memory.

Knows models, features and the world. Does not know pages, turns or users.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from union_igrot.data.shapes import shapes_cir, shapes_sbir
from union_igrot.data.transforms import open_picture, picture_batch
from union_igrot.demo.engines import Answer, Engine, sketch_room
from union_igrot.demo.pictures import encoded
from union_igrot.encode import Encoder
from union_igrot.errors import DataError
from union_igrot.index.exact import exact_topk
from union_igrot.model import IGROTModel
from union_igrot.types import GalleryItem, Source

QUERIES: Final = 1000
"""Queries whose galleries are shown: some 6,000 pictures, which two cores embed in a quarter of a minute."""
_STEP: Final = 256


@final
class WorldEngine(Engine):
    """The generated world, searched exactly.

    Args:
        name: What its method is called on the page.
        model: Embeds the queries.
        items: The pictures.
        vectors: Their embeddings by the same model.
    """

    gallery = "a generated world of coloured shapes"
    hint = "The model knows “make the star blue”, “remove the house”, “put it on sand”, “add a red circle on the left”."
    pixelated = True

    def __init__(
        self, name: str, model: IGROTModel, items: Sequence[GalleryItem], vectors: Float[Tensor, "gallery dim"]
    ) -> None:
        self.name, self.sketch_room = name, sketch_room(model)
        self._model, self._items, self._vectors = model, items, vectors
        self._places = {item.id: place for place, item in enumerate(items)}

    def __len__(self) -> int:
        return len(self._items)

    @torch.inference_mode()
    def search(
        self, picture: Image.Image | None, text: str | None, skip: int, count: int, exclude: str | None
    ) -> list[Answer]:
        """See `Engine`."""
        images = None if picture is None else picture_batch([picture], self._model.preprocess)
        query = self._model.embed_queries(images, [text])
        without = [self._places[exclude]] if exclude in self._places else []
        k = min(skip + count, len(self) - len(without))
        found = exact_topk(query, self._vectors, k, [without])
        pairs = zip(found.positions[0, skip:].tolist(), found.scores[0, skip:].tolist(), strict=True)
        return [self._answer(place, score) for place, score in pairs]

    def some(self, count: int, deal: int) -> list[Answer]:
        """See `Engine`."""
        places = random.Random(deal).sample(range(len(self)), min(count, len(self)))
        return [self._answer(place) for place in places]

    def answer(self, name: str) -> Answer:
        """See `Engine`."""
        return self._answer(self._place(name))

    def picture(self, name: str) -> Image.Image:
        """See `Engine`."""
        return open_picture(self._items[self._place(name)].image)

    def _place(self, name: str) -> int:
        if name not in self._places:
            raise DataError("This picture is not in the gallery.")
        return self._places[name]

    def _answer(self, place: int, score: float | None = None) -> Answer:
        item = self._items[place]
        details = {} if item.label is None else {"class": item.label}
        small = _small(item.image)  # type: ignore[arg-type]  # the world's pictures are frozen values
        return Answer(item.id, item.caption or item.id, small, score, None, details)


@final
class World:
    """The generated world's test galleries of both tasks as one gallery, for any number of models.

    Args:
        queries: Composed queries whose gallery is taken; as many photos of single things are added.
    """

    def __init__(self, queries: int = QUERIES) -> None:
        cir = shapes_cir("test", queries, distractors=queries // 4)
        sbir = shapes_sbir("test", 1, gallery=queries)
        pictures = [*cir.gallery, *sbir.gallery]
        self.items = [replace(item, id=f"photo-{number:05d}") for number, item in enumerate(pictures)]

    def engine(self, name: str, model: IGROTModel, encoder: Encoder) -> Engine:
        """Embed it with a model.

        Args:
            name: What the model is called on the page.
            model: The model.
            encoder: Of the model's backbone; pictures pass it once, and its store keeps their features.
        """
        tokens = model.target.needs_tokens
        sources = [item.image for item in self.items]
        keys = encoder.fill_pictures(sources, tokens=tokens, what="the generated world")
        return WorldEngine(name, model, self.items, _embedded(model, encoder, keys))


@lru_cache(8192)
def _small(source: Source) -> bytes:
    """Draw a picture once, not in every answer: 5 kB each, 40 MB in all."""
    return encoded(open_picture(source))


@torch.inference_mode()
def _embedded(model: IGROTModel, encoder: Encoder, keys: Sequence[str]) -> Float[Tensor, "gallery dim"]:
    tokens = model.target.needs_tokens
    steps = range(0, len(keys), _STEP)
    parts = [model.embed_gallery(encoder.lookup(keys[at : at + _STEP], tokens=tokens)) for at in steps]
    return torch.cat(parts)
