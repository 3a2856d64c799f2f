"""Images and texts through the frozen backbone, each once, into the feature store.

Token features of many images fill a disk: those of QuickDraw's 92,291 sketches take 9 GB from a CLIP ViT-B/32 and 73 GB
from a ViT-L/14 at 257 tokens. `FeatureExtractor.stream` yields them block by block and stores them only if all of them
fit a given size.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from union_igrot.features.store import FeatureStore
from union_igrot.images.dataset import load_pixels
from union_igrot.images.decode import image_key
from union_igrot.images.transforms import model_input
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.devices import default_workers, full_precision
from union_igrot.terminal import progress_bar
from union_igrot.types import Features, ImageSource

Precision = Literal["float32", "bfloat16", "float16"]


@final
class BufferedWriter:
    """Collects features until there are enough for one write to a store; flushes when its block is left.

    Args:
        store: The store.
        size: Items per write.
    """

    def __init__(self, store: FeatureStore, size: int) -> None:
        self._store, self._size = store, size
        self._keys: list[str] = []
        self._batches: list[Features] = []

    def __enter__(self) -> "BufferedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.flush()

    def add(self, keys: Sequence[str], features: Features) -> None:
        """Add features; they are on disk once there are enough, or after `flush`."""
        if keys:
            self._keys += keys
            self._batches.append(features)
        if len(self._keys) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write all that was added."""
        if self._keys:
            self._store.add(self._keys, join_features(self._batches).to("cpu"))
            self._keys, self._batches = [], []


class FeatureBlock(NamedTuple):
    """Some images of a stream.

    Attributes:
        rows: Their positions among the sources.
        features: Their features, tokens included, as the store would return them.
        stored: Whether the store holds their tokens, too.
    """

    rows: list[int]
    features: Features
    stored: bool


