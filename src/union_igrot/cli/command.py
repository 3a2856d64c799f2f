"""What all commands share: help, validation before heavy imports, one line per mistake, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot import __version__
from union_igrot.cli.config import (
    Arguments,
    as_config,
    check_sweep,
    conf_dir,
    parse_arguments,
    plain,
    problems_of,
    resolve,
)
from union_igrot.cli.help import help_text
from union_igrot.cli.settings import COMMANDS
from union_igrot.errors import ConfigError, UnionError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.experiment import Launch

EXIT_USAGE = 2
"""Exit code for a user's mistake."""
EXIT_INTERNAL = 70
"""Exit code after an internal error, as in sysexits.h."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def _say(command: str, text: object) -> None:
    print(f"{command}: {text}", file=sys.stderr)  # noqa: T201 - output of the command


@contextmanager
def _one_line(command: str, advice: str = "") -> Iterator[None]:
    """Report a user's mistake and an interruption in one line."""
    try:
        yield
    except UnionError as error:
        _say(command, error)
        raise SystemExit(EXIT_USAGE) from None
    except KeyboardInterrupt:
        _say(command, f"interrupted{advice}")
        raise SystemExit(EXIT_INTERRUPTED) from None


@contextmanager
def _internal_errors(command: str) -> Iterator[None]:
    """Exit with a code of its own after a bug: 1 may have a meaning in the command."""
    try:
        yield
    except (UnionError, SystemExit):
        raise
    except Exception:
        traceback.print_exc()
        _say(command, "internal error, please report this traceback")
        raise SystemExit(EXIT_INTERNAL) from None


def run_command(
    name: str,
    task: "Callable[[DictConfig, Path], Path | None]",
    argv: Sequence[str] | None = None,
    *,
    resumes: bool = False,
) -> None:
    """Run a command.

    Args:
        name: Name of the command, such as `train`.
        task: Takes the validated settings and a new run folder (the current folder if the command has none);
            returns the folder of its results, or None for the given one.
        argv: Arguments; those of the process if None.
        resumes: Whether the same command resumes after an interruption.

    Raises:
        SystemExit: With code 2 and the mistakes on standard error, or code 130 after Ctrl-C. A sweep continues after
            a job's mistake and exits with its code.
    """
    command = f"union-{name}"
    advice = "; run the same command again to resume" if resumes else ""
    with _one_line(command, advice):
        arguments = parse_arguments(name, sys.argv[1:] if argv is None else argv)
        if arguments.help is not None:
            print(help_text(name, arguments.help))  # noqa: T201 - output of the command
        elif arguments.version:
            print(__version__)  # noqa: T201 - output of the command
        elif arguments.sweep:
            _sweep(name, task, arguments, advice)
        else:
            values, hydra = resolve(name, arguments)
            config = as_config(values)
            if arguments.show:
                from omegaconf import OmegaConf

                print(OmegaConf.to_yaml(config), end="")  # noqa: T201 - output of the command
                return
            folder = Path.cwd() if hydra is None else _start_run(hydra, arguments)
            with _internal_errors(command):
                task(config, folder)


def _start_run(hydra: Any, arguments: Arguments) -> Path:
    """Return the new run folder, which the task makes, and record how the run was started."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(hydra.hydra.run.dir).absolute()
    hydra.hydra.overrides.task = arguments.plain()
    hydra.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(hydra)
    return folder


def launch_of(config: "DictConfig") -> "Launch":
    """Return how the running command was started; only for commands that Hydra composes."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from union_igrot.experiment import Launch, command_line

    hydra = HydraConfig.get()
    program = f"union-{hydra.job.config_name}"
    command = command_line(program, hydra.overrides.task, plain(config.data))
    return Launch(program, command, OmegaConf.to_yaml(config))


def _sweep(name: str, task: "Callable[[DictConfig, Path], Path | None]", arguments: Arguments, advice: str) -> None:
    """Run the jobs of a sweep by Hydra, whose grammar and launcher apply."""
    if not COMMANDS[name].hydra:
        swept = " and ".join(f"union-{one}" for one in COMMANDS if COMMANDS[one].hydra)
        raise ConfigError(f"-m is not supported: union-{name} runs once (expected {swept})")
    check_sweep(name, arguments)
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from union_igrot.cli.sweep import Sweep

    command = f"union-{name}"
    sweep = Sweep(name, EXIT_USAGE)

    def job(config: "DictConfig") -> None:
        fresh = Path(HydraConfig.get().runtime.output_dir)

        def work() -> Path | None:
            problems = problems_of(name, OmegaConf.to_container(config))  # type: ignore[arg-type] # str keys
            if problems:
                raise ConfigError("; ".join(problems))
            return task(config, fresh)

        with _one_line(command, advice):
            sweep.job(work, fresh)

    # Relative folders refer to the current folder; Hydra must not change it.
    before, here = sys.argv, Path.cwd()
    sys.argv = [command, *arguments.plain(), "-m"]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    finally:
        sys.argv = before
        os.chdir(here)
        sweep.show()
    if sweep.code:
        raise SystemExit(sweep.code)
