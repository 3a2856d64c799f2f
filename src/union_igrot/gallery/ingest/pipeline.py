"""Bring an index up to date with images: list, compare, decode, embed, write.

What is in the index is not embedded again, which is also how an interrupted run is resumed.
"""

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar, final

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt64
from torch import Tensor
from torch.utils.data import DataLoader

from union_igrot.errors import CheckpointError, ConfigError, DataError, ImageError, UnionError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.factory import MEMORY, local_path
from union_igrot.gallery.ingest.decode import DecodedBatch, DecodedImage, ImageReader
from union_igrot.gallery.ingest.entries import Entry, Listing
from union_igrot.gallery.ingest.plan import (
    find_broken,
    find_gone,
    find_lost_sources,
    make_plan,
    read_index,
    with_texts,
)
from union_igrot.gallery.ingest.report import EMBED_TEXT, IngestOptions, IngestReport, SkippedFile
from union_igrot.gallery.ingest.writer import RowWriter
from union_igrot.gallery.metadata import widen_rows
from union_igrot.images.dataset import ImageDataset, WorkerDiedError, image_loader, read_batches
from union_igrot.images.transforms import model_input
from union_igrot.models.devices import default_workers, full_precision
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import ADVICE, default_root
from union_igrot.storage.locks import acquire_exclusive
from union_igrot.terminal import progress_bar

EXAMPLES: Final = 5  # broken images that a report names
_PART: Final = 32
"""Images that a worker decodes at once; several workers share a batch, and its first part is ready soon."""
_PREFETCH: Final = 4  # parts that each worker decodes ahead
_START_METHOD: Final[Literal["fork"] | None] = "fork" if sys.platform == "linux" else None
_ROUNDS: Final = 5
_DELETE_ROWS: Final = 10_000

EmbeddedBatch = tuple[Sequence[Entry], Sequence[DecodedImage], Float[Tensor, "embedded dim"]]
"""Entries, what is known of each, and the embeddings of those with a thumbnail."""
_Item = TypeVar("_Item")
_Executor = Callable[[Sequence[Entry], UInt64[np.ndarray, " digests"] | None], Generator[EmbeddedBatch, None, None]]


@final
@dataclass(slots=True)
class Timings:
    """Seconds of work and of waiting; see `IngestReport`."""

    working: float = 0.0
    decoding_wait: float = 0.0


def ingest_images(
    index: VectorIndex,
    model: IGROTModel,
    listing: Listing,
    options: IngestOptions | None = None,
    *,
    wait: float = 0.1,
    vectors: Mapping[str, Float[Tensor, " dim"]] | None = None,
) -> IngestReport:
    """Bring an index up to date with images.

    Images with the size and modification time of their row are not opened. Others are read; one whose bytes are in
    the index already, under whatever id, reuses its embedding. Finished images are in the index within seconds, and
    readers see them meanwhile. An interrupted run is resumed by the same call. With `vectors`, embeddings by id, images
    are decoded for their thumbnails alone.

    Raises:
        UnionError: If another process is still putting images into the index.
        ConfigError: If the decoder or Ray is not installed.
        ImageError: If an image cannot be read, with `on_broken="fail"`.
        DataError: If columns are invalid, all images are gone, or a disk is full.
    """
    start, timings = time.perf_counter(), Timings()
    options = _with_settings_of(index, options or IngestOptions(), vectors)
    executors = _executors(model, options, timings, vectors)
    widen = partial(widen_rows, model=model, metadata=index.metadata)
    with lock_index(index.uri, options.cache, wait) as skipped_file, progress_bar(shown=options.progress) as bar:
        task = bar.add_task("reading the index", total=None)
        show_progress = partial(bar.update, task, description="embedding images")
        rows = read_index(index, listing, prune=options.prune)
        listing = with_texts(listing, rows.by_id, options.embed_text)
        gone, emptied = find_gone(listing, rows.by_id) if options.prune else ([], {})
        skipped = SkippedFile(skipped_file, listing.source)
        plan = make_plan(listing, rows.by_id, skipped.own, options.embed_text, read_again=options.file_columns == "all")
        if plan.skip and options.on_broken == "fail":
            raise _broken_image_error(plan.skip[0].path, plan.skip[0].reason)
        skipped.add(plan.skip)
        opened = 0
        with RowWriter(index, listing, rows.by_id, skipped) as writer:
            known = [DecodedImage(rows.by_id[entry.id].digest) for entry in plan.rewrite]
            writer.add(plan.rewrite, known, torch.empty(0, index.dim))
            todo = [*plan.read, *writer.flush()]
            if todo:
                began = time.perf_counter()
                with executors as executor:
                    opened = _embed_all(executor, todo, rows.digests, writer, options, widen, show_progress)
                timings.working = time.perf_counter() - began
        bar.update(task, description="finishing")
        skips = [*plan.skip, *writer.broken]
        removed = delete_rows(index, [*gone, *(find_broken(skips, rows.by_id) if options.prune else ())])
        if writer.added + writer.updated + removed:
            index.optimize()
        broken = {skip.path: skip.reason for skip in skips}
        skipped.keep(_still_skipped(skipped, broken, listing, prune=options.prune))
    return IngestReport(
        added=writer.added,
        updated=writer.updated,
        unchanged=plan.unchanged,
        removed=removed,
        skipped=len(broken),
        embedded=writer.embedded,
        opened=opened,
        seconds=time.perf_counter() - start,
        working=timings.working,
        decoding_wait=timings.decoding_wait,
        writing_wait=writer.waited,
        skipped_file=skipped_file if broken else None,
        reasons=tuple(broken.items())[:EXAMPLES],
        excluded=listing.excluded,
        emptied=emptied,
        lost_sources=find_lost_sources(rows.sources),
    )


