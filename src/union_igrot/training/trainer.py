"""Lightning's Trainer as it is used here: silent on what is meant so, and Ctrl-C stays Ctrl-C.

Knows Lightning and machines. Does not know what is trained or embedded.
"""

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import FSDPPrecision

from union_igrot.models.devices import TrainerConfig

_MEANT = (
    # A frozen backbone in evaluation mode.
    "Found .* module.* in eval mode",
    # Features come from the store; images have workers of their own.
    ".*does not have many workers",
    # Small data.
    "The number of training batches",
    # Metrics are the same on every process already.
    ".*sync_dist=True",
    # Lightning calls a deprecated part of torch.
    ".*isinstance\\(treespec, LeafSpec\\)",
    # A folder that holds an interrupted training is what is resumed.
    "Checkpoint directory .* exists and is not empty",
)


@final
class FSDPAsItIs(FSDPPrecision):
    """FSDP's precision, that leaves batches as they are: nobody may change ours, and FSDP casts by itself."""

    def convert_input(self, data: Any) -> Any:
        """Return the batch back."""
        return data


def make_trainer(
    machine: TrainerConfig, folder: Path, callbacks: Sequence[Callback], **options: Any
) -> lightning.Trainer:
    """Make a Trainer that shares its work as the data say and shows nothing unasked.

    Args:
        machine: Devices and precision.
        folder: Where Lightning may write.
        callbacks: What watches it.
        options: Further ones of `lightning.Trainer`.
    """
    fsdp = machine.strategy.startswith("fsdp")
    return lightning.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy=machine.strategy,
        precision=None if fsdp else machine.precision,
        plugins=[FSDPAsItIs(machine.precision)] if fsdp else None,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@contextmanager
def manners() -> Iterator[None]:
    """Make and use a Trainer inside: its notes on what is meant are left out, and an interruption goes to the caller.

    Raises:
        KeyboardInterrupt: After Ctrl-C, at which Lightning would end the process itself.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _MEANT:
                warnings.filterwarnings("ignore", message)
            yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        for number, handler in signals.items():  # Lightning leaves Ctrl-C ignored
            signal.signal(number, handler)
        raise KeyboardInterrupt from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