@final
class FeatureExtractor:
    """Fills a feature store from a backbone and reads it.

    Args:
        backbone: The frozen model.
        store: The store of the backbone's features.
        batch_size: Images or texts per forward pass.
        workers: Decoding processes; None for all cores but one, see `devices.default_workers`.
        shard: Items per write; at most so many are lost if the process is killed.
        precision: Precision of the backbone: `float32`, or `bfloat16` and `float16` where autocast considers them
            safe. Faster on an accelerator; features differ by a percent.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: FeatureStore,
        *,
        batch_size: int = 256,
        workers: int | None = None,
        shard: int = 2048,
        precision: Precision = "float32",
        progress: bool = True,
    ) -> None:
        self.backbone, self.store, self.precision = backbone, store, precision
        self.batch_size, self.shard, self.progress = batch_size, shard, progress
        self._workers = workers

    @property
    def workers(self) -> int:
        """Decoding processes; the default depends on the backbone's present device."""
        return default_workers(self.backbone.device) if self._workers is None else self._workers

    def describe(self) -> dict[str, str]:
        """Return the precision that features are computed and stored in, for results."""
        return {"precision": self.precision, "kept": self.store.dtype}

    def extract_images(self, sources: Sequence[ImageSource], *, tokens: bool, label: str = "images") -> list[str]:
        """Encode the images that the store does not hold yet.

        Args:
            sources: The images, also repeated.
            tokens: Whether token features are stored beside the pooled ones.
            label: Name of the images on the progress bar.

        Returns:
            A key for each image, for `lookup`.

        Raises:
            ImageError: If one is missing or broken; what was encoded before is stored.
        """
        keys = [f"image/{image_key(source)}" for source in sources]
        batches = self._batches(self.store.missing(keys, tokens=tokens))
        for _ in self._encode_images(sources, keys, batches, math.inf if tokens else 0, label):
            pass
        return keys

    def extract_texts(self, texts: Sequence[str | None], label: str = "texts") -> list[str]:
        """Encode the texts that the store does not hold yet; None is the empty text.

        Returns:
            A key for each text, for `lookup`.
        """
        keys = [f"text/{text or ''}" for text in texts]
        batches = self._batches(self.store.missing(keys, tokens=True))
        inputs = ([texts[row] or "" for row in rows] for rows in batches)
        for _ in self._encode(self.backbone.encode_text, inputs, keys, batches, math.inf, label):
            pass
        return keys

    def stream(
        self, sources: Sequence[ImageSource], *, token_budget: int, label: str = "images"
    ) -> Generator[FeatureBlock, None, None]:
        """Yield the features of images with their tokens, block by block, in order.

        Images that the store lacks are decoded ahead in workers and encoded. Their pooled features are stored, their
        tokens only if those of all the images take at most `token_budget`.

        Args:
            sources: The images, each once.
            token_budget: Bytes on disk that their tokens may take.
            label: Name of the images on the progress bar.

        Raises:
            ImageError: If one is missing or broken; what was encoded before is stored.
        """
        keys = [f"image/{image_key(source)}" for source in sources]
        absent = set(self.store.missing(keys, tokens=True))
        blocks = self._batches(range(len(keys)))
        batches = [rows for block in blocks if (rows := [row for row in block if row in absent])]
        with (
            progress_bar(shown=self.progress and not absent) as bar,  # encoding shows a bar of its own
            closing(self._encode_images(sources, keys, batches, token_budget, label)) as encoded,
        ):
            for block in bar.track(blocks, description=f"embedding {label}"):
                rows, found, stored = sorted(block, key=absent.__contains__), [], True  # those in the store first
                if old := [row for row in block if row not in absent]:
                    found.append(self.lookup([keys[row] for row in old], tokens=True))
                if len(old) < len(block):
                    features, stored = next(encoded)
                    found.append(features)
                order = torch.tensor([rows.index(row) for row in block])
                yield FeatureBlock(block, join_features(found).select(order.to(self.backbone.device)), stored)

    def add_text(self, text: str, features: Features) -> None:
        """Store features of a text that were computed elsewhere in float32, unless the store holds it."""
        key = f"text/{text}"
        if self.precision == "float32" and self.store.missing([key], tokens=True):
            self.store.add([key], features.to("cpu"))

    def lookup(self, keys: Sequence[str], *, tokens: bool) -> Features:
        """Read features by key, on the backbone's device, in the order of the keys."""
        return self.store.get(keys, tokens=tokens).to(self.backbone.device)

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]

    def _encode_images(
        self,
        sources: Sequence[ImageSource],
        keys: Sequence[str],
        batches: list[list[int]],
        budget: float | int,
        label: str,
    ) -> Generator[tuple[Features, bool], None, None]:
        backbone = self.backbone

        def encode(pixels: UInt8[Tensor, "batch 3 height width"]) -> Features:
            # Everything that is computed from the pixels is computed on the device.
            images = model_input(pixels.to(backbone.device, non_blocking=True), backbone.preprocess)
            return backbone.encode_image(images)

        pinned = backbone.device.type == "cuda"
        pixels = load_pixels(sources, batches, backbone.preprocess, self.workers, pinned=pinned)
        return self._encode(encode, pixels, keys, batches, budget, label)

    def _encode(
        self,
        encode: Callable[[Any], Features],
        inputs: Iterable[Any],
        keys: Sequence[str],
        batches: list[list[int]],
        budget: float | int,
        label: str,
    ) -> Generator[tuple[Features, bool], None, None]:
        """Encode batches and store their features, tokens only if those of all keys take at most `budget` bytes.

        Yields:
            The features of each batch as the store rounds them, and whether their tokens are stored.
        """
        if not batches:
            return
        total = sum(map(len, batches))
        without_pooled = set(self.store.missing(keys))
        with progress_bar(shown=self.progress) as bar, BufferedWriter(self.store, self.shard) as writer:
            task = bar.add_task(f"encoding {label}", total=total)
            for rows, batch in zip(batches, inputs, strict=True):
                features = self.store.rounded(self._forward(encode, batch))
                stored = _token_bytes(features, self.store.dtype) * len(keys) <= budget
                new = features
                if not stored:
                    chosen = [at for at, row in enumerate(rows) if row in without_pooled]
                    rows = [rows[at] for at in chosen]  # noqa: PLW2901
                    new = Features(features.pooled[chosen])
                writer.add([keys[row] for row in rows], new)
                bar.advance(task, len(features))
                yield features, stored

    @torch.inference_mode()
    def _forward(self, encode: Callable[[Any], Features], batch: Any) -> Features:
        """Run the backbone in the chosen precision; features are returned in float32."""
        if self.precision == "float32":
            with full_precision(self.backbone.device):
                return encode(batch)
        with torch.autocast(self.backbone.device.type, getattr(torch, self.precision)):
            features = encode(batch)
        tokens = None if features.tokens is None else features.tokens.float()
        return replace(features, pooled=features.pooled.float(), tokens=tokens)


def _token_bytes(features: Features, dtype: str) -> int:
    """Return the bytes that the tokens of one item take in a store."""
    if features.tokens is None:
        return 0
    return features.tokens[0].numel() * (2 if dtype == "float16" else 4) + features.tokens.shape[1]


def join_features(batches: Sequence[Features]) -> Features:
    """Join batches of features; shorter token rows are padded at the end, their mask False.

    Args:
        batches: At least one batch; all with tokens, or all without.

    Raises:
        ValueError: If only some have tokens, or tokens come without mask and `pooled_at`.
    """
    pooled = torch.cat([batch.pooled for batch in batches])
    if all(batch.tokens is None for batch in batches):
        return Features(pooled)
    longest = max(batch.tokens.shape[1] for batch in batches if batch.tokens is not None)
    tokens, masks, positions = [], [], []
    for batch in batches:
        if batch.tokens is None or batch.mask is None or batch.pooled_at is None:
            raise ValueError("token features come with a mask and pooled_at")
        more = longest - batch.tokens.shape[1]
        tokens.append(torch.nn.functional.pad(batch.tokens, (0, 0, 0, more)))
        masks.append(torch.nn.functional.pad(batch.mask, (0, more), value=False))
        positions.append(batch.pooled_at)
    return Features(pooled, torch.cat(tokens), torch.cat(masks), torch.cat(positions))


Encoder = FeatureExtractor
"""Deprecated alias of `FeatureExtractor`."""
