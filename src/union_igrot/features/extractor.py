"""Images and texts through the frozen backbone, each once, into the feature store.

Decodes in worker processes ahead of the backbone, shows a progress bar and goes on where
an interrupted run stopped. Does not know heads, benchmarks or training.

Token features of many images fill a disk: those of QuickDraw's 92,291 sketches from a CLIP
ViT-B/32 take 9 GB, from a ViT-L/14 at 257 tokens 73 GB. `stream` hands them out block by
block and keeps them only where all of them fit a given room.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from union_igrot.features.store import Dtype, FeatureStore
from union_igrot.images.dataset import load_pixels
from union_igrot.images.decode import image_key
from union_igrot.images.transforms import model_input
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.devices import default_workers, full_precision
from union_igrot.progress import progress_bar
from union_igrot.types import Features, ImageSource

Arithmetic = Literal["float32", "bfloat16", "float16"]


@final
class BufferedWriter:
    """Gathers features until there are enough for one write to a store.

    Args:
        store: Where they go.
        size: Items of one write.
    """

    def __init__(self, store: FeatureStore, size: int) -> None:
        self._store, self._size = store, size
        self._keys: list[str] = []
        self._parts: list[Features] = []

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Take some features; they are on disk once there are enough, or after `flush`."""
        if keys:
            self._keys += keys
            self._parts.append(features)
        if len(self._keys) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self._keys:
            self._store.add(self._keys, join_features(self._parts).to("cpu"))
            self._keys, self._parts = [], []


class Block(NamedTuple):
    """Some images of a stream.

    Attributes:
        rows: Their positions among the sources.
        features: What the backbone says of them, tokens included, as the store would give it back.
        kept: Whether the store keeps their tokens too.
    """

    rows: list[int]
    features: Features
    kept: bool


