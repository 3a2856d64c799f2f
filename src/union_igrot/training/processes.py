"""The processes of a training: detected if torchrun or SLURM started them, else launched here."""

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
from torch.distributed.rendezvous import rendezvous

from union_igrot.errors import ConfigError, UnionError

_LAUNCHER = "UNION_LAUNCHER"
"""Environment variable with the id of the launching process."""
_BROADCAST_TIMEOUT = timedelta(minutes=10)


@final
@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Attributes:
        rank: Its rank over all machines.
        world: Number of processes.
        per_machine: Number of processes on this machine.
        store: Store of the launcher; None for a single process.
    """

    rank: int = 0
    world: int = 1
    per_machine: int = 1
    store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def broadcast(self, name: str, value: str | None = None) -> str:
        """Send a text from rank 0 to all, before training has joined the processes.

        Args:
            name: Name of the text, used once per run.
            value: The text, on rank 0.

        Raises:
            UnionError: If nothing arrives from rank 0 within ten minutes.
        """
        if self.store is None:
            return value or ""
        if self.is_main:
            self.store.set(f"union/{name}", value or "")
            return value or ""
        try:
            self.store.wait([f"union/{name}"], _BROADCAST_TIMEOUT)
        except RuntimeError:
            raise UnionError(f"rank {self.rank} received nothing from rank 0; see the output of rank 0") from None
        return str(self.store.get(f"union/{name}").decode())


def detect_processes() -> Processes:
    """Return this process among those that torchrun or SLURM started, or a single one."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # noqa: PLC0415 - slow
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment  # noqa: PLC0415 - slow

    _end_with_launcher()
    started = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if started is None or started.world_size() == 1:
        return Processes()
    rank, world = started.global_rank(), started.world_size()
    os.environ.setdefault("MASTER_ADDR", str(started.main_address))
    os.environ.setdefault("MASTER_PORT", str(started.main_port))
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world)
    store, _, _ = next(rendezvous("env://", rank, world))
    return Processes(rank, world, per_machine, store)


def count_processes(accelerator: str, devices: int | str, nodes: int) -> int:
    """Return the number of processes to launch on this machine.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, ...
        devices: Number of devices, or `auto`: all accelerators, one process on a CPU.
        nodes: Number of machines.

    Raises:
        ConfigError: For several machines, on which torchrun or SLURM has to start the processes.
    """
    if nodes > 1:
        raise ConfigError(
            f"strategy.nodes={nodes} needs a process started on each machine; use torchrun --nnodes={nodes} "
            "--nproc-per-node=DEVICES -m union_igrot.cli.train ..., or srun under SLURM"
        )
    if devices != "auto":
        return int(devices)
    return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1


def launch_processes(module: str, arguments: Sequence[str], count: int) -> None:
    """Run a command in several processes of this machine and wait for them.

    Args:
        module: Module of the command.
        arguments: Its arguments.
        count: Number of processes.

    Raises:
        SystemExit: With the exit code of the process that failed first, which has printed its error; with 128 and the
            number of a signal that ended this process or another, which print nothing then.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415 - slow
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415 - slow
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415 - slow

    # Its report of a failed process takes pages; the process itself has printed one line. Each logger has a level.
    for name in [one for one in logging.root.manager.loggerDict if one.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(launch, sys.executable)("-m", module, *arguments)
    except SignalException as ended:
        raise SystemExit(128 + int(ended.sigval)) from None
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 1) from None


def _end_with_launcher() -> None:
    """End this process soon after the process that launched it was killed."""
    launcher = int(os.environ.get(_LAUNCHER, "0"))
    if os.getppid() != launcher:  # not launched, or a process that this one starts
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_process_group() -> None:
    """Wait for all processes of a distributed run and continue alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
