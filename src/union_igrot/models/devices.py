"""The devices that a model works on, and how many processes decode images for one."""

import os
from dataclasses import dataclass
from typing import Any, final

import torch

from union_igrot.errors import ConfigError

_DECODING = {"cpu": 8}
_MOST_DECODING = 32


@final
@dataclass(frozen=True)
class TrainerConfig:
    """Where and how a Trainer of Lightning works.

    Attributes:
        accelerator: `auto`, `cpu`, `gpu`, ...
        devices: Number of devices, the devices themselves, or `auto`.
        nodes: Number of machines.
        strategy: `auto`, `ddp`, ...
        precision: `32-true`, `bf16-mixed`, `16-mixed`.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    nodes: int = 1
    strategy: str = "auto"
    precision: Any = "32-true"

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done by CUDA (or ROCm) devices."""
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def resolve_device(name: str = "auto") -> torch.device:
    """Find the device that a name means.

    Args:
        name: `auto` (the first GPU of CUDA or ROCm, else Apple's, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        ConfigError: Where it is not there; names those that are.
    """
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there[:0] = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = {"auto": there[0], "cuda": "cuda:0"}.get(name, name)
    if found not in there:
        raise ConfigError(f"device={name} is not on this machine; give {' or '.join(['auto', *there])}")
    return torch.device(found)


def default_workers(device: torch.device, here: int = 1) -> int:
    """Return how many processes decode images for a model, where nobody says: all cores but one.

    Eight at most for a model on the CPU, which needs the cores itself, and 32 for one on an accelerator.

    Args:
        device: Where the model works.
        here: Processes of this machine that each decode, and share the cores.
    """
    spare = ((os.cpu_count() or 1) - 1) // here
    return min(max(spare, 0), _DECODING.get(device.type, _MOST_DECODING))


def device_name(device: torch.device) -> str:
    """Name a device for people: of a GPU its model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
