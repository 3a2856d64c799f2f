"""What all commands share: help, validation before heavy imports, safe output, exit codes, SIGTERM."""

import atexit
import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from union_igrot import __version__
from union_igrot.cli.config import Arguments, InvalidArgumentsError, as_config, parse_arguments, plain, resolve
from union_igrot.cli.help import help_text
from union_igrot.errors import UnionError, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.experiment import Launch

Task = Callable[["DictConfig", Path], Path | None]
"""Takes the validated settings and a new run folder (the current folder if the command has none); returns the folder
of its results, or None for the given one."""
EXIT_USAGE = 2
"""Exit code for a user's mistake."""
EXIT_INTERNAL = 70
"""Exit code after an internal error, as in sysexits.h."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
EXIT_BROKEN_PIPE = 141
"""Exit code if the reader closed the output (`| head`), as in shells."""
EXIT_TERMINATED = 143
"""Exit code after SIGTERM, as in shells."""
_GRACE_SECONDS = 3.0
_reported = threading.Event()
"""Set when this process writes that it was terminated or interrupted."""


class Terminated(BaseException):
    """SIGTERM has arrived."""


def run_command(name: str, task: Task, argv: Sequence[str] | None = None, *, resumes: bool = False) -> None:
    """Run a task with the settings of a command; `resumes` says that the same command resumes it if interrupted.

    Raises:
        SystemExit: With a code other than 0 and one line on standard error, or several for several invalid arguments. A
            sweep continues after a failed job and exits with its code.
    """
    command = f"union-{name}"
    advice = "; run the same command again to resume" if resumes else ""
    _open_streams()
    with _terminable(f"{command}: terminated{advice}"), exit_codes(command, advice):
        arguments = parse_arguments(name, sys.argv[1:] if argv is None else argv)
        if arguments.help is not None:
            print(help_text(name, arguments.help))  # noqa: T201 - output of the command
        elif arguments.version:
            print(__version__)  # noqa: T201 - output of the command
        elif arguments.sweep:
            from union_igrot.cli.sweep import run_sweep

            run_sweep(name, task, arguments, lambda: exit_codes(command, advice))
        else:
            values, hydra = resolve(name, arguments)
            config = as_config(values)
            if arguments.show:
                from omegaconf import OmegaConf

                print(OmegaConf.to_yaml(config), end="")  # noqa: T201 - output of the command
            else:
                task(config, Path.cwd() if hydra is None else _start_run(hydra, arguments))
        sys.stdout.flush()


@contextmanager
def exit_codes(command: str, advice: str = "") -> Iterator[None]:
    """Turn an exception into a line on standard error and an exit code; `advice` follows an interruption."""

    def stop(code: int, error: BaseException, *lines: object) -> NoReturn:
        print(f"{command}: {lines[0]}", *lines[1:], sep="\n  ", file=sys.stderr)  # noqa: T201 - output of the command
        raise SystemExit(code) from error

    try:
        yield
    except InvalidArgumentsError as error:
        stop(EXIT_USAGE, error, f"{len(error.problems)} invalid arguments:", *map(one_line, error.problems))
    except UnionError as error:
        stop(EXIT_USAGE, error, one_line(str(error)))
    except (KeyboardInterrupt, Terminated) as error:
        code, what = (
            (EXIT_TERMINATED, "terminated") if isinstance(error, Terminated) else (EXIT_INTERRUPTED, "interrupted")
        )
        if _reports_for_others():
            _reported.set()
            stop(code, error, f"{what}{advice}")
        raise SystemExit(code) from error
    except Exception as error:
        if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) == errno.ENOSPC:
            with suppress(OSError):  # or the interpreter's own flush fails
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(EXIT_BROKEN_PIPE) from error
            stop(EXIT_USAGE, error, f"the disk is full ({error}); free space there{advice}")
        traceback.print_exc()
        stop(EXIT_INTERNAL, error, "internal error, please report this traceback")


def _reports_for_others() -> bool:
    """Return whether this process is the one of its run that reports a signal: the launcher, otherwise rank 0."""
    launched = os.environ.get("UNION_LAUNCHER") == str(os.getppid())
    return not launched and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _open_streams() -> None:
    """Make output work if a stream is closed or its encoding lacks a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as the process
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _terminable(message: str) -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, and end the process soon with a message, even in a long call of a library."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        terminated.set()
        raise Terminated

    def watch() -> None:
        with receiver:
            while number := receiver.recv(1):
                if number[0] == signal.SIGTERM:
                    time.sleep(_GRACE_SECONDS)
                    if _reports_for_others() and not _reported.is_set():
                        print(message, file=sys.stderr, flush=True)  # noqa: T201 - output of the command
                    os._exit(EXIT_TERMINATED)

    (receiver, sender), terminated = socket.socketpair(), threading.Event()
    sender.setblocking(False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, terminate)
    _let_forks_end()
    try:
        yield
    finally:
        if terminated.is_set():  # without the interpreter's cleanup, which takes seconds after torch was imported
            with suppress(OSError):
                sys.stdout.flush()
            atexit._run_exitfuncs()
            os._exit(EXIT_TERMINATED)
        _restore_sigterm()
        with sender:
            sender.shutdown(socket.SHUT_WR)  # ends the watcher, although decoding workers still hold it open
        watcher.join()


def _restore_sigterm() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@cache
def _let_forks_end() -> None:
    """Let SIGTERM end a forked process at once, without a trace in this one."""

    def mask(how: int) -> None:
        signal.pthread_sigmask(how, {signal.SIGTERM})

    def start() -> None:
        _restore_sigterm()
        mask(signal.SIG_UNBLOCK)

    if hasattr(os, "register_at_fork"):
        unblock = partial(mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=partial(mask, signal.SIG_BLOCK), after_in_parent=unblock, after_in_child=start)


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
