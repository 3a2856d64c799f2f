"""`union-compare` on two runs of the command."""

import pytest

from union_igrot.cli.compare import main as compare
from union_igrot.cli.eval import main as evaluate


@pytest.mark.slow
def test_a_run_against_another(small_run, tmp_path, capsys):
    again = tmp_path / "again"
    evaluate(
        [
            *[s for s in small_run.settings if s.startswith(("data.queries", "data.val", "cache", "progress"))],
            f"output_dir={again}",
        ]
    )
    compare([f"first={small_run.folder}", f"second={again}", "rounds=200"])
    shown = capsys.readouterr().out
    assert "shapes_cir-test · trained" in shown
    assert "mAP@10" in shown
    compare([f"first={small_run.folder}", f"second={small_run.folder}", "method=image", "rounds=50"])
    assert "1.0000" in capsys.readouterr().out


@pytest.mark.slow
def test_other_queries_are_refused(small_run, tmp_path, capsys):
    other = tmp_path / "other"
    evaluate(["data.queries=30", "data.seed=3", "progress=false", f"output_dir={other}"])
    with pytest.raises(SystemExit) as stop:
        compare([f"first={small_run.folder}", f"second={other}"])
    assert stop.value.code == 2
    assert "the queries of the two runs differ" in capsys.readouterr().err


def test_folders_without_a_benchmark_in_common(small_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        compare([f"first={small_run.folder}", f"second={tmp_path / 'empty'}"])
    assert "no benchmark in common" in capsys.readouterr().err
