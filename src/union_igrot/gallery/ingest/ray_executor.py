"""Decode and embed on the actors of a Ray cluster; rows are written by the process that started it."""

import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

from union_igrot.errors import ConfigError, UnionError, require_packages
from union_igrot.gallery.ingest.decode import DecodedImage
from union_igrot.gallery.ingest.entries import Entry
from union_igrot.gallery.ingest.pipeline import EmbeddedBatch, Timings, embed_entries
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.models.model import IGROTModel

if TYPE_CHECKING:
    from ray import ObjectRef

_MAX_BATCHES: Final = 16  # batches per task
_RETRIES: Final = 5  # how often an actor is restarted, and a task repeated, after its process died

_Job = tuple[IGROTModel, UInt64[np.ndarray, " digests"] | None, IngestOptions]
_Result = tuple[list[DecodedImage], Float[Tensor, "embedded dim"], Timings]


@final
class EmbeddingActor:
    """Embeds images in a process of its own."""

    def __init__(self) -> None:
        self._job: _Job | None = None

    def embed(self, job: "list[ObjectRef[_Job]]", entries: Sequence[Entry]) -> _Result:
        """Decode and embed images; `job` is in a list, so that Ray does not fetch it for every task."""
        if self._job is None:
            import ray  # noqa: PLC0415 - an extra

            model, known, options = ray.get(job[0])
            self._job = model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), known, options
        model, known, options = self._job
        timings = Timings()
        batches = list(embed_entries(model, entries, options, known, timings))
        images = [image for _, found, _ in batches for image in found]
        return images, torch.cat([vectors for _, _, vectors in batches]), timings


@contextmanager
def ray_executor(
    model: IGROTModel, options: IngestOptions, timings: Timings
) -> Iterator[Callable[[Sequence[Entry], UInt64[np.ndarray, " digests"] | None], Generator[EmbeddedBatch, None, None]]]:
    """Connect to a Ray cluster, or start one on this machine.

    Raises:
        ConfigError: If Ray is not installed, the cluster cannot be reached, or has too few GPUs or CPU cores.
        UnionError: If an actor dies again and again.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, options.ray_address)
    device = model.device
    try:
        actors, gpus = _count_actors(ray, options.actors)
        model.to("cpu")
        own = _options_per_actor(options, actors)

        def embed(
            entries: Sequence[Entry], known: UInt64[np.ndarray, " digests"] | None
        ) -> Generator[EmbeddedBatch, None, None]:
            remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=_RETRIES, max_task_retries=_RETRIES)
            job = ray.put((model, known, own))
            pool = [remote(EmbeddingActor).remote() for _ in range(actors)]
            try:
                yield from _embed_on(pool, job, entries, own.batch_size, timings)
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
    pool: Sequence[Any], job: Any, entries: Sequence[Entry], batch_size: int, timings: Timings
) -> Generator[EmbeddedBatch, None, None]:
    """Embed on actors, in order; each has a task waiting while it works on another."""
    from ray.util import ActorPool  # noqa: PLC0415 - an extra

    batches = math.ceil(len(entries) / batch_size)
    size = batch_size * max(1, min(_MAX_BATCHES, batches // (4 * len(pool))))
    tasks = [entries[at : at + size] for at in range(0, len(entries), size)]
    results = ActorPool([*pool, *pool]).map(lambda actor, task: actor.embed.remote([job], task), tasks)
    seen: set[str] = set()
    for task, (images, vectors, spent) in zip(tasks, results, strict=True):
        timings.decoding_wait += spent.decoding_wait / len(pool)
        yield task, *_drop_repeated(images, vectors, seen)


def _drop_repeated(
    images: list[DecodedImage], vectors: Float[Tensor, "embedded dim"], seen: set[str]
) -> tuple[list[DecodedImage], Float[Tensor, "kept dim"]]:
    """Drop embeddings of bytes that another task has embedded."""
    kept, rows = [], iter(range(len(vectors)))
    for at, image in enumerate(images):
        row = next(rows) if image.thumbnail is not None else None
        if image.digest in seen:
            images[at] = DecodedImage(image.digest, exif=image.exif)
        elif row is not None:
            kept.append(row)
            seen.add(image.digest)
    return images, vectors[kept]


def _options_per_actor(options: IngestOptions, actors: int) -> IngestOptions:
    """Share the cores of a machine among its actors."""
    workers = max(1, ((os.cpu_count() or 1) - 1) // actors) if options.workers is None else options.workers
    return replace(options, executor="local", workers=workers)


def _import_ray() -> Any:
    require_packages("executor=ray", "ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs keep the environment
    import ray  # noqa: PLC0415 - an extra

    return ray


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