def _with_settings_of(index: VectorIndex, options: IngestOptions, vectors: object) -> IngestOptions:
    """Return options that embed as the rows of an index were: in 8 bits or not, with the text of a column or not."""
    stored, text = index.metadata.get("precision"), index.metadata.get(EMBED_TEXT)
    advice = "leave it out, or index again under another name"
    if stored == "int8" and options.precision == IngestOptions.precision:
        options = replace(options, precision=stored)
    if (stored == "int8") != (options.precision == "int8"):
        raise CheckpointError(
            f"{index.uri} was made with precision={stored or 'fp32'}, not {options.precision}; {advice}"
        )
    if options.embed_text not in (None, text):
        raise ConfigError(f"{index.uri} was made with embed_text={text or 'null'}, not {options.embed_text}; {advice}")
    if text is not None and (vectors is not None or options.precision in ("onnx", "int8")):
        raise ConfigError(f"embed_text={text} needs the model itself; leave out vectors, and precision=onnx or int8")
    return replace(options, embed_text=text)


def _executors(
    model: IGROTModel, options: IngestOptions, timings: Timings, vectors: Mapping[str, Float[Tensor, " dim"]] | None
) -> AbstractContextManager[_Executor]:
    model.eval()
    if options.executor == "ray" and vectors is None:
        from union_igrot.gallery.ingest.ray_executor import ray_executor  # noqa: PLC0415 - an extra

        return ray_executor(model, options, timings)
    return nullcontext(lambda entries, known: embed_entries(model, entries, options, known, timings, vectors))


def _embed_all(
    executor: _Executor,
    todo: Sequence[Entry],
    known: UInt64[np.ndarray, " digests"],
    writer: RowWriter,
    options: IngestOptions,
    widen: Callable[[Tensor], Tensor],
    show_progress: Callable[..., None],
) -> int:
    """Read and embed images; those whose embedding vanished from the index meanwhile are embedded after all."""
    opened = 0
    for attempt in range(_ROUNDS):
        done = 0
        with closing(executor(todo, known if attempt == 0 else None)) as batches:
            for entries, images, vectors in batches:
                writer.add(entries, images, widen(vectors))
                done += len(entries)
                show_progress(completed=done, total=len(todo))
                for entry, image in zip(entries, images, strict=True):
                    if image.reason and options.on_broken == "fail":
                        raise _broken_image_error(entry.id, image.reason)
        opened += len(todo)
        todo = writer.flush()
        if not todo:
            return opened
    raise DataError("rows vanish from the index while images are added; stop the process that removes them, run again")


