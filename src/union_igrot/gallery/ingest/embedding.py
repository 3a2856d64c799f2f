"""From entries to embeddings: images that worker processes decode and the model embeds, or embeddings that exist."""

import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, final

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8, UInt64
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from union_igrot.errors import ConfigError, DataError, ImageError, first_line
from union_igrot.gallery.ingest.entries import ADDED_SOURCE, UNREACHABLE, Entry, Listing, content_digest, digest_prefix
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.sources import is_list
from union_igrot.images.dataset import ImageDataset, WorkerDiedError, image_loader, read_batches
from union_igrot.images.decode import decode_image, file_exif, image_fault
from union_igrot.images.exif import ExifColumns
from union_igrot.images.formats import describe_name
from union_igrot.images.transforms import ImageToPixels, model_input
from union_igrot.models.devices import default_workers, full_precision
from union_igrot.models.foreign import FOREIGN
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import expand_user
from union_igrot.types import Preprocess

THUMBNAIL_SIZE: Final = 160  # longest side of a thumbnail in pixels
_QUALITY: Final = 80
_LARGE_FILE: Final = 2**26
"""Bytes from which a file is decoded before it is hashed, so that a video is not read to its end in vain."""
_PART: Final = 32
"""Images that a worker decodes at once; several workers share a batch, and its first part is ready soon."""
_PREFETCH: Final = 4  # parts that each worker decodes ahead
_START_METHOD: Final[Literal["fork"] | None] = "fork" if sys.platform == "linux" else None
VECTOR_FORMS: Final = "a .npy file, .safetensors with one matrix, or .parquet with a column vector"
AGREEMENT: Final = 0.98  # lowest cosine of an embedding and the model's own, which may have another precision
_SHORTEST: Final = 1e-12  # length of a row that is not zero; `normalize` would not give a shorter one unit length
_SAMPLE: Final = 8  # images that are embedded for the comparison

EmbeddedBatch = tuple[Sequence[Entry], Sequence["DecodedImage"], Float[Tensor, "embedded dim"], float]
"""Entries, what is known of each, the embeddings of those with a thumbnail, and seconds of waiting for decoding."""
_Item = TypeVar("_Item")


class DecodedImage(NamedTuple):
    """What is known of an image after it was read."""

    digest: str = ""  # see `content_digest`; "" if it could not be read
    width: int = 0  # width in pixels, upright
    height: int = 0
    # JPEG bytes. None if it was not decoded: it is broken, or equal bytes have been embedded already.
    thumbnail: bytes | None = None
    reason: str | None = None  # why it is broken, or None
    exif: ExifColumns | None = None  # see `read_exif`; None if it was not read


DecodedPart = tuple[
    list[DecodedImage], UInt8[Tensor, "decoded 3 size size"]
]  # images, and pixels of those with a thumbnail


