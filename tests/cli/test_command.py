import subprocess
import sys
from pathlib import Path

import pytest

from union_igrot import __version__
from union_igrot.cli.command import run_command
from union_igrot.cli.eval import main as evaluate
from union_igrot.cli.train import main as train
from union_igrot.errors import DataError

COMMANDS = {"train": train, "eval": evaluate}
INSTALLED = Path(sys.executable).with_name("union-train")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["data=nope"], "expected"),
        (["data=folder"], "data.root is required"),
        (["data=folder", "data.root=/not/there"], "an existing folder"),
        (["sed=1"], "did you mean seed?"),
        (["seed=-1", "features.batch_size=0"], "features.batch_size: 0"),
        (["seed=0,1"], "seed: 0,1"),
        (["-m", "seed=0,-1"], "seed: -1"),
        (["--multirun", "data=nope,shapes"], "expected"),
    ],
)
def test_a_mistake_is_told_in_few_words_with_code_2_and_nothing_is_left_behind(
    name, arguments, part, elsewhere, capsys
):
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[name](arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"union-{name}: ")
    assert part in said.err
    assert "Traceback" not in said.err
    problems = said.err.strip().splitlines()
    assert len(problems) == 1 or all(line.startswith("  ") for line in problems[1:])
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_and_version_need_no_run(name, flag, elsewhere, capsys):
    COMMANDS[name]([flag, "seed=-1"])
    assert f"usage: union-{name}" in capsys.readouterr().out
    COMMANDS[name](["--version"])
    assert capsys.readouterr().out.strip() == __version__
    assert list(elsewhere.iterdir()) == []


def test_the_task_gets_the_checked_configuration_and_a_folder_below_where_the_user_stands(elsewhere):
    seen = []
    before = list(sys.argv)
    run_command("eval", lambda config, fresh: seen.append((config.seed, fresh, Path.cwd())), ["seed=5"])
    ((seed, fresh, place),) = seen
    assert (seed, place) == (5, elsewhere)
    assert fresh.parent.parent == elsewhere / "outputs" / "eval"
    assert sys.argv == before


def test_each_job_of_a_sweep_is_run(elsewhere):
    seen = []
    run_command("eval", lambda config, fresh: seen.append((config.seed, fresh.name)), ["-m", "seed=range(3)"])
    assert seen == [(0, "0"), (1, "1"), (2, "2")]


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_mistake_found_late_is_one_line_too(elsewhere, capsys, sweep):
    def task(*_: object) -> None:
        raise DataError("folder x: nothing there; add images")

    with pytest.raises(SystemExit) as stopped:
        run_command("eval", task, [*sweep, "seed=1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "union-eval: folder x: nothing there; add images\n"


def test_a_bug_is_not_dressed_up_as_a_mistake(elsewhere, capsys):
    def task(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as stopped:
        run_command("eval", task, ["seed=1"])
    assert stopped.value.code == 70
    said = capsys.readouterr().err
    assert "raise ZeroDivisionError" in said
    assert said.endswith("union-eval: internal error, please report this traceback\n")


@pytest.mark.parametrize("resumes", [True, False])
def test_only_what_can_be_gone_on_with_says_so(elsewhere, capsys, resumes):
    def task(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command("eval", task, [], resumes=resumes)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"union-eval: interrupted{'; run the same command again to resume' * resumes}\n"


def test_a_command_that_runs_once_is_not_swept(elsewhere, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command("demo", lambda *_: None, ["-m", "port=0,1"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "union-demo: -m is not supported: union-demo runs once (expected union-train and union-eval)\n"
    )
    run_command("check", lambda *_: None, ["--help"])
    said = capsys.readouterr().out
    assert "[-m]" not in said
    assert "circo" in said  # of a group without a default, the options


def test_the_configuration_can_be_printed(elsewhere, capsys):
    train(["--cfg", "job", "seed=17"])
    out = capsys.readouterr().out
    assert "seed: 17" in out
    assert "hydra:" not in out


def test_the_installed_command_answers(tmp_path):
    done = subprocess.run([INSTALLED, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "usage: union-train" in done.stdout
    wrong = subprocess.run([INSTALLED, "model=nope"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "tiny" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
