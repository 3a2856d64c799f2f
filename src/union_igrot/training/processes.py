"""The machines of a run: the device that works alone, or the processes that share the work.

Processes are found where torchrun or SLURM started them, else started here. Knows devices, ranks,
the launcher and how a word is passed before training has joined the processes. Does not know what
they do.
"""

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
from torch.distributed.rendezvous import rendezvous

from union_igrot.errors import ConfigError, UnionError

_PATIENCE = timedelta(minutes=10)


@final
@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Attributes:
        rank: Its number, from 0, over all machines.
        world: How many there are.
        here: How many of them are on this machine.
        store: What words are passed through; None where it is alone.
    """

    rank: int = 0
    world: int = 1
    here: int = 1
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def share(self, name: str, value: str | None = None) -> str:
        """Pass a word from the first process to all.

        Args:
            name: What the word is about; used once a run.
            value: The word; given by the first process alone.

        Raises:
            UnionError: Where the first process was not heard of for ten minutes.
        """
        if self.store is None:
            return value or ""
        if self.leads:
            self.store.set(f"union/{name}", value or "")
            return value or ""
        try:
            self.store.wait([f"union/{name}"], _PATIENCE)
        except RuntimeError:
            raise UnionError(f"process {self.rank}: process 0 was not heard of; look at its output") from None
        return str(self.store.get(f"union/{name}").decode())

    def complain(self, why: str) -> None:
        """Tell the first process that this one failed, and why."""
        if self.store is not None:
            self.store.set(f"union/failed-{self.rank}", why)

    def complaint_of(self, rank: int) -> str | None:
        """Say why another process failed; None where it did not say so."""
        if self.store is None or not self.store.check([f"union/failed-{rank}"]):
            return None
        return str(self.store.get(f"union/failed-{rank}").decode())


def found_processes() -> Processes:
    """Look whether this process was started as one of several, by torchrun or SLURM."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # noqa: PLC0415 - slow
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment  # noqa: PLC0415 - slow

    started = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if started is None or started.world_size() == 1:
        return Processes()
    rank, world = started.global_rank(), started.world_size()
    os.environ.setdefault("MASTER_ADDR", str(started.main_address))
    os.environ.setdefault("MASTER_PORT", str(started.main_port))
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world)
    store, _, _ = next(rendezvous("env://", rank, world))
    return Processes(rank, world, here, store)


def wanted_processes(accelerator: str, devices: int | str, nodes: int, module: str = "union_igrot.cli.train") -> int:
    """Count the processes that a choice of devices means on this machine.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, ...
        devices: Their number, or `auto`: all accelerators, one process on a CPU.
        nodes: Machines.
        module: The command's module, for the advice.

    Raises:
        ConfigError: Where several machines are asked for: one process cannot start others elsewhere.
    """
    if nodes > 1:
        raise ConfigError(
            f"strategy.nodes={nodes} needs a process started on each machine; use torchrun --nnodes={nodes} "
            f"--nproc-per-node=DEVICES -m {module} ..., or srun under SLURM"
        )
    if devices != "auto":
        return int(devices)
    return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1


def start_processes(module: str, arguments: Sequence[str], count: int) -> None:
    """Run a command in several processes of this machine and wait for them.

    Args:
        module: The command's module.
        arguments: Its arguments.
        count: How many processes.

    Raises:
        SystemExit: With the code of the process that failed first; it has said why itself.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415 - slow
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415 - slow

    # Its reports of a failed process are pages long, and the process has said its line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", module, *arguments)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 1) from None


def part() -> None:
    """End the joint work: wait for all and go on alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
