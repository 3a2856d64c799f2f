"""`union-index`: images into an index, alone or in several processes; rows out of it.

Knows the order of the steps and the words. Does not know how an image becomes a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from union_igrot.cli.command import run_command
from union_igrot.errors import ConfigError
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from union_igrot.gallery.ingest.entries import Listing
    from union_igrot.gallery.ingest.work import Report, Work
    from union_igrot.training.processes import Processes

_MODULE = "union_igrot.cli.index"
_AT_ONCE = 10_000
LITERAL = ("images", "index", "remove", "checkpoint", "weights", "cache_dir")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-index`."""
    run_command("index", index_images, argv, literal=LITERAL, resumes=True)


def index_images(config: DictConfig, fresh: Path) -> None:
    """Put images into an index as configured, or take rows out of it."""
    del fresh
    if (config.images is None) == (config.remove is None):
        raise ConfigError("give images=SOURCE, what is put in, or remove=FILTER, what is taken out")
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from union_igrot.cli import assemble
    from union_igrot.gallery.ingest.work import Work
    from union_igrot.training.processes import found_processes, start_processes, wanted_processes

    processes, where = found_processes(), config.strategy
    if where.name.startswith("fsdp"):
        raise ConfigError("strategy=fsdp cuts a model that is trained; to embed, each device takes it whole: give ddp")
    if config.index == "memory:":
        raise ConfigError("index=memory: ends with the process; use union_igrot.Gallery for that, or name a folder")
    if config.remove is not None:
        _remove(config)
        return
    if processes.world == 1:
        count = wanted_processes(where.accelerator, where.devices, where.nodes, _MODULE)
        if count > 1:
            start_processes(_MODULE, _said(config), count)
            return
    work = Work(
        config.batch_size,
        config.workers,
        config.decoder,
        config.on_broken,
        config.prune,
        None if config.cache_dir is None else expand_user(config.cache_dir),
        config.progress,
        assemble.machine(config, processes),
    )
    if processes.leads:
        _lead(config, work, processes)
    else:
        _follow(config, work, processes)


def _remove(config: DictConfig) -> None:
    """Take the rows out that pass a filter."""
    from union_igrot.gallery.engines.factory import open_index

    with open_index(config.index) as index:
        try:
            names = [str(name) for batch in index.scan(["id"], config.remove) for name in batch["id"]]
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "remove=", 1)) from None
        removed = sum(index.delete(names[at : at + _AT_ONCE]) for at in range(0, len(names), _AT_ONCE))
        if removed:
            index.optimize()
        print(f"{index.uri}: {len(index):,} rows; {removed:,} removed")  # noqa: T201 - the command's voice


def _said(config: DictConfig) -> list[str]:
    """Return what was said, as it was typed: what is taken literally was quoted for Hydra."""
    task = [(override.partition("=")[0], override) for override in HydraConfig.get().overrides.task]
    typed = [key in LITERAL and config[key] is not None for key, _ in task]
    return [f"{key}={config[key]}" if told else said for (key, said), told in zip(task, typed, strict=True)]


def _lead(config: DictConfig, work: "Work", processes: "Processes") -> None:
    """List the images, open the index and fill it: what one process does, or the first of several."""
    from union_igrot.gallery.ingest.run import ingest_images
    from union_igrot.gallery.ingest.share import Words
    from union_igrot.gallery.metadata import check_backbone_name, index_metadata, load_checkpoint, open_or_create

    try:
        listing = _listed(config.images, shown=config.progress)
        check_backbone_name(config.index, config.checkpoint)
        model, checkpoint = load_checkpoint(config.checkpoint, config.weights)
        metadata = index_metadata(model, checkpoint, config.weights)
        index = open_or_create(config.index, model.backbone.dim, metadata)
    except BaseException:
        Words(processes).say(None)
        raise
    with index:
        report = ingest_images(index, model, listing, work, processes, fingerprint=metadata["fingerprint"])
        _tell(report, index.uri, len(index))


def _follow(config: DictConfig, work: "Work", processes: "Processes") -> None:
    """Embed what the first process deals to this one, and say nothing."""
    from union_igrot.gallery.ingest.share import follow
    from union_igrot.gallery.metadata import load_checkpoint

    follow(load_checkpoint(config.checkpoint, config.weights)[0], work, processes)


def _listed(images: str, *, shown: bool) -> "Listing":
    from union_igrot.gallery.ingest.sources import list_images
    from union_igrot.progress import progress_bar

    with progress_bar(shown=shown) as bar:
        task = bar.add_task("listing images", total=None)
        return list_images(images, lambda count: bar.update(task, completed=count))


def _tell(report: "Report", name: str, rows: int) -> None:
    """Say what became of it."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    counts = ("added", "updated", "unchanged", "removed", "skipped")
    console.print(f"{name}: {rows:,} rows; " + ", ".join(f"{getattr(report, what):,} {what}" for what in counts))
    if report.opened:
        reused = report.added + report.updated - report.embedded
        console.print(
            f"{report.embedded:,} embedded, {reused:,} took a vector that was there; "
            f"{report.rate:,.0f} images/s for {report.working:,.1f} s: "
            f"the model waited {report.model_waited:,.1f} s for decoding and {report.writing_waited:,.1f} s for "
            f"writing, decoding {report.decoding_waited:,.1f} s for the model"
        )
    for path, reason in report.reasons:
        console.print(f"  skipped {path}: {reason}")
    if report.skipped > len(report.reasons):
        console.print(f"  and {report.skipped - len(report.reasons):,} more")
    if report.skipped_file is not None:
        console.print(f"  all of them in {report.skipped_file}")


if __name__ == "__main__":
    main()