def embed_entries(
    model: IGROTModel,
    entries: Sequence[Entry],
    options: IngestOptions,
    known: UInt64[np.ndarray, " digests"] | None = None,
    timings: Timings | None = None,
    vectors: Mapping[str, Float[Tensor, " dim"]] | None = None,
) -> Generator[EmbeddedBatch, None, None]:
    """Decode images in worker processes and embed them on the device of the model, or look their embeddings up."""
    decoded = decode_entries(model, entries, options, known, timings or Timings())
    embed = _embedder(model, options.precision) if vectors is None else None

    def embed_parts(batch: Sequence[Entry], parts: Sequence[DecodedBatch]) -> Float[Tensor, "embedded dim"]:
        images = [image for part in parts for image in part.images]
        decoded = [entry for entry, one in zip(batch, images, strict=True) if one.thumbnail is not None]
        if embed is not None and any(entry.text for entry in decoded):
            texts = [entry.text for entry in decoded]
            return embed_pixels(model, _join_parts(model, parts), options.precision, texts)
        if embed is not None:
            return embed(_join_parts(model, parts))
        assert vectors is not None
        rows = [vectors[entry.id] for entry in decoded]
        return torch.stack(rows) if rows else torch.empty(0, model.backbone.dim)

    embedded = ((batch, parts, embed_parts(batch, parts)) for batch, parts in decoded)
    for batch, parts, found in _one_behind(embedded):
        yield batch, [image for part in parts for image in part.images], found.cpu()


def _join_parts(model: IGROTModel, parts: Sequence[DecodedBatch]) -> UInt8[Tensor, "embedded 3 size size"]:
    return torch.cat([part.pixels.to(model.device, non_blocking=True) for part in parts])


