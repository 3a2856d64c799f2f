"""Options and results of an ingestion, and the list of images that could not be read."""

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal, NamedTuple, final, get_args, get_origin

from union_igrot.errors import ConfigError, DataError, check_choice, check_count
from union_igrot.images.exif import EXIF_COLUMNS
from union_igrot.storage.cache import write_cached

EMBED_TEXT: Final = "embed_text"
"""Name of that option in the metadata of an index; an index without it embeds images alone."""

PRECISIONS: Final = ("32-true", "bf16-mixed", "16-mixed", "onnx", "int8")
_log: Final = logging.getLogger("union_igrot.indexing")


@final
@dataclass(frozen=True)
class IngestOptions:
    """How images are put into an index.

    Attributes:
        batch_size: Images per forward pass.
        workers: Decoding processes, of each actor with Ray. None for all cores but one, at least one, see
            `models.devices`; 0 decodes in the main process, which a file that crashes the decoder ends.
        decoder: `pillow`. `torchcodec`, which earlier versions had, is accepted with a warning.
        on_broken: Whether an image that cannot be read is listed and skipped, or an error.
        prune: Whether rows of this source whose image is gone are removed.
        cache: Cache folder, for the lock; None for `$UNION_CACHE` or its default.
        progress: Whether a progress bar is shown.
        precision: Precision of the backbone: `32-true`, `bf16-mixed` or `16-mixed`; or, on a CPU with the extra `onnx`,
            `onnx` for 32 bits in ONNX Runtime and `int8` for 8 bits, which is recorded in the index.
        executor: `local`, on the device of the model, or `ray`, on the actors of a Ray cluster.
        ray_address: Address of the cluster, `auto` for one that runs on this machine; None starts a local one.
        actors: Number of Ray actors; None for one per GPU, or one per two CPU cores without GPUs.
        exclude: Patterns of files and folders in a folder that are left out, see `list_images`.
        max_megapixels: Largest image in 10^6 pixels; None for `$UNION_MAX_MEGAPIXELS` or 179.
        file_columns: Which images get columns from EXIF data (see `read_exif`), class folders and caption files: `new`,
            those that are read anyway; `all`, for which unchanged files are opened again but not embedded; or `none`.
        embed_text: Column of a list, or `caption` or `class`, whose text is embedded with its image by the query head,
            where there is one; recorded in a new index, and None for what an index records.

    Raises:
        ConfigError: If a value is invalid.
    """

    batch_size: int = 256
    workers: int | None = None
    decoder: Literal["pillow", "torchcodec"] = "pillow"
    on_broken: Literal["skip", "fail"] = "skip"
    prune: bool = True
    cache: Path | None = None
    progress: bool = True
    precision: str = "32-true"
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    actors: int | None = None
    exclude: Sequence[str] = ()
    max_megapixels: float | int | None = None
    file_columns: Literal["new", "all", "none"] = "new"
    embed_text: str | None = None

    def __post_init__(self) -> None:
        """Validate the values."""
        if isinstance(self.exclude, str):  # one pattern, not its letters
            object.__setattr__(self, "exclude", (self.exclude,))
        for one in fields(self):
            if get_origin(one.type) is Literal:
                check_choice(one.name, getattr(self, one.name), get_args(one.type))
        check_choice("precision", self.precision, PRECISIONS)
        for name, least in (("batch_size", 1), ("workers", 0), ("actors", 1)):
            if (count := getattr(self, name)) is not None:
                check_count(name, count, least)
        if self.decoder == "torchcodec":
            _log.warning("decoder=torchcodec was removed, as it was slower than pillow, which is used; leave it out")
        if self.embed_text in EXIF_COLUMNS:
            raise ConfigError(f"invalid value for embed_text: {self.embed_text} (expected caption, or a list's column)")
        if self.max_megapixels is not None and not self.max_megapixels > 0:
            raise ConfigError(f"invalid value for max_megapixels: {self.max_megapixels} (expected a number above 0)")


@final
@dataclass(frozen=True)
class IngestReport:
    """Result of an ingestion: numbers of images, times in seconds.

    Attributes:
        added: New rows.
        updated: Rows written again: the image or its columns changed, or its modification time.
        unchanged: Rows that were up to date.
        removed: Rows removed: the image is gone, or no longer readable.
        skipped: Images that cannot be read, now or at an earlier run.
        embedded: Images embedded; other new rows reuse the embedding of equal bytes.
        opened: Images read.
        seconds: Total time.
        working: Time of reading and embedding.
        decoding_wait: How long the model was idle, waiting for decoded images.
        writing_wait: How long the model was idle, waiting for rows to be written.
        skipped_file: List of the images that cannot be read, with reasons; None for an index in memory.
        reasons: The first of them, id and reason.
        excluded: Files and folders that were left out, see `Listing`.
        emptied: Rows that were kept by folder: it exists, but is empty, as if its disk were not mounted.
        lost_sources: Rows by source, of other sources that no longer exist.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: int = 0
    embedded: int = 0
    opened: int = 0
    seconds: float = 0.0
    working: float = 0.0
    decoding_wait: float = 0.0
    writing_wait: float = 0.0
    skipped_file: Path | None = None
    reasons: tuple[tuple[str, str], ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    emptied: Mapping[str, int] = field(default_factory=dict)
    lost_sources: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Show what differs from the defaults."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values = {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}
        shown = (f"{name}={value!r}" for name, value in values.items() if value not in (0, None, (), {}))
        return f"IngestReport({', '.join(shown)})"

    @property
    def rate(self) -> float:
        """Images read per second."""
        return self.opened / self.working if self.working else 0.0


class SkippedImage(NamedTuple):
    """An image that could not be read."""

    path: str  # the id that its row would have
    reason: str  # why
    size: int  # bytes; 0 if unknown
    mtime: int  # modification time in ns; 0 if unknown


@final
class SkippedFile:
    """The list of skipped images, JSON lines beside the index; the lines of other sources are left as they are."""

    def __init__(self, path: Path | None, source: str) -> None:
        self.path, self._source = path, source
        self.own: dict[str, SkippedImage] = {}
        self._others: list[bytes] = []
        try:
            lines = [] if path is None or not path.exists() else path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); check the disk and the permissions") from error
        for line in lines:
            try:
                values = json.loads(line)
                skip = SkippedImage(*(values[name] for name in SkippedImage._fields))
                if values["source"] == source:
                    self.own[skip.path] = skip
                else:
                    self._others.append(line)
            except (ValueError, KeyError, TypeError):
                _log.warning("%s: ignored an invalid line", path)

    def add(self, skips: Iterable[SkippedImage]) -> None:
        """Add images; they are on disk when this returns."""
        if new := {skip.path: skip for skip in skips if self.own.get(skip.path) != skip}:
            self.own |= new
            self._write()

    def keep(self, paths: Collection[str]) -> None:
        """Keep only these images; an empty list is deleted."""
        self.own = {path: skip for path, skip in self.own.items() if path in paths}
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        rows = [{**skip._asdict(), "source": self._source} for skip in self.own.values()]
        # An undecodable byte of a name becomes a JSON escape.
        own = [json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") for row in rows]
        if lines := [*self._others, *own]:
            write_cached(self.path, [line + b"\n" for line in lines])
        else:
            self.path.unlink(missing_ok=True)
