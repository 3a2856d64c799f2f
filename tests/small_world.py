"""A small seeded backbone that counts its passes, and small benchmarks of noise, shared by the tests."""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.factory import build_query_head, build_target_head
from union_igrot.models.model import IGROTModel
from union_igrot.types import Benchmark, Features, GalleryItem, Preprocess, Protocol, Query, TrainingSet, Triplet

DIM = 16
TRANSAGG = {"layers": 1, "heads": 2, "feedforward": 32}
UNION = {"layers": 1, "heads": 2, "feedforward": 32}
WORDS = ("red", "blue", "large", "small", "remove", "the", "square", "night")


@final
class LinearBackbone(Backbone):
    """Linear on flattened 8 x 8 images, a table of hashed words; counts its calls.

    Attributes:
        image_batches: Size of each batch of images.
        text_batches: Texts of each batch.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.name, self.dim = "linear", DIM
        self.preprocess = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
        self.pixels = nn.Parameter(torch.randn(3 * 8 * 8, DIM, generator=generator) / 8)
        self.rows = nn.Parameter(torch.randn(3 * 8, DIM, generator=generator) / 3)
        self.words = nn.Parameter(torch.randn(64, DIM, generator=generator))
        self.image_batches: list[int] = []
        self.text_batches: list[list[str]] = []
        self.freeze()

    def encode_image(self, images: Tensor) -> Features:
        """Five tokens: the whole image, then every second row."""
        self.image_batches.append(len(images))
        pooled = images.flatten(1) @ self.pixels
        strips = images[:, :, ::2].transpose(1, 2).flatten(2) @ self.rows
        tokens = torch.cat([pooled[:, None], strips], dim=1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(pooled, tokens, mask, torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))

    def encode_text(self, texts: Sequence[str]) -> Features:
        """One token a word and one at the end, which is their mean and the text's embedding."""
        self.text_batches.append(list(texts))
        split = [text.split() for text in texts]
        longest = max(map(len, split)) + 1
        tokens = torch.zeros(len(texts), longest, DIM, device=self.device)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool, device=self.device)
        for row, words in enumerate(split):
            known = self.words[[0, *(1 + zlib.crc32(word.encode()) % 63 for word in words)]]
            tokens[row, : len(words)] = known[1:]
            tokens[row, len(words)] = known.mean(0)
            mask[row, : len(words) + 1] = True
        end = mask.sum(1) - 1
        return Features(tokens[torch.arange(len(texts)), end], tokens, mask, end)


@dataclass(frozen=True)
class Noise:
    """An image of seeded noise: of its group's pattern, more or less."""

    number: int
    group: int = 0

    @property
    def key(self) -> str:
        return f"noise/{self.group}/{self.number}"

    def open(self) -> Image.Image:
        common = np.random.default_rng(self.group).integers(0, 256, (8, 8, 3))
        own = np.random.default_rng([self.group, self.number]).integers(0, 256, (8, 8, 3))
        return Image.fromarray((0.6 * common + 0.4 * own).astype(np.uint8))


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))


def cir_benchmark(queries: int = 23, gallery: int = 31, seed: int = 0, name: str = "noise_cir") -> Benchmark:
    """Composed queries with exclusions, subsets and tags; query 3 has no target, query 5 no subset."""
    rng = random.Random(seed)
    items = tuple(GalleryItem(f"g{i}", Noise(1000 + i, i % 7)) for i in range(gallery))
    done = []
    for i in range(queries):
        names = [item.id for item in items]
        reference, *rest = rng.sample(names, 7)
        targets = () if i == 3 else tuple(rest[: rng.randint(1, 3)])
        subset = None if i == 5 else (reference, *rest[: rng.randint(3, 6)])
        image = items[int(reference[1:])].image
        done.append(Query(f"q{i}", image, sentence(rng), targets, (reference,), subset, tags=(f"tag{i % 2}",)))
    metrics = ("R@1", "R@5", "P@3", "mAP", "mAP@5", "Rs@1", "Rs@2")
    return Benchmark(
        name,
        "val",
        "cir",
        tuple(done),
        items,
        Protocol("noise", metrics, "mAP", exclude_reference=True, ties="gallery order"),
    )


def sbir_benchmark(queries: int = 25, gallery: int = 29, classes: int = 4, name: str = "noise_sbir") -> Benchmark:
    """Sketch queries of unequal classes under a macro average; queries of a class share one tuple of targets."""
    labels = [f"class{min(i % (classes + 2), classes - 1)}" for i in range(max(queries, gallery))]
    kinds = [int(label.removeprefix("class")) for label in labels]
    items = tuple(GalleryItem(f"p{i}", Noise(2000 + i, kinds[i]), labels[i]) for i in range(gallery))
    targets = {label: tuple(item.id for item in items if item.label == label) for label in set(labels)}
    done = tuple(
        Query(f"s{i}", Noise(3000 + i, kinds[i]), None, targets[labels[i]], label=labels[i]) for i in range(queries)
    )
    protocol = Protocol("noise", ("mAP", "mAP@10", "P@5", "R@1"), "mAP", average="macro", ties="gallery order")
    return Benchmark(name, "val", "sbir", done, items, protocol)


def triplets(cir: int = 40, sbir: int = 20, seed: int = 0) -> TrainingSet:
    """Samples of both tasks: the target is of the reference's group."""
    rng = random.Random(seed)
    samples = [
        Triplet(Noise(i, i % 10), sentence(rng), Noise(100 + i, i % 10), f"scene{i % 10}", "cir") for i in range(cir)
    ]
    samples += [
        Triplet(Noise(400 + i, i % 4), None, Noise(500 + i, i % 4), f"shape{i % 4}", "sbir") for i in range(sbir)
    ]
    return TrainingSet("noise", tuple(samples))


def extractor(folder: Path, backbone: Backbone | None = None, batch_size: int = 8, shard: int = 16) -> FeatureExtractor:
    backbone = backbone or LinearBackbone()
    store = FeatureStore(folder, backbone.fingerprint())
    return FeatureExtractor(backbone, store, batch_size=batch_size, workers=0, shard=shard, progress=False)


def trainable(
    fusion: str = "transagg",
    target: str = "union",
    backbone: Backbone | None = None,
    seed: int = 0,
    dropout: float = 0.0,
) -> IGROTModel:
    torch.manual_seed(seed)
    options = {**TRANSAGG, "dropout": dropout} if fusion == "transagg" else {}
    mixture = {**UNION, "dropout": dropout, "encoder_dropout": dropout} if target == "union" else {}
    backbone = backbone or LinearBackbone()
    return IGROTModel(backbone, build_query_head(fusion, DIM, **options), build_target_head(target, DIM, **mixture))