def _embedder(model: IGROTModel, precision: str) -> Callable[[Tensor], Tensor]:
    """Return the function that embeds gallery images in a precision."""
    if precision not in ("onnx", "int8"):
        return partial(embed_pixels, model, precision=precision)
    if model.device.type != "cpu":
        raise ConfigError(f"precision={precision} runs on a CPU, not on {model.device}; pass strategy=cpu, or fp16")
    from union_igrot.models.onnx import open_gallery_session  # noqa: PLC0415 - an extra

    session = open_gallery_session(model, "int8" if precision == "int8" else "fp32")
    empty = torch.empty(0, model.backbone.dim)
    return lambda pixels: session(model_input(pixels, model.preprocess)) if len(pixels) else empty


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield each item when the next one is under way: a GPU works meanwhile."""
    waiting: list[_Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def decode_entries(
    model: IGROTModel,
    entries: Sequence[Entry],
    options: IngestOptions,
    known: UInt64[np.ndarray, " digests"] | None,
    timings: Timings,
) -> Iterator[tuple[Sequence[Entry], list[DecodedBatch]]]:
    """Decode images in batches of several parts; see `embed_entries`."""
    device = model.device
    workers = max(1, default_workers(device)) if options.workers is None else options.workers
    largest = None if options.max_megapixels is None else options.max_megapixels * 1e6
    reader = ImageReader(model.preprocess, known, largest=largest, exif=options.file_columns != "none")
    return _read_in_batches(reader, entries, options.batch_size, workers, device.type == "cuda", timings)


@torch.inference_mode()
def embed_pixels(
    model: IGROTModel,
    pixels: UInt8[Tensor, "batch 3 size size"],
    precision: str = "32-true",
    texts: Sequence[str] = (),
) -> Float[Tensor, "batch dim"]:
    """Embed gallery images, the backbone in a given precision and the heads in float32.

    With `texts`, one per image, those that are not empty are embedded with their images by the query head.
    """
    device = pixels.device
    if not len(pixels):
        return torch.empty(0, model.backbone.dim)
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


def _read_in_batches(
    reader: ImageReader, entries: Sequence[Entry], size: int, workers: int, pinned: bool, timings: Timings
) -> Iterator[tuple[Sequence[Entry], list[DecodedBatch]]]:
    """Read images; equal ones are decoded once."""
    batches = [entries[at : at + size] for at in range(0, len(entries), size)]
    parts = [batch[at : at + _PART] for batch in batches for at in range(0, len(batch), _PART)]
    decoded = _read_parts(reader, parts, min(workers, len(parts)), pinned)
    digests: set[str] = set()
    for batch in batches:
        found = []
        for _ in range(math.ceil(len(batch) / _PART)):
            start = time.perf_counter()
            part = next(decoded)
            timings.decoding_wait += time.perf_counter() - start
            found.append(part.without_repeated(digests))
        yield batch, found


def _read_parts(
    reader: ImageReader, parts: Sequence[Sequence[Entry]], workers: int, pinned: bool
) -> Iterator[DecodedBatch]:
    done = 0
    try:
        while done < len(parts):
            try:
                for part in read_batches(_loader(reader, parts[done:], workers, pinned, _PREFETCH)):
                    done += 1
                    yield part
            except WorkerDiedError:
                # The image that did it is in the missing part, or in one that was decoded ahead.
                yield _read_one_by_one(reader, parts[done])
                done += 1
    finally:
        reader.close()


def _read_one_by_one(reader: ImageReader, entries: Sequence[Entry]) -> DecodedBatch:
    """Decode images in a process that may die; an image that kills it is broken."""
    found: list[DecodedBatch] = []
    reader = ImageReader(reader.preprocess, reader.known, largest=reader.largest, exif=reader.exif)
    while len(found) < len(entries):
        try:
            # `+=` keeps what came before an error; with one image ahead the next one is at work.
            found += read_batches(_loader(reader, [[entry] for entry in entries[len(found) :]], 1, False, 1))
        except WorkerDiedError as error:
            reason = "decoding it ended the process; it may be too large for the memory, or malicious"
            reason = str(error) if error.timed_out else reason
            found.append(reader.collate([(DecodedImage(reason=reason), None)]))
    pixels = torch.cat([one.pixels for one in found])
    return DecodedBatch([image for one in found for image in one.images], pixels)


def _loader(
    reader: ImageReader, batches: Sequence[Sequence[Entry]], workers: int, pinned: bool, prefetch: int
) -> DataLoader[DecodedBatch]:
    return image_loader(
        ImageDataset(None, reader),
        batches,
        reader.collate,  # type: ignore[arg-type] # the reader returns what it could not read as a value
        workers=workers,
        pinned=pinned,
        prefetch=prefetch,
        start_method=_START_METHOD,
    )


def delete_rows(index: VectorIndex, ids: Iterable[str]) -> int:
    """Remove rows, not too many at once, and return how many existed."""
    names = list(dict.fromkeys(ids))
    return sum(index.delete(names[at : at + _DELETE_ROWS]) for at in range(0, len(names), _DELETE_ROWS))


def _still_skipped(skipped: SkippedFile, broken: Collection[str], listing: Listing, *, prune: bool) -> set[str]:
    """Return the images that stay in the list: those broken now, and those that this run could not look for."""
    listed = {entry.id for entry in listing.entries}
    unreadable = tuple(f"{folder}/" for folder in listing.unreadable)
    return {
        path
        for path in skipped.own
        if path in broken or (path not in listed and (not prune or path.startswith(unreadable)))
    }


def _broken_image_error(name: str, reason: str) -> ImageError:
    return ImageError(f"cannot read image {name}: {reason}; replace it, remove it, or pass on_broken=skip")


@contextmanager
def lock_index(uri: str, cache: Path | None = None, wait: float = 0.1) -> Iterator[Path | None]:
    """Keep other processes from putting images into an index; yield the path of its list of skipped images, if any."""
    if uri == MEMORY:
        yield None
        return
    root = (cache or default_root()) / "indexing"
    local = local_path(uri)
    path = None if local is None else Path(local)
    name = hashlib.sha256(str(path or uri).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    lock = root / f"{name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = acquire_exclusive(lock, wait=wait)
    except OSError as error:
        raise DataError(f"cannot write to {root} ({error.strerror}); {ADVICE}") from error
    if held is None:
        raise UnionError(f"another process is putting images into {uri}; wait until it ends (its lock: {lock})")
    with held:
        for leftover in root.glob(f"{name}-*"):  # work files of an earlier version
            shutil.rmtree(leftover, ignore_errors=True)
        yield root / f"{name}.skipped.jsonl" if path is None else path.with_name(f"{path.name}.skipped.jsonl")
