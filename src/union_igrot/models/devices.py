"""Devices and precision: where a model runs, how many processes decode images for it, and exact float32."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from union_igrot.errors import ConfigError, wrong_type


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of a name.

    Args:
        name: `auto` (the first GPU of CUDA or ROCm, else Apple's, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`; or a
            device.

    Raises:
        ConfigError: If the device is not available.
    """
    if isinstance(name, torch.device):
        return name
    if not isinstance(name, str):
        raise wrong_type("device", name, "a name such as auto, cpu or cuda:0")
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    if found not in available:
        raise ConfigError(f"device {name!r} is not available here; choose {' or '.join(['auto', *available])}")
    return torch.device(found)


def default_workers(device: torch.device) -> int:
    """Return the default number of decoding workers: all cores but one.

    At most 8 for a model on the CPU, which needs the cores itself, and 32 for one on an accelerator.

    Args:
        device: Device of the model.
    """
    return min((os.cpu_count() or 1) - 1, 8 if device.type == "cpu" else 32)


def device_name(device: torch.device) -> str:
    """Return the name of a device for people, with the model of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def map_in_threads(compute: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Compute each part without gradients, several at once on a CPU, each in a thread of its own.

    Threads that share every layer wait for each other after each, and for whatever else the machine does.

    Args:
        compute: What is computed; a small convolutional network.
        parts: Tensors of one device.
    """
    threads = torch.get_num_threads()
    alone = len(parts) < 2 or threads < 2 or not parts[0].is_cpu
    if alone or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):  # both are settings of this thread
        return [compute(part) for part in parts]
    try:
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.no_grad()(compute), parts))
    finally:
        torch.set_num_threads(threads)  # what a thread sets is also the default of later ones


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products and convolutions of float32 in float32, without autocast, TF32 or bfloat16.

    By default torch lets a GPU's convolutions round their inputs to the ten bits of TF32.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        backends: Any = torch.backends  # its stubs are incomplete
        if hasattr(backends.cuda.matmul, "fp32_precision"):
            cpu = backends.mkldnn
            for switch in (backends.cuda.matmul, backends.cudnn.conv, cpu.matmul, cpu.conv):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:  # older torch
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
            backends.cudnn.allow_tf32 = False
        yield
