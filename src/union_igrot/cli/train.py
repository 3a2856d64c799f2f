"""`union-train`: train the heads, evaluate them, write the results."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, launch_of, run_command
from union_igrot.cli.config import plain
from union_igrot.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train_from_config(config: "DictConfig", fresh: Path) -> Path | None:
    """Train as configured; `fresh` is used if no folder is named and no run is resumed.

    Returns:
        The run's folder, in the process that prints and writes.
    """
    if config.precision.trainer in ("onnx", "int8"):
        raise ConfigError(f"precision={config.precision.trainer} is for union-index; choose fp32, bf16 or fp16")
    from union_igrot.training.loggers import require_logger
    from union_igrot.training.processes import count_processes, detect_processes, launch_processes

    require_logger(config.logger.name)
    processes, strategy = detect_processes(), config.strategy
    if processes.world == 1:
        count = count_processes(strategy.accelerator, strategy.devices, strategy.nodes)
        if count > 1:
            from hydra.core.hydra_config import HydraConfig

            escaped = str(fresh).replace("\\", "\\\\").replace("'", "\\'")
            arguments = [*HydraConfig.get().overrides.task, f"hydra.run.dir='{escaped}'"]
            try:
                launch_processes("union_igrot.cli.train", arguments, count)
            except SystemExit as end:
                signals: dict[object, BaseException]
                signals = {EXIT_TERMINATED: Terminated(), EXIT_INTERRUPTED: KeyboardInterrupt()}
                raise signals.get(end.code, end) from None
            return None
    from union_igrot.experiment import run_training
    from union_igrot.models.devices import resolve_device

    # What comes from disk, or was in shards, is on the CPU.
    device = resolve_device("cpu" if strategy.accelerator == "cpu" else "auto")
    _, folder = run_training(plain(config), launch_of(config), fresh, device, processes=processes)
    return folder if processes.is_main else None


main = partial(run_command, "train", train_from_config, resumes=True)
if __name__ == "__main__":
    main()
