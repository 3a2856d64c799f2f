"""Bring an index up to date with images: list, compare, decode, embed, write.

What is in the index is not embedded again, which is also how an interrupted run is resumed.
"""

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError, DataError, ImageError, UnionError, require_packages
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.factory import MEMORY, local_path
from union_igrot.gallery.ingest.embedding import DecodedImage, EmbeddedBatch, drop_repeated, embed_entries
from union_igrot.gallery.ingest.entries import Entry, Listing
from union_igrot.gallery.ingest.report import EMBED_TEXT, IngestOptions, IngestReport, SkippedFile
from union_igrot.gallery.ingest.rows import (
    RowWriter,
    find_broken,
    find_gone,
    find_lost_sources,
    make_plan,
    read_index,
    with_texts,
)
from union_igrot.gallery.metadata import widen_rows
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import ADVICE, default_root
from union_igrot.storage.locks import acquire_exclusive
from union_igrot.terminal import progress_bar

if TYPE_CHECKING:
    from ray import ObjectRef

EXAMPLES: Final = 5  # broken images that a report names
_ROUNDS: Final = 5
_DELETE_ROWS: Final = 10_000

_MAX_BATCHES: Final = 16  # batches per task of a Ray actor
_RETRIES: Final = 5  # how often an actor is restarted, and a task repeated, after its process died

_Executor = Callable[[Sequence[Entry], UInt64[np.ndarray, " digests"] | None], Generator[EmbeddedBatch, None, None]]
_Job = tuple[IGROTModel, UInt64[np.ndarray, " digests"] | None, IngestOptions]


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
    start = time.perf_counter()
    options = _with_settings_of(index, options or IngestOptions(), vectors)
    widen = partial(widen_rows, model=model, metadata=index.metadata)
    model.eval()
    local = nullcontext(lambda entries, known: embed_entries(model, entries, options, known, vectors))
    executors = ray_executor(model, options) if options.executor == "ray" and vectors is None else local
    with lock_index(index.uri, options.cache, wait) as skipped_file, progress_bar(shown=options.progress) as bar:
        task = bar.add_task("reading the index", total=None)
        rows, digests, sources = read_index(index, listing, prune=options.prune)
        listing = with_texts(listing, rows, options.embed_text)
        gone, emptied = find_gone(listing, rows) if options.prune else ([], {})
        skipped = SkippedFile(skipped_file, listing.source)
        again = options.file_columns == "all"
        read, rewrite, skips = make_plan(listing, rows, skipped.own, options.embed_text, read_again=again)
        if skips and options.on_broken == "fail":
            raise _broken_image_error(skips[0].path, skips[0].reason)
        skipped.add(skips)
        with RowWriter(index, listing, rows, skipped) as writer:
            known = [DecodedImage(rows[entry.id].digest) for entry in rewrite]
            writer.add(rewrite, known, torch.empty(0, index.dim))
            todo = [*read, *writer.flush()]
            show = partial(bar.update, task, description="embedding images", total=len(todo))
            began = time.perf_counter()
            opened, waited = _embed_all(executors, todo, digests, writer, options, widen, show) if todo else (0, 0.0)
            working = time.perf_counter() - began
        bar.update(task, description="finishing")
        unchanged = len(listing.entries) - len(read) - len(rewrite) - len(skips)
        skips += writer.broken
        removed = delete_rows(index, [*gone, *(find_broken(skips, rows) if options.prune else ())])
        if writer.added + writer.updated + removed:
            index.optimize()
        broken = {skip.path: skip.reason for skip in skips}
        skipped.keep(_still_skipped(skipped, broken, listing, prune=options.prune))
    return IngestReport(
        added=writer.added,
        updated=writer.updated,
        unchanged=unchanged,
        removed=removed,
        skipped=len(broken),
        embedded=writer.embedded,
        opened=opened,
        seconds=time.perf_counter() - start,
        working=working,
        decoding_wait=waited,
        writing_wait=writer.waited,
        skipped_file=skipped_file if broken else None,
        reasons=tuple(broken.items())[:EXAMPLES],
        excluded=listing.excluded,
        emptied=emptied,
        lost_sources=find_lost_sources(sources),
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


def _embed_all(
    executors: AbstractContextManager[_Executor],
    todo: Sequence[Entry],
    known: UInt64[np.ndarray, " digests"],
    writer: RowWriter,
    options: IngestOptions,
    widen: Callable[[Tensor], Tensor],
    show_progress: Callable[..., None],
) -> tuple[int, float]:
    """Read and embed images; those whose embedding vanished from the index meanwhile are embedded after all.

    Returns the number of images read, and the seconds for which the model waited for them.
    """
    opened, waited = 0, 0.0
    with executors as executor:
        for attempt in range(_ROUNDS):
            with closing(executor(todo, known if attempt == 0 else None)) as batches:
                for entries, images, vectors, seconds in batches:
                    writer.add(entries, images, widen(vectors))
                    opened, waited = opened + len(entries), waited + seconds
                    show_progress(completed=opened)
                    for entry, image in zip(entries, images, strict=True):
                        if image.reason and options.on_broken == "fail":
                            raise _broken_image_error(entry.id, image.reason)
            todo = writer.flush()
            if not todo:
                return opened, waited
    raise DataError("rows vanish from the index while images are added; stop the process that removes them, run again")


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


@final
class EmbeddingActor:
    """Embeds images in a process of its own."""

    def __init__(self) -> None:
        self._job: _Job | None = None

    def embed(
        self, job: "list[ObjectRef[_Job]]", entries: Sequence[Entry]
    ) -> tuple[list[DecodedImage], Float[Tensor, "embedded dim"], float]:
        """Decode and embed images; `job` is in a list, so that Ray does not fetch it for every task."""
        if self._job is None:
            import ray  # noqa: PLC0415 - an extra

            model, known, options = ray.get(job[0])
            self._job = model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), known, options
        model, known, options = self._job
        batches = list(embed_entries(model, entries, options, known))
        images = [image for _, found, _, _ in batches for image in found]
        return images, torch.cat([vectors for _, _, vectors, _ in batches]), sum(waited for *_, waited in batches)


