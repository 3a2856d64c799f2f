"""A gallery of twelve images of noise, and a slow, literal ranking of them."""

import numpy as np
import torch
from PIL import Image

from small_world import Noise
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import SearchResult
from union_igrot.images.transforms import image_batch

COUNT = 12


def picture(number: int) -> Image.Image:
    return Noise(number, number % 4).open()


def names(count: int = COUNT) -> list[str]:
    return [f"p{number}" for number in range(count)]


def filled(model) -> Gallery:
    made = Gallery.open("memory:", model)
    columns = {"class": ["cat", "dog", None] * (COUNT // 3), "year": list(range(COUNT))}
    made.add([picture(number) for number in range(COUNT)], names(), columns)
    return made


@torch.inference_mode()
def embedded(model, numbers, texts=None) -> torch.Tensor:
    return model.embed_queries(image_batch([picture(n) for n in numbers], model.preprocess), texts)


@torch.inference_mode()
def ranked(model, query, numbers=range(COUNT)) -> list[tuple[str, float]]:
    """Every image's score with a query, one by one, best first."""
    rows = model.embed_gallery(image_batch([picture(n) for n in numbers], model.preprocess))
    scores = [(f"p{number}", float(query @ row)) for number, row in zip(numbers, rows, strict=True)]
    return sorted(scores, key=lambda pair: -pair[1])


def same(answers: SearchResult, wanted: list[tuple[str, float]]) -> bool:
    return answers.ids == [name for name, _ in wanted] and np.allclose(
        answers.scores, [value for _, value in wanted], atol=1e-5
    )
