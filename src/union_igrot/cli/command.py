"""What all commands share: help, early checks, one clear line for a mistake.

Knows Hydra and the errors. Does not know what a command does.
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from union_igrot import __version__
from union_igrot.cli.config import check_config, check_sweep, compose, conf_dir
from union_igrot.cli.help import SWEPT, help_text
from union_igrot.cli.sweep import Sweep, in_sweep
from union_igrot.cli.typed import as_typed
from union_igrot.errors import ConfigError, UnionError

EXIT_MISTAKE = 2
"""Exit code for a mistake the user can mend."""
EXIT_DEFECT = 70
"""Exit code after what should not happen, as sysexits.h has it."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


_TAKING = frozenset(("-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "-cn", "-cd"))
"""Flags of Hydra that a word follows."""
_FLAGS = _TAKING | {
    *("-h", "--help", "--hydra-help", "--version", "-m", "--multirun", "-r", "--run", "--resolve"),
    *("--config-path", "--config-name", "--config-dir", "--experimental-rerun", "-sc", "--shell-completion"),
}


@contextmanager
def _one_line(command: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except UnionError as error:
        print(f"{command}: {error}", file=sys.stderr)  # noqa: T201 - the command's voice
        raise SystemExit(EXIT_MISTAKE) from None
    except KeyboardInterrupt:
        print(f"{command}: interrupted{advice}", file=sys.stderr)  # noqa: T201 - its voice
        raise SystemExit(EXIT_INTERRUPTED) from None


@contextmanager
def _told(command: str) -> Iterator[None]:
    """End with a code of its own after what should not happen: 1 may mean something to the command."""
    try:
        yield
    except (UnionError, SystemExit):
        raise
    except Exception:
        traceback.print_exc()
        print(f"{command}: this is a defect; please report it with the lines above", file=sys.stderr)  # noqa: T201 - its voice
        raise SystemExit(EXIT_DEFECT) from None


def _check_words(arguments: Sequence[str], literal: Collection[str]) -> None:
    """Refuse slips that Hydra would answer at length, or not at all.

    Of a setting that is given twice the later one counts, as in Hydra, but for those whose text is taken as
    typed: there it was a shell that took one text apart.
    """
    given: set[str] = set()
    for before, argument in pairwise(["", *arguments]):
        key, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            if argument.partition("=")[0] not in _FLAGS:
                raise ConfigError(f"{argument} is no flag; settings are written without dashes, KEY=VALUE (--help)")
        elif not equals:
            if before not in _TAKING and not argument.startswith("~"):
                raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE (--help lists the keys)")
        elif key in given and key in literal:
            raise ConfigError(f"{key} is given twice; give it once (a shell takes {{a,b}} apart: put it in quotes)")
        given.add(key)


def run_command(
    name: str,
    task: Callable[[DictConfig, Path], Path | None],
    argv: Sequence[str] | None = None,
    *,
    literal: Collection[str] = (),
    several: Collection[str] = (),
    resumes: bool = False,
) -> None:
    """Run a command under Hydra.

    Args:
        name: Name of the configuration, `train` or `eval`.
        task: Takes the checked configuration and Hydra's run folder; gives the folder of its results, or None
            where that is Hydra's.
        argv: Arguments; the process's own where None.
        literal: Settings whose text is taken as it was typed; see `cli.typed`.
        several: Settings of a list of such texts.
        resumes: Whether the same command goes on after an interruption.

    Raises:
        SystemExit: With code 2 and one line on standard error for a user's mistake, with
            code 130 and one line after Ctrl-C. A sweep goes on after a job's mistake and ends with its code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = f"union-{name}"
    if {"-h", "--help"} & set(arguments):
        print(help_text(name))  # noqa: T201 - the command's voice
        return
    if "--version" in arguments:
        print(__version__)  # noqa: T201 - the command's voice
        return
    with _one_line(command):
        _check_words(arguments, literal)
        arguments = as_typed(arguments, literal, several)
        flags = {argument for argument in arguments if argument.startswith("-")}
        plain = [argument for argument in arguments if argument not in flags]
        if not flags:
            compose(name, plain)
        elif name not in SWEPT and flags & {"-m", "--multirun"}:
            raise ConfigError(f"it runs once; -m is for {' and '.join(f'union-{one}' for one in SWEPT)}")
        elif flags <= {"-m", "--multirun"}:
            check_sweep(name, plain)
        folder = str(conf_dir())

    sweep = Sweep(name, EXIT_MISTAKE)

    def guarded(config: DictConfig) -> None:
        fresh = Path(HydraConfig.get().runtime.output_dir)

        def work() -> Path | None:
            check_config(name, config)
            return task(config, fresh)

        with _one_line(command, "; the same command goes on from here" if resumes else ""):
            if in_sweep():
                sweep.job(work, fresh)
            else:
                with _told(command):
                    work()

    before = sys.argv
    sys.argv = [command, *arguments]
    # A relative folder in an override is meant from where the user stands; Hydra must not move.
    here = Path.cwd()
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name=name)(guarded)()
    finally:
        sys.argv = before
        os.chdir(here)
        sweep.show()
    if sweep.code:
        raise SystemExit(sweep.code)
