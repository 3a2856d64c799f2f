"""How indexing is asked to work, and what it reports.

Plain values. Does not do anything.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, final

from union_igrot.errors import ConfigError
from union_igrot.models.devices import TrainerConfig


@final
@dataclass(frozen=True)
class Work:
    """How the work is done.

    Attributes:
        batch_size: Images a forward pass.
        workers: Processes that decode; None takes all cores but one, see `processes.default_workers`, at least one; 0
            decodes in this process, where a file that makes a decoder crash ends it.
        decoder: What decodes plain JPEGs: `pillow`, in the worker processes, or `torchcodec`, many at once on the
            model's device, for GPUs, which have an engine for it. All else is Pillow's. Pixels of one image differ
            by a few steps between the two.
        on_broken: Whether an image that cannot be read is listed and left out, or ends the work.
        prune: Whether rows of this source whose image is gone are removed.
        cache: Cache folder, for work files and the lock; `$UNION_CACHE` or its default where None.
        progress: Whether a bar is shown.
        machine: Devices and precision; where the model lies, in float32, where None.

    Raises:
        ConfigError: Where a value is not allowed; names those that are.
    """

    batch_size: int = 256
    workers: int | None = None
    decoder: Literal["pillow", "torchcodec"] = "pillow"
    on_broken: Literal["skip", "fail"] = "skip"
    prune: bool = True
    cache: Path | None = None
    progress: bool = True
    machine: TrainerConfig | None = None

    def __post_init__(self) -> None:
        """Refuse what would be taken for something else."""
        for name, allowed in (("decoder", ("pillow", "torchcodec")), ("on_broken", ("skip", "fail"))):
            if (given := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} is {given!r}; give {' or '.join(allowed)}")
        if self.batch_size < 1 or (self.workers is not None and self.workers < 0):
            raise ConfigError(
                f"batch_size is {self.batch_size} and workers is {self.workers}; give batches of 1 or more, and 0 or "
                "more workers"
            )


@final
@dataclass(frozen=True)
class Report:
    """What became of it: numbers of images, times in seconds.

    Attributes:
        added: Rows that are new.
        updated: Rows that were written again: the image or its columns changed, or it was touched.
        unchanged: Rows that were right.
        removed: Rows that were removed: the image is gone, or broken now.
        skipped: Images that cannot be read, now or at an earlier run.
        embedded: Images that went through the model; other new rows took a vector that was there.
        opened: Images that were read.
        seconds: Of the whole work.
        working: Of reading and embedding, in the first process as what follows.
        model_waited: How long the model waited for decoded images.
        decoding_waited: How long decoding waited for the model, mean of the workers.
        writing_waited: How long the model waited for rows to be written.
        skipped_file: Where those that cannot be read are listed with the reason; None for an index in memory.
        reasons: Some of them, id and reason.
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
    model_waited: float = 0.0
    decoding_waited: float = 0.0
    writing_waited: float = 0.0
    skipped_file: Path | None = None
    reasons: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        """Name what is not as it is from the start."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        told = {name: round(value, 2) if isinstance(value, float) else value for name, value in told.items()}
        return f"Report({', '.join(f'{name}={value!r}' for name, value in told.items() if value not in (0, None, ()))})"

    @property
    def rate(self) -> float:
        """Images read a second; 0 where none was read."""
        return self.opened / self.working if self.working else 0.0