@final
class ImageReader:
    """Reads, hashes and decodes images: the transform and, with `collate`, the batches of an `image_loader`."""

    def __init__(
        self,
        preprocess: Preprocess,
        known: UInt64[np.ndarray, " digests"] | None = None,
        *,
        largest: float | int | None = None,
        exif: bool = True,
    ) -> None:
        self.preprocess, self.known, self.largest, self.exif = preprocess, known, largest, exif
        self._to_pixels = ImageToPixels(preprocess)

    def __call__(self, entry: Entry) -> tuple[DecodedImage, Tensor | None]:
        """Return an image with its pixels, None if it was not decoded."""
        try:
            return self._read_image(entry)
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            fault = image_fault(error)
            if isinstance(error, UnidentifiedImageError):  # a name says more than bytes that nobody knows
                fault = describe_name(entry.id) or fault
            # An error of the system, such as a failing disk or a lack of memory, says nothing about the image.
            temporary = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            return DecodedImage(reason=f"{UNREACHABLE} ({fault})" if temporary else fault), None

    def collate(self, items: Sequence[tuple[DecodedImage, Tensor | None]]) -> DecodedPart:
        """Join images."""
        pixels = [data for _, data in items if isinstance(data, Tensor)]
        size = self.preprocess.size
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return [image for image, _ in items], stacked

    def _read_image(self, entry: Entry) -> tuple[DecodedImage, Tensor | None]:
        if entry.size > _LARGE_FILE and entry.offset is None and entry.data is None:
            return self._read_large(entry)
        data = self._read_bytes(entry)
        digest = content_digest(hashlib.sha256(data), entry.text)
        if self._is_known(digest):
            return DecodedImage(digest, exif=file_exif(data) if self.exif else None), None
        exif: dict[str, str | float] | None = {} if self.exif else None
        image, size = decode_image(io.BytesIO(data), self.preprocess.size, self.largest, exif)
        large = image
        if max(image.size) < min(THUMBNAIL_SIZE, max(size)):  # a JPEG decoded small for the model
            large, _ = decode_image(io.BytesIO(data), THUMBNAIL_SIZE, self.largest)
        return DecodedImage(digest, *size, make_thumbnail(large), exif=exif), self._to_pixels(image)

    def _read_large(self, entry: Entry) -> tuple[DecodedImage, Tensor]:
        """Decode before hashing, which fails at once if it is no image; hash without reading all bytes into memory."""
        exif: dict[str, str | float] | None = {} if self.exif else None
        image, (width, height) = decode_image(Path(entry.path), self.preprocess.size, self.largest, exif)
        with open(entry.path, "rb") as file:  # noqa: PTH123 - undecodable bytes in a name
            digest = content_digest(hashlib.file_digest(file, "sha256"), entry.text)
        return DecodedImage(digest, width, height, make_thumbnail(image), exif=exif), self._to_pixels(image)

    def _read_bytes(self, entry: Entry) -> bytes:
        if entry.data is not None:
            return entry.data
        with open(entry.path, "rb") as file:  # noqa: PTH123 - undecodable bytes in a name
            if entry.offset is None:
                return file.read()
            data = os.pread(file.fileno(), entry.size, entry.offset)
        if len(data) < entry.size:
            raise OSError("the shard ends before it")
        return data

    def _is_known(self, digest: str) -> bool:
        if self.known is None:
            return False
        prefix = np.uint64(digest_prefix(digest))
        at = int(np.searchsorted(self.known, prefix))
        return at < len(self.known) and bool(self.known[at] == prefix)


def make_thumbnail(image: Image.Image) -> bytes:
    """Return a small JPEG of an image; a small image is not enlarged."""
    scale = min(1.0, THUMBNAIL_SIZE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    # As sharp as a bicubic filter at half its time; integer factors are averaged, in a tenth of it.
    image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.0).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def embed_entries(
    model: IGROTModel,
    entries: Sequence[Entry],
    options: IngestOptions,
    known: UInt64[np.ndarray, " digests"] | None = None,
    vectors: Mapping[str, Float[Tensor, " dim"]] | None = None,
) -> Generator[EmbeddedBatch, None, None]:
    """Decode images in worker processes and embed them on the device of the model, or look their embeddings up."""
    session = _open_session(model, options.precision) if vectors is None else None

    def embed(batch: Sequence[Entry], images: Sequence[DecodedImage], pixels: Tensor) -> Float[Tensor, "embedded dim"]:
        decoded = [entry for entry, image in zip(batch, images, strict=True) if image.thumbnail is not None]
        if not decoded:
            return torch.empty(0, model.backbone.dim)
        if vectors is not None:
            return torch.stack([vectors[entry.id] for entry in decoded])
        if session is not None:
            return session(model_input(pixels, model.preprocess))
        return _embed_pixels(model, pixels, options.precision, [entry.text for entry in decoded])

    read = decode_entries(model, entries, options, known)
    embedded = ((batch, images, embed(batch, images, pixels), waited) for batch, images, pixels, waited in read)
    for batch, images, found, waited in _one_behind(embedded):
        yield batch, images, found.cpu(), waited


