"""A gallery of twelve images of noise, and a slow ranking of them."""

import numpy as np
import torch
from PIL import Image

from small_world import Noise
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import SearchResult
from union_igrot.images.transforms import image_batch

COUNT = 12


def noise_image(number: int) -> Image.Image:
    return Noise(number, number % 4).open()


def names(count: int = COUNT) -> list[str]:
    return [f"p{number}" for number in range(count)]


def fill_gallery(model) -> Gallery:
    gallery = Gallery.open("memory:", model)
    columns = {"class": ["cat", "dog", None] * (COUNT // 3), "year": list(range(COUNT))}
    gallery.add([noise_image(number) for number in range(COUNT)], names(), columns)
    return gallery


@torch.inference_mode()
def embed_images(model, numbers, texts=None) -> torch.Tensor:
    return model.embed_queries(image_batch([noise_image(n) for n in numbers], model.preprocess), texts)


@torch.inference_mode()
def slow_ranking(model, query, numbers=range(COUNT)) -> list[tuple[str, float]]:
    """Score every image with a query, one by one; best first."""
    rows = model.embed_gallery(image_batch([noise_image(n) for n in numbers], model.preprocess))
    scores = [(f"p{number}", float(query @ row)) for number, row in zip(numbers, rows, strict=True)]
    return sorted(scores, key=lambda pair: -pair[1])


def agrees(result: SearchResult, expected: list[tuple[str, float]]) -> bool:
    return result.ids == [name for name, _ in expected] and np.allclose(
        result.scores, [value for _, value in expected], atol=1e-5
    )
