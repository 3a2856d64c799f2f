"""What all commands share: help, one line per error, exit codes, output in any encoding, signals."""

import io
import multiprocessing
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from runpy import run_path

import pytest

import union_igrot
from union_igrot import __version__
from union_igrot.cli.command import run_command
from union_igrot.cli.settings import COMMANDS
from union_igrot.errors import DataError
from union_igrot.terminal import TerminalConsole, print_line

INSTALLED = Path(sys.executable).with_name("union-train")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(name):
    return import_module(f"union_igrot.cli.{name}").main


def exit_code(name, task, *arguments, **options) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(name, task, arguments, **options)
    return stopped.value.code


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("train", ["data=nope"], "expected"),
        ("eval", ["data=folder"], "data.root is required"),
        ("train", ["data=folder", "data.root=/not/there"], "an existing folder"),
        ("eval", ["sed=1"], "did you mean seed?"),
        ("train", ["seed=-1", "features.batch_size=0"], "features.batch_size: 0"),
        ("train", ["seed=0,1"], "seed: 0,1"),
        ("eval", ["-m", "seed=0,-1"], "seed: -1"),
        ("train", ["--multirun", "data=nope,shapes"], "expected"),
        ("demo", ["-m", "port=0,1"], "union-demo runs once (expected union-train and union-eval)"),
        ("eval", ["chekpoint=\x1b[2J\u202e"], "did you mean checkpoint?"),
        ("train", ["hydra.sweep=" + 1000 * "x"], " ... "),
    ],
)
def test_invalid_arguments_exit_with_2_and_leave_no_files(name, arguments, part, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(name)(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"union-{name}: ")
    assert part in printed.err
    lines = printed.err.rstrip("\n").split("\n")
    assert len(lines) == 1 or all(line.startswith("  ") for line in lines[1:])
    assert all(len(line) <= 520 and line.isprintable() for line in lines)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_module_of_a_command_runs_it(name, folder, capsys, monkeypatch):
    """As torchrun and `python -m` start it."""
    monkeypatch.setattr(sys, "argv", [f"union-{name}", "--version"])
    run_path(str(Path(union_igrot.__file__).parent / "cli" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.slow
def test_a_task_gets_the_settings_and_a_run_folder_below_the_current_one(folder):
    calls = []
    before = list(sys.argv)
    run_command("eval", lambda config, fresh: calls.append((config.seed, fresh, Path.cwd())), ["seed=5"])
    ((seed, fresh, current),) = calls
    assert (seed, current) == (5, folder)
    assert fresh.parent.parent == folder / "outputs" / "eval"
    assert sys.argv == before


@pytest.mark.slow
def test_the_settings_can_be_printed(capsys):
    main("train")(["--cfg", "job", "seed=17"])
    printed = capsys.readouterr().out
    assert "seed: 17" in printed
    assert "hydra:" not in printed


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (DataError("folder x: empty\x1b[31m; add\nimages"), 2, r"folder x: empty\x1b[31m; add images"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (ZeroDivisionError(), 70, "internal error, please report this traceback"),
        (BrokenPipeError(), 141, None),
        (
            OSError(28, "No space left"),
            2,
            "the disk is full ([Errno 28] No space left); free space there; run the same command again to resume",
        ),
    ],
)
def test_errors_have_exit_codes_and_one_line(error, code, printed, capsys, monkeypatch):
    def task(*_):
        raise error

    monkeypatch.setattr("os.dup2", lambda *_: None)  # standard output is the test's own
    assert exit_code("cache", task, resumes=True) == code
    lines = capsys.readouterr().err.splitlines()
    assert (lines[-1:] or [None]) == [printed and f"union-cache: {printed}"]
    assert (len(lines) > 1) == (code == 70)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", None])
def test_output_works_in_any_encoding_and_without_a_stream(encoding, monkeypatch):
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding) if encoding else None)

    def task(*_):
        TerminalConsole().print("图片 é \x1b]0;title")
        print_line("猫 \u202e[bold]")
        raise DataError("图.png: broken")

    assert exit_code("cache", task) == 2
    for stream in (sys.stdout, sys.stderr):
        stream.flush() if encoding else stream.close()
    printed = raw.getvalue()
    assert b"\x1b" not in printed
    assert not encoding or all(part in printed for part in (rb"\x1b]0;title", rb"\u202e[bold]", b"union-cache: "))
    assert encoding != "cp1252" or rb"\u56fe.png: broken" in printed


SLEEPING = """
import sys, time
from union_igrot.cli.command import run_command
def task(*_):
    ready = False
    while True:
        try:
            if not ready: print("ready", flush=True)
            ready = True
            time.sleep(60)
        except BaseException:
            if {obeys}: raise
run_command("cache", task, [], resumes=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("obeys", [True, False])
def test_sigterm_ends_a_command_within_five_seconds(obeys):
    code = SLEEPING.format(obeys=obeys)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 143
    assert printed == "union-cache: terminated; run the same command again to resume\n"


def test_processes_of_a_command_end_at_sigterm_alone():
    def task(*_):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        codes.append(child.exitcode)

    codes = []
    run_command("cache", task, [])
    assert codes == [-signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_installed_command(tmp_path):
    done = subprocess.run([INSTALLED, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "usage: union-train" in done.stdout
    wrong = subprocess.run([INSTALLED, "model=nope"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)
    assert "tiny" in wrong.stderr