@final
class FeatureExtractor:
    """Fills a feature store from a backbone and reads it.

    Args:
        backbone: The frozen model.
        store: Where features are kept; belongs to the backbone's fingerprint.
        batch_size: Images or texts a forward pass.
        workers: Processes that decode; None takes all cores but one, see `processes.default_workers`.
        shard: Items written at once; what an interruption can lose at most.
        precision: Arithmetic of the backbone: `float32`, or `bfloat16` and `float16` where
            autocast finds them safe. Faster on an accelerator; features differ by a percent.
        progress: Whether a bar is shown.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: FeatureStore,
        *,
        batch_size: int = 256,
        workers: int | None = None,
        shard: int = 2048,
        precision: Arithmetic = "float32",
        progress: bool = True,
    ) -> None:
        self.backbone, self.store, self.precision = backbone, store, precision
        self.batch_size, self.shard, self.progress = batch_size, shard, progress
        self._workers = workers

    @property
    def workers(self) -> int:
        """Processes that decode; without a choice it depends on where the backbone lies by now."""
        return default_workers(self.backbone.device) if self._workers is None else self._workers

    @property
    def arithmetic(self) -> dict[str, str]:
        """How features come about and are kept, for whoever states metrics made of them."""
        return {"precision": self.precision, "kept": self.store.dtype}

    def extract_images(self, sources: Sequence[ImageSource], *, tokens: bool, label: str = "pictures") -> list[str]:
        """Encode the images that the store does not hold yet.

        Args:
            sources: The images; one may stand several times.
            tokens: Whether token features are kept beside the pooled ones.
            label: What the progress bar calls them.

        Returns:
            A key for each image, for `lookup`.

        Raises:
            ImageError: Where one is missing or broken; what was encoded before is kept.
        """
        keys = [f"image/{image_key(source)}" for source in sources]
        todo = self._todo(keys, tokens=tokens)

        def forward(rows: list[int]) -> Iterator[Features]:
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            options = {"pinned": self.backbone.device.type == "cuda"}
            for batch in load_pixels(sources, batches, self.backbone.preprocess, self.workers, **options):
                yield self._encode_pixels(batch)

        self._fill(keys, todo, forward, tokens=tokens, label=label)
        return keys

    def stream(self, sources: Sequence[ImageSource], *, room: int, label: str = "pictures") -> Iterator[Block]:
        """Return the features of images with their tokens, a block at a time, in order.

        What the store lacks is decoded ahead in workers and encoded. The pooled features
        are kept; the tokens are too if those of all the images take no more than `room`,
        so that a next time finds them, and are forgotten after their block otherwise.

        Args:
            sources: The images, each once.
            room: Bytes on disk that their tokens may take.
            label: What the progress bar calls them.

        Raises:
            ImageError: Where one is missing or broken; what was encoded before is kept.
        """
        keys = [f"image/{image_key(source)}" for source in sources]
        absent, unpooled = (set(self.store.missing(keys, tokens=tokens)) for tokens in (True, False))
        spans = [range(at, min(at + self.batch_size, len(keys))) for at in range(0, len(keys), self.batch_size)]
        todo = [[row for row in span if row in absent] for span in spans]
        wanted, pinned = [rows for rows in todo if rows], self.backbone.device.type == "cuda"
        decoded = load_pixels(sources, wanted, self.backbone.preprocess, self.workers, pinned=pinned)
        shelf = BufferedWriter(self.store, self.shard)
        kept: bool | None = None
        with progress_bar(shown=self.progress and bool(absent)) as bar:
            task = bar.add_task(f"encoding {label}", total=len(absent))
            try:
                for span, rows in zip(spans, todo, strict=True):
                    new = self._rounded(self._encode_pixels(next(decoded))) if rows else None
                    features = self._with_stored(keys, span, rows, new)
                    kept = _token_bytes(features, self.store.dtype) * len(keys) <= room if kept is None else kept
                    if new is not None:
                        fresh = [at for at, row in enumerate(rows) if kept or row in unpooled]
                        chosen = new.select(torch.tensor(fresh, dtype=torch.int64, device=new.pooled.device))
                        shelf.put([keys[rows[at]] for at in fresh], chosen if kept else Features(chosen.pooled))
                        bar.advance(task, len(rows))
                    yield Block(list(span), features, kept)
            finally:
                shelf.flush()

    @torch.inference_mode()
    def _encode_pixels(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Encode images; what is made of their pixels is made on the device."""
        images = model_input(pixels.to(self.backbone.device, non_blocking=True), self.backbone.preprocess)
        return self._forward(self.backbone.encode_image, images)

    def _rounded(self, features: Features) -> Features:
        """Round features as the store does."""
        return features if self.store.dtype == "float32" else self.store.rounded(features)

    def _with_stored(self, keys: Sequence[str], span: range, todo: list[int], new: Features | None) -> Features:
        """Put what was just encoded and what was in the store in order."""
        old = [row for row in span if row not in set(todo)]
        stored = self.lookup([keys[row] for row in old], tokens=True) if old else None
        if new is None or stored is None:
            features = new if stored is None else stored
            assert features is not None
            return features
        place = {row: at for at, row in enumerate([*todo, *old])}
        order = torch.tensor([place[row] for row in span], device=new.pooled.device)
        return join_features([new, stored]).select(order)

    def extract_texts(self, texts: Sequence[str | None], label: str = "texts") -> list[str]:
        """Encode the texts that the store does not hold yet; None is the empty text.

        Returns:
            A key for each text, for `lookup`.
        """
        spoken = [text or "" for text in texts]
        keys = [f"text/{text}" for text in spoken]

        def forward(rows: list[int]) -> Iterator[Features]:
            for at in range(0, len(rows), self.batch_size):
                yield self._forward(self.backbone.encode_text, [spoken[row] for row in rows[at : at + self.batch_size]])

        self._fill(keys, self._todo(keys, tokens=True), forward, tokens=True, label=label)
        return keys

    def add_text(self, text: str, features: Features) -> None:
        """Keep what the backbone said of a text when somebody else asked it, unless the store holds that.

        Not taken where the store's features come of another arithmetic than float32.
        """
        key = f"text/{text}"
        if self.precision == "float32" and self.store.missing([key], tokens=True):
            self.store.add([key], features.to("cpu"))

    def lookup(self, keys: Sequence[str], *, tokens: bool) -> Features:
        """Read features by key, on the backbone's device, in the order of the keys."""
        return self.store.get(keys, tokens=tokens).to(self.backbone.device)

    def _forward(self, encode: Callable[[Any], Features], batch: Any) -> Features:
        """Run the backbone in the chosen arithmetic; features come back in float32."""
        if self.precision == "float32":
            with full_precision(self.backbone.device):
                return encode(batch)
        with torch.autocast(self.backbone.device.type, getattr(torch, self.precision)):
            seen = encode(batch)
        return replace(seen, pooled=seen.pooled.float(), tokens=None if seen.tokens is None else seen.tokens.float())

    def _todo(self, keys: Sequence[str], *, tokens: bool) -> list[int]:
        return self.store.missing(keys, tokens=tokens)

    @torch.inference_mode()
    def _fill(
        self,
        keys: Sequence[str],
        todo: list[int],
        forward: Callable[[list[int]], Iterator[Features]],
        *,
        tokens: bool,
        label: str,
    ) -> None:
        if not todo:
            return
        with progress_bar(shown=self.progress) as bar:
            task = bar.add_task(f"encoding {label}", total=len(todo))
            shelf, done = BufferedWriter(self.store, self.shard), 0
            try:
                for features in forward(todo):
                    rows = todo[done : done + len(features)]
                    shelf.put([keys[row] for row in rows], features if tokens else Features(features.pooled))
                    done += len(rows)
                    bar.advance(task, len(rows))
            finally:
                shelf.flush()


def _token_bytes(features: Features, dtype: Dtype) -> int:
    """Return the bytes that one item with tokens takes in a store."""
    if features.tokens is None:
        raise ValueError("a stream hands out token features, and the backbone gave none")
    size = 2 if dtype == "float16" else 4
    return features.tokens[0].numel() * size + features.tokens.shape[1]


def join_features(parts: Sequence[Features]) -> Features:
    """Join batches of features; shorter token rows are padded at the end, their mask False.

    Args:
        parts: At least one batch; all with tokens, or all without.

    Raises:
        ValueError: Where only some have tokens, or tokens come without mask and place.
    """
    pooled = torch.cat([part.pooled for part in parts])
    if all(part.tokens is None for part in parts):
        return Features(pooled)
    longest = max(part.tokens.shape[1] for part in parts if part.tokens is not None)
    tokens, masks, places = [], [], []
    for part in parts:
        if part.tokens is None or part.mask is None or part.pooled_at is None:
            raise ValueError("token features come with a mask and the place of the pooled token")
        more = longest - part.tokens.shape[1]
        tokens.append(torch.nn.functional.pad(part.tokens, (0, 0, 0, more)))
        masks.append(torch.nn.functional.pad(part.mask, (0, more), value=False))
        places.append(part.pooled_at)
    return Features(pooled, torch.cat(tokens), torch.cat(masks), torch.cat(places))