def _open_session(model: IGROTModel, precision: str) -> Callable[[Tensor], Tensor] | None:
    """Return the session of ONNX Runtime that embeds gallery images in a precision; None if the model itself does."""
    if precision not in ("onnx", "int8"):
        return None
    if model.device.type != "cpu":
        raise ConfigError(f"precision={precision} runs on a CPU, not on {model.device}; pass strategy=cpu, or fp16")
    from union_igrot.models.onnx import open_gallery_session  # noqa: PLC0415 - an extra

    return open_gallery_session(model, "int8" if precision == "int8" else "fp32")


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield each item when the next one is under way: a GPU works meanwhile."""
    waiting: list[_Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def decode_entries(
    model: IGROTModel, entries: Sequence[Entry], options: IngestOptions, known: UInt64[np.ndarray, " digests"] | None
) -> Iterator[tuple[Sequence[Entry], list[DecodedImage], UInt8[Tensor, "decoded 3 size size"], float]]:
    """Decode images in batches, equal ones once, with pixels on the device of the model; see `embed_entries`."""
    device, size = model.device, options.batch_size
    workers = max(1, default_workers(device)) if options.workers is None else options.workers
    largest = None if options.max_megapixels is None else options.max_megapixels * 1e6
    reader = ImageReader(model.preprocess, known, largest=largest, exif=options.file_columns != "none")
    batches = [entries[at : at + size] for at in range(0, len(entries), size)]
    parts = [batch[at : at + _PART] for batch in batches for at in range(0, len(batch), _PART)]
    decoded = _read_parts(reader, parts, min(workers, len(parts)), device.type == "cuda")
    digests: set[str] = set()
    for batch in batches:
        images, pixels, waited = [], [], 0.0
        for _ in range(math.ceil(len(batch) / _PART)):
            start = time.perf_counter()
            part = next(decoded)
            waited += time.perf_counter() - start
            found, rows = drop_repeated(*part, digests)
            images += found
            pixels.append(rows.to(device, non_blocking=True))
        yield batch, images, torch.cat(pixels), waited


def drop_repeated(
    images: Sequence[DecodedImage], rows: Shaped[Tensor, "decoded ..."], seen: set[str]
) -> tuple[list[DecodedImage], Shaped[Tensor, "kept ..."]]:
    """Drop the rows (pixels or embeddings) of images whose digest was seen, here or earlier; `seen` is extended."""
    found: list[DecodedImage] = []
    kept, count = [], 0
    for image in images:
        repeated = image.digest in seen
        found.append(DecodedImage(image.digest, exif=image.exif) if repeated else image)
        if image.digest:
            seen.add(image.digest)
        if image.thumbnail is not None:
            kept += [] if repeated else [count]
            count += 1
    return found, rows if len(kept) == count else rows[kept]


@torch.inference_mode()
def _embed_pixels(
    model: IGROTModel, pixels: UInt8[Tensor, "batch 3 size size"], precision: str, texts: Sequence[str]
) -> Float[Tensor, "batch dim"]:
    """Embed gallery images, the backbone in a given precision and the heads in float32.

    Those whose text is not empty are embedded with it by the query head.
    """
    device = pixels.device
    model.null_text()  # encoded in float32
    if precision == "32-true":
        context: AbstractContextManager[object] = full_precision(device)
    else:  # a CPU computes in bfloat16 only
        half = torch.float16 if precision == "16-mixed" and device.type != "cpu" else torch.bfloat16
        context = torch.autocast(device.type, half)
    with context:
        features = model.backbone.encode_image(model_input(pixels, model.preprocess))
    with full_precision(device):
        tokens = None if features.tokens is None else features.tokens.float()
        features = replace(features, pooled=features.pooled.float(), tokens=tokens)
        rows = model.embed_gallery(features)
        if not any(texts):
            return rows
        has_text = torch.tensor([bool(text) for text in texts], device=device)[:, None]
        return torch.where(has_text, model.embed_queries(features, texts), rows)


def _read_parts(
    reader: ImageReader, parts: Sequence[Sequence[Entry]], workers: int, pinned: bool
) -> Iterator[DecodedPart]:
    done = 0
    while done < len(parts):
        try:
            for part in read_batches(_loader(reader, parts[done:], workers, pinned, _PREFETCH)):
                done += 1
                yield part
        except WorkerDiedError:
            # The image that did it is in the missing part, or in one that was decoded ahead.
            yield _read_one_by_one(reader, parts[done])
            done += 1


def _read_one_by_one(reader: ImageReader, entries: Sequence[Entry]) -> DecodedPart:
    """Decode images in a process that may die; an image that kills it is broken."""
    found: list[DecodedPart] = []
    while len(found) < len(entries):
        try:
            # `+=` keeps what came before an error; with one image ahead the next one is at work.
            found += read_batches(_loader(reader, [[entry] for entry in entries[len(found) :]], 1, False, 1))
        except WorkerDiedError as error:
            reason = "decoding it ended the process; it may be too large for the memory, or malicious"
            reason = str(error) if error.timed_out else reason
            found.append(reader.collate([(DecodedImage(reason=reason), None)]))
    return [image for images, _ in found for image in images], torch.cat([pixels for _, pixels in found])


def _loader(
    reader: ImageReader, batches: Sequence[Sequence[Entry]], workers: int, pinned: bool, prefetch: int
) -> DataLoader[DecodedPart]:
    return image_loader(
        ImageDataset(None, reader),
        batches,
        reader.collate,  # type: ignore[arg-type] # the reader returns what it could not read as a value
        workers=workers,
        pinned=pinned,
        prefetch=prefetch,
        start_method=_START_METHOD,
    )


def read_vectors(given: object) -> Float[Tensor, "rows dim"]:
    """Return embeddings with unit length, float32.

    Args:
        given: A file, see `VECTOR_FORMS`; an array, a tensor or nested lists. A vector alone is one row.

    Raises:
        DataError: If it cannot be read, or a row is zero or not finite.
    """
    name = str(given) if isinstance(given, str | Path) else "the array of embeddings"
    try:
        found = torch.as_tensor(_read_file(expand_user(given)) if isinstance(given, str | Path) else given)
        if found.is_complex():
            raise TypeError("complex numbers")
        vectors = (found[None] if found.ndim == 1 else found).detach().cpu().float()
        rows, _ = vectors.shape
    except Exception as error:  # of four libraries
        raise DataError(f"cannot read {name} ({first_line(error)}; expected {VECTOR_FORMS})") from None
    lengths = vectors.norm(dim=1)
    wrong = (~(lengths.isfinite() & (lengths >= _SHORTEST))).nonzero().flatten().tolist()
    if wrong or not rows:
        what = f"row {wrong[0]} is zero or not finite" if wrong else "it has no row"
        raise DataError(f"{name}: {what}; embed the images again")
    return normalize(vectors, dim=1)


def _read_file(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415 - seldom needed

        (matrix,) = load_file(path).values()
        return matrix
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    return np.array(pyarrow.parquet.read_table(path, columns=["vector"])["vector"].to_pylist(), dtype=np.float64)


def vectors_by_id(
    given: object, vectors: Float[Tensor, "rows dim"], listing: Listing, model: IGROTModel
) -> Mapping[str, Float[Tensor, " dim"]]:
    """Return embeddings by the ids of listed images, after checking that they can be those of the model.

    A few images are embedded for that, unless the model is a `ForeignBackbone`.

    Args:
        given: Where the embeddings are from, for messages.
        vectors: Embeddings in the order of the images, of unit length.
        listing: A list, or single images, which have an order.
        model: The model of the index.

    Raises:
        ConfigError: If the images are of a folder or pattern.
        DataError: If number or width differ, or an embedding is not the model's.
    """
    name = f"vectors={given}" if isinstance(given, str | Path) else "vectors="
    if listing.source != ADDED_SOURCE and not is_list(listing.source):
        raise ConfigError(f"{name} needs a list of images in the same order instead of {listing.source}")
    entries, dim = listing.entries, model.backbone.dim
    if vectors.shape != (len(entries), dim):
        raise DataError(
            f"{name}: {vectors.shape[0]:,} rows of width {vectors.shape[1]} for {len(entries):,} images (expected one "
            f"per image, of the model's width {dim})"
        )
    sound = [at for at, entry in enumerate(entries) if entry.fault is None and entry.offset is None]
    foreign = model.backbone.name.startswith(FOREIGN)
    for at in () if foreign else sound[:: max(1, len(sound) // _SAMPLE)][:_SAMPLE]:
        entry = entries[at]
        try:
            own = model.encode_gallery(entry.path if entry.data is None else entry.data)[0]
        except ImageError:  # it is reported with the others
            continue
        if (cosine := float(normalize(own, dim=-1) @ vectors[at])) < AGREEMENT:
            raise DataError(
                f"{name}: the embedding of {entry.id} is not that of the model (cosine {cosine:.3f}); pass its "
                "checkpoint, or vectors_from=NAME if another program made them"
            )
    return {entry.id: vector for entry, vector in zip(entries, vectors, strict=True)}
