"""What all commands share: help, validation before heavy imports, safe output, exit codes, SIGTERM."""

import atexit
import errno
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

from union_igrot import __version__
from union_igrot.cli.config import (
    Arguments,
    InvalidArgumentsError,
    as_config,
    conf_dir,
    has_file,
    options_of,
    parse_arguments,
    plain,
    read_option,
    resolve,
    suggestion,
)
from union_igrot.cli.groups import GROUPS
from union_igrot.cli.settings import COMMANDS
from union_igrot.datasets.registry import find_benchmark
from union_igrot.errors import ConfigError, DataError, UnionError, one_line
from union_igrot.settings import Setting, declared, show
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.experiment import Launch

_WIDTH = 80
_COLUMN = 25
_INDENTED: Any = {"initial_indent": "  ", "subsequent_indent": "    "}


def help_text(name: str, topic: str = "") -> str:
    """Return the help of a command; the topic is empty for the short help, a group or section, or `all`.

    Raises:
        ConfigError: If there is no such topic.
    """
    command = COMMANDS[name]
    keys = [one.key for one in declared(command.settings) if "." in one.key]
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    topics = [*command.groups, *sections, "all"]
    if topic and topic not in topics:
        near = suggestion(topic, topics)
        raise ConfigError(f"unknown help topic {topic} ({f'{near} ' * bool(near)}expected {', '.join(topics)})")
    if topic not in ("", "all"):
        return "\n".join(_topic(name, topic))
    lines = _short(name, sections)
    if topic:
        lines += ["", *_settings(one for one in declared(command.settings) if one.options.get("rare"))]
    for one in (*command.groups, *sections) if topic else ():
        lines += ["", *_topic(name, one)]
    return "\n".join(lines)


def _short(name: str, sections: list[str]) -> list[str]:
    command = COMMANDS[name]
    groups = " [GROUP=OPTION ...]" if command.groups else ""
    lines = [
        *wrap(command.summary, _WIDTH),
        "",
        f"usage: union-{name}{groups} [KEY=VALUE ...]{' [-m]' * command.hydra}",
    ]
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    if command.groups:
        lines += ["", "groups (--help GROUP shows the settings of each option):"]
    for group, (default, meaning) in command.groups.items():
        options = [f"{one} (default)" if one == default else one for one in options_of(group)]
        listed = ", ".join(options) if len(options) <= 16 else f"{', '.join(options[:2])}, ... ({len(options)} options)"
        lines += _entry(f"  {group}", f"{meaning}: {listed}", 14)
    own = vars(command.settings).get("__annotations__", {})
    settings = sorted(declared(command.settings), key=lambda one: ("." in one.key, one.key not in own))
    lines += ["", "settings:"] if settings else []
    own_settings = [one for one in settings if "." not in one.key]
    lines += _settings(one for one in own_settings if not one.options.get("rare"))
    more = [one.key for one in own_settings if one.options.get("rare")] + [f"{section}.*" for section in sections]
    lines += wrap(f"further ones, see --help all: {', '.join(more)}", _WIDTH, **_INDENTED) if more else []
    lines += [
        "",
        "options:",
        *_entry("  -h, --help [TOPIC]", "this help, or that of a group or section, or all", _COLUMN),
    ]
    lines += _entry("  --version", "print the version", _COLUMN)
    lines += _entry("  --cfg job", "print the composed settings and exit", _COLUMN)
    if command.hydra:
        lines += _entry("  -m, --multirun", "run once for each combination of comma-separated values", _COLUMN)
    lines += ["", "KEY=VALUE, --KEY VALUE and --KEY=VALUE are the same; values are taken as typed."]
    for note in command.notes:
        lines += wrap(f"{note[0].upper()}{note[1:]}.", _WIDTH)
    return lines


def _topic(name: str, topic: str) -> list[str]:
    """Return the settings of a section, or of each option of a group."""
    if topic not in COMMANDS[name].groups:
        inner = [one for one in declared(COMMANDS[name].settings) if one.key.startswith(f"{topic}.")]
        return [f"{topic}.*", *_settings(inner)]
    default, meaning = COMMANDS[name].groups[topic]
    lines, described = wrap(f"{topic}=OPTION  {meaning}; default {show(default)}", _WIDTH), set()
    for option in options_of(topic):
        lines += _entry(f"  {option}", summary_of(topic, option), 20)
    for option in options_of(topic) if topic in GROUPS else ():
        values = read_option(topic, option)
        schema = {one.key: one for one in GROUPS[topic].settings(values.get(GROUPS[topic].key))}
        shown = tuple((key, show(value)) for key, value in values.items() if key not in ("name", "kind"))
        if not shown or shown in described:
            continue
        described.add(shown)
        lines += ["", f"with {topic}={option}:"]
        for key, value in shown:
            lines += _entry(f"  {topic}.{key}={value}", schema[key].help, _COLUMN + 4)
    return lines


def summary_of(group: str, option: str) -> str:
    """Return one line on an option: the first comment of its file, or what a benchmark declares."""
    if not has_file(group, option):
        return find_benchmark(option).summary if group == "data" else "A registered name."
    text = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")
    return text.removeprefix("# @package _global_\n").partition("\n")[0].removeprefix("# ")


def _settings(settings: Iterable[Setting]) -> list[str]:
    return [line for one in settings for line in _entry(f"  {one.key}={show(one.default)}", one.help, _COLUMN)]


def _entry(left: str, right: str, at: int) -> list[str]:
    """Return a name and its meaning in two columns."""
    lines = wrap(right, _WIDTH - at, break_long_words=False, break_on_hyphens=False) or [""]
    first = [left] if len(left) >= at - 1 else [f"{left:<{at}}{lines.pop(0)}".rstrip()]
    return [*first, *(f"{'':<{at}}{line}" for line in lines if line)]


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


def check_output(name: str, path: str, *suffixes: str) -> Path:
    """Return the path of a file that a command will write, if it has one of the suffixes and its folder exists."""
    file = expand_user(path)
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"invalid value for {name}: {path} (expected a {suffixes[0]} file)")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{name}={path}: the folder {file.absolute().parent} does not exist; make it first")
    return file


def check_new_folder(name: str, path: str) -> Path:
    """Return the path of a folder that a command will fill, if it does not exist or is empty."""
    folder = expand_user(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{name} {folder} is not an empty folder; give a new one")
    return folder


@contextmanager
def writes_output(name: str, path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that names the setting."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {name}={path} ({error.strerror}); use another path") from error


def launch_of(config: "DictConfig") -> "Launch":
    """Return how the running command was started; only for commands that Hydra composes."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from union_igrot.experiment import Launch

    hydra = HydraConfig.get()
    program, root = f"union-{hydra.job.config_name}", os.environ.get("UNION_DATA")
    command = shlex.join([program, *hydra.overrides.task])
    if root and plain(config.data).get("root", "") is None:  # it decided where the data are
        command = f"UNION_DATA={shlex.quote(root)} {command}"
    return Launch(program, command, OmegaConf.to_yaml(config))
