"""`union-index`: put images into an index, or remove rows from it."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.files import expand_user, is_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.gallery.ingest.entries import Listing
    from union_igrot.gallery.ingest.report import IngestOptions, IngestReport

_NAMES = 5
"""Names of files and folders left out that are shown."""
_CAMERA_SUFFIXES = (".jpg", ".jpeg", ".heic", ".heif")
_USE_RAY = "union-index uses one device of one machine; for more pass executor=ray ray.actors=N"


def index_images(config: "DictConfig", _: Path) -> None:
    """Put images into an index as configured, or remove rows from it."""
    if (config.images is None) == (config.remove is None):
        raise ConfigError("give either images=SOURCE, the images to add, or remove=FILTER, the rows to remove")
    if config.index == "memory:":
        raise ConfigError("index=memory: ends with the process; use union_igrot.Gallery for that, or name a folder")
    _check_one_process(config)
    if config.remove is not None:
        _remove_rows(config)
    else:
        _add_images(config)


def _check_one_process(config: "DictConfig") -> None:
    """Refuse settings of several processes."""
    where = config.strategy
    for name, allowed in (("name", ("auto",)), ("devices", ("auto", 1)), ("nodes", (1,))):
        if where[name] not in allowed:
            setting = "strategy" if name == "name" else f"strategy.{name}"
            raise ConfigError(f"invalid value for {setting}: {where[name]}; {_USE_RAY}")
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"union-index was started by torchrun; {_USE_RAY}")


def _remove_rows(config: "DictConfig") -> None:
    from union_igrot.gallery.engines.factory import open_index
    from union_igrot.gallery.ingest.pipeline import delete_rows

    with open_index(config.index) as index:
        try:
            names = [str(name) for batch in index.scan(["id"], config.remove) for name in batch["id"]]
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "remove=", 1)) from None
        if removed := delete_rows(index, names):
            index.optimize()
        print(f"{index.uri}: {len(index):,} rows; {removed:,} removed")  # noqa: T201 - output of the command


def _add_images(config: "DictConfig") -> None:
    # Imported here, so that --help and mistakes in the configuration are fast.
    from union_igrot.gallery.gallery import Gallery
    from union_igrot.gallery.ingest.embedding import read_vectors
    from union_igrot.gallery.ingest.report import IngestOptions
    from union_igrot.gallery.ingest.sources import SOURCE_FORMS
    from union_igrot.gallery.metadata import model_of_index, read_metadata
    from union_igrot.models.devices import resolve_device
    from union_igrot.models.foreign import FOREIGN
    from union_igrot.models.onnx import require_onnx

    options = IngestOptions(
        exclude=config.exclude,
        max_megapixels=config.max_megapixels,
        batch_size=config.batch_size,
        workers=config.workers,
        decoder=config.decoder,
        on_broken=config.on_broken,
        prune=config.prune,
        cache=None if config.cache_dir is None else expand_user(config.cache_dir),
        progress=config.progress,
        precision=config.precision.trainer,
        executor=config.executor,
        ray_address=config.ray.address,
        actors=config.ray.actors,
        file_columns=config.file_columns,
        embed_text=config.embed_text,
    )
    if options.precision in ("onnx", "int8"):
        require_onnx()
    listing = _list_images(config.images, options)
    chosen = config.checkpoint
    if config.vectors_from is not None:
        if config.vectors is None or chosen is not None:
            raise ConfigError("vectors_from= names another program's model: give vectors=, and no checkpoint")
        chosen = f"{FOREIGN}{config.vectors_from}/{read_vectors(config.vectors).shape[1]}"
    recorded = read_metadata(config.index)
    model, checkpoint = model_of_index(recorded, config.index, chosen, config.weights, config.preprocess)
    _warn_about_photos(model.backbone.name, listing)
    if config.executor == "local":
        accelerator = config.strategy.accelerator
        model.to(resolve_device("cuda" if accelerator == "gpu" else accelerator))
    with Gallery(None, model, config.index, checkpoint, config.weights, config.calibration) as gallery:
        report = gallery.ingest(listing, options, config.vectors)
        if recorded or listing.entries:
            _print_report(report, gallery.index.uri, len(gallery))
    if not report.added + report.updated + report.unchanged:
        found = f"none of its {report.skipped:,} files could be used" if report.skipped else "it holds no images"
        found += f" but {sum(report.excluded.values()):,} that are left out" if report.excluded else ""
        advice = "" if is_folder(listing.source) else f"; give {SOURCE_FORMS}"
        raise DataError(f"images={config.images}: {found}{advice}")


def _warn_about_photos(backbone: str, listing: "Listing") -> None:
    """Warn if the model of the generated world is used for files of a format in which cameras write."""
    from union_igrot.terminal import print_line

    if backbone == "tiny" and any(entry.id.lower().endswith(_CAMERA_SUFFIXES) for entry in listing.entries):
        print_line(
            "the backbone tiny only knows generated shapes; its results on photographs are arbitrary. Leave "
            "checkpoint= out for the bundled model of photographs, or pass checkpoint=base, under another index=",
            stderr=True,
        )


def _list_images(images: str, options: "IngestOptions") -> "Listing":
    from union_igrot.gallery.ingest.sources import list_source
    from union_igrot.terminal import progress_bar

    with progress_bar(shown=options.progress) as bar:
        task = bar.add_task("listing images", total=None)
        return list_source(images, options, lambda count: bar.update(task, completed=count))


def _print_report(report: "IngestReport", name: str, rows: int) -> None:
    from union_igrot.terminal import print_line

    counts = ("added", "updated", "unchanged", "removed", "skipped")
    lines = [f"{name}: {rows:,} rows; " + ", ".join(f"{getattr(report, what):,} {what}" for what in counts)]
    if report.opened:
        reused = report.added + report.updated - report.embedded
        lines.append(
            f"{report.embedded:,} embedded, {reused:,} reused existing embeddings; "
            f"{report.rate:,.0f} images/s for {report.working:,.1f} s: "
            f"model idle for {report.decoding_wait:,.1f} s (decoding) and {report.writing_wait:,.1f} s (writing)"
        )
    if report.excluded:
        shown = ", ".join(sorted(report.excluded)[:_NAMES]) + (", ..." if len(report.excluded) > _NAMES else "")
        lines.append(f"{sum(report.excluded.values()):,} files and folders left out: {shown}")
    lines += [
        f"{kept:,} rows are kept although {folder} is empty; check that its disk is mounted, or delete the folder and "
        "run this again"
        for folder, kept in report.emptied.items()
    ]
    for source, lost in report.lost_sources.items():
        remedy = "source = '{}'".format(source.replace("'", "''"))
        lines.append(f'{lost:,} rows come from {source}, which no longer exists; remove="{remedy}" removes them')
    lines += [f"  skipped {path}: {reason}" for path, reason in report.reasons]
    if report.skipped > len(report.reasons):
        lines.append(f"  and {report.skipped - len(report.reasons):,} more")
    if report.skipped_file is not None:
        lines.append(f"  all of them in {report.skipped_file}")
    for line in lines:
        print_line(line)


main = partial(run_command, "index", index_images, resumes=True)
if __name__ == "__main__":
    main()