@contextmanager
def ray_executor(model: IGROTModel, options: IngestOptions) -> Iterator[_Executor]:
    """Connect to a Ray cluster, or start one on this machine.

    Raises:
        ConfigError: If Ray is not installed, the cluster cannot be reached, or has too few GPUs or CPU cores.
        UnionError: If an actor dies again and again.
    """
    require_packages("executor=ray", "ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs keep the environment
    import ray  # noqa: PLC0415 - an extra

    started = not ray.is_initialized()
    if started:
        _connect(ray, options.ray_address)
    device = model.device
    try:
        actors, gpus = _count_actors(ray, options.actors)
        model.to("cpu")
        workers = max(1, ((os.cpu_count() or 1) - 1) // actors) if options.workers is None else options.workers
        own = replace(options, executor="local", workers=workers)

        def embed(
            entries: Sequence[Entry], known: UInt64[np.ndarray, " digests"] | None
        ) -> Generator[EmbeddedBatch, None, None]:
            remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=_RETRIES, max_task_retries=_RETRIES)
            job = ray.put((model, known, own))
            pool: list[Any] = [remote(EmbeddingActor).remote() for _ in range(actors)]
            try:
                yield from _embed_on(pool, job, entries, own.batch_size)
            except ray.exceptions.RayActorError as error:
                raise UnionError(
                    f"a Ray actor died {_RETRIES} times ({str(error).splitlines()[0]}); look at the logs of Ray, then "
                    "run the same command again: written rows are kept"
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            finally:
                for actor in pool:
                    ray.kill(actor)

        yield embed
    finally:
        model.to(device)
        if started:
            ray.shutdown()


def _embed_on(
    pool: Sequence[Any], job: Any, entries: Sequence[Entry], batch_size: int
) -> Generator[EmbeddedBatch, None, None]:
    """Embed on actors, in order; each has a task waiting while it works on another."""
    from ray.util import ActorPool  # noqa: PLC0415 - an extra

    batches = math.ceil(len(entries) / batch_size)
    size = batch_size * max(1, min(_MAX_BATCHES, batches // (4 * len(pool))))
    tasks = [entries[at : at + size] for at in range(0, len(entries), size)]
    results = ActorPool([*pool, *pool]).map(lambda actor, task: actor.embed.remote([job], task), tasks)
    seen: set[str] = set()
    for task, (images, vectors, waited) in zip(tasks, results, strict=True):
        yield task, *drop_repeated(images, vectors, seen), waited / len(pool)


def _connect(ray: Any, address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot connect to the Ray cluster {address or 'local'} ({reason}); check ray.address, or start one with "
            "ray start --head"
        ) from None


def _count_actors(ray: Any, wanted: int | None) -> tuple[int, bool]:
    """Return the number of actors and whether they use GPUs."""
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    actors, most = wanted or gpus or max(1, cores // 2), gpus or cores
    if actors > most:
        what = "GPUs" if gpus else "CPU cores"
        raise ConfigError(f"invalid value for ray.actors: {actors} (the cluster has {most} {what}, one per actor)")
    return actors, gpus > 0
