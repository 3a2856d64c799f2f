import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from union_igrot.errors import UnionError
from union_igrot.training.run_folder import RunFolder, open_run, settings_hash

HOLD_WITH_A_CHILD = (
    "import os, sys, time; from pathlib import Path; from union_igrot.training.run_folder import RunFolder\n"
    "run = RunFolder(Path(sys.argv[1]), 'a')\n"
    "child = os.fork()\n"
    "if child == 0: time.sleep(30); os._exit(0)\n"
    "print(child, flush=True); sys.stdin.read()"
)


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    run = RunFolder(tmp_path / "a" / "b", "one")
    assert (run.stage, run.resumed) == ("started", False)
    assert json.loads((run.path / "run.json").read_text()) == {"identity": "one", "stage": "started"}
    run.close()


@pytest.mark.parametrize("stage", ["started", "trained"])
def test_an_unfinished_run_is_gone_on_with_where_it_stopped(tmp_path, stage):
    first = RunFolder(tmp_path, "one")
    first.set_stage(stage)
    (tmp_path / "checkpoints").mkdir()
    first.close()
    again = RunFolder(tmp_path, "one")
    assert (again.stage, again.resumed) == (stage, True)
    assert (tmp_path / "checkpoints").is_dir()
    again.close()


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    RunFolder(tmp_path, "one").close()
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / f"results.csv.{'0f' * 16}.tmp", tmp_path / "checkpoints" / f"last.ckpt.{'a1' * 16}.tmp"]
    for path in (*left, tmp_path / "of a user.tmp"):
        path.touch()
    with RunFolder(tmp_path, "one"):
        assert not any(path.exists() for path in left)
        assert (tmp_path / "of a user.tmp").exists()


def test_a_finished_run_starts_anew_and_keeps_its_model_until_the_next_is_there(tmp_path):
    first = RunFolder(tmp_path, "one")
    for name in ("checkpoints", "logs", "model"):
        (tmp_path / name).mkdir()
    first.set_stage("done")
    first.close()
    again = RunFolder(tmp_path, "one")
    assert (again.stage, again.resumed) == ("started", False)
    assert [(tmp_path / name).exists() for name in ("checkpoints", "logs", "model")] == [False, False, True]
    again.close()


@pytest.mark.parametrize("stage", ["started", "trained", "done"])
def test_a_run_of_other_settings_is_refused_and_left_alone(tmp_path, stage):
    first = RunFolder(tmp_path, "one")
    (tmp_path / "checkpoints").mkdir()
    first.set_stage(stage)
    first.close()
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(UnionError, match="other settings"):
        RunFolder(tmp_path, "two")
    assert (tmp_path / "run.json").read_text() == before
    assert (tmp_path / "checkpoints").is_dir()
    RunFolder(tmp_path, "one").close()  # the refusal kept no lock


@pytest.mark.slow
def test_a_worker_that_outlives_a_killed_run_does_not_hold_the_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_WITH_A_CHILD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        orphan = int(other.stdout.readline())
        try:
            with pytest.raises(UnionError, match="works in"):  # its own child does not let others in either
                RunFolder(tmp_path, "a")
            other.kill()
            other.wait()
            again = RunFolder(tmp_path, "a")
        finally:
            os.kill(orphan, signal.SIGKILL)
    assert again.resumed
    again.close()


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnionError, match=r"cannot write output_dir .*choose another"):
        RunFolder(tmp_path / "file" / "run", "one")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": "one"}', "null"])
def test_a_damaged_state_counts_as_none(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    run = RunFolder(tmp_path, "one")
    assert (run.stage, run.resumed) == ("started", False)
    run.close()


def test_without_a_chosen_folder_the_newest_unfinished_run_of_these_settings_is_found(tmp_path):
    for day, identity, stage in [
        ("01", "one", "started"),
        ("02", "one", "trained"),
        ("03", "one", "done"),
        ("04", "two", "started"),
    ]:
        run = RunFolder(tmp_path / f"2026-01-{day}" / "10-00-00", identity)
        run.set_stage(stage)
        run.close()
    fresh = tmp_path / "2026-01-05" / "11-00-00"
    found = open_run(None, fresh, "one")
    assert found.path == tmp_path / "2026-01-02" / "10-00-00"
    assert found.stage == "trained"
    # While that one is at work, the next older is taken; with all taken, the fresh one.
    second = open_run(None, fresh, "one")
    third = open_run(None, fresh, "one")
    assert second.path == tmp_path / "2026-01-01" / "10-00-00"
    assert (third.path, third.resumed) == (fresh, False)
    for run in (found, second, third):
        run.close()


def test_a_chosen_folder_is_taken_whatever_stands_unfinished_elsewhere(tmp_path):
    RunFolder(tmp_path / "2026-01-01" / "10-00-00", "one").close()
    run = open_run(tmp_path / "mine", tmp_path / "2026-01-02" / "10-00-00", "one")
    assert run.path == tmp_path / "mine"
    assert not run.resumed
    run.close()


_SETTINGS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none())
)


@pytest.mark.slow
@given(_SETTINGS, _SETTINGS)
def test_identity_is_that_of_the_settings_in_any_order(one, two):
    assert settings_hash(one) == settings_hash(dict(reversed(one.items())))
    assert (settings_hash(one) == settings_hash(two)) == (
        json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    )
