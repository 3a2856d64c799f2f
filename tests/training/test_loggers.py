import csv
import importlib.util
import json
import struct
import time

import pytest
import torch

from small_runs import Run, figures, rows_of
from union_igrot.cli.config import compose
from union_igrot.cli.train import main as train
from union_igrot.errors import ConfigError
from union_igrot.training.loggers import open_loggers

SETTINGS = {"seed": 7, "recipe": {"epochs": 2, "rate": 1e-3}}


def log(loggers, steps):
    for logger in loggers:
        for step in steps:
            logger.log_metrics({"train/loss": 10.0 - step}, step=step)
        logger.save()
        logger.finalize("success")


def table_of(folder):
    lines = []
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        with path.open(newline="") as rows:
            lines += [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(rows)]
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else found(wanted))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train([f"logger={name}", f"output_dir={tmp_path / 'run'}"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"union-train: logger={name} needs a package")
    assert f'pip install "union-igrot[{name}]"' in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_weights_and_biases_has_a_mode_and_only_two():
    assert compose("train", ["logger=wandb"]).logger == {"name": "wandb", "mode": "offline", "project": "union-igrot"}
    with pytest.raises(ConfigError, match=r"logger\.mode: shared \(expected offline or online"):
        compose("train", ["logger=wandb", "logger.mode=shared"])
    with pytest.raises(ConfigError, match=r"unknown setting logger\.mode"):
        compose("train", ["logger=tensorboard", "+logger.mode=offline"])


def test_tables_are_kept_of_each_start_and_none_means_none(tmp_path):
    for steps in (range(3), range(3, 5)):
        with open_loggers("csv", tmp_path, SETTINGS) as loggers:
            log(loggers, steps)
    assert table_of(tmp_path) == [(step, 10.0 - step) for step in range(5)]
    with open_loggers("none", tmp_path / "quiet", SETTINGS) as loggers:
        assert loggers == []
    assert not (tmp_path / "quiet").exists()


def test_tensorboard_goes_on_where_the_checkpoint_was(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_loggers("tensorboard", tmp_path, SETTINGS) as loggers:
        log(loggers, range(6))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 4}, tmp_path / "checkpoints" / "last.ckpt")
    with open_loggers("tensorboard", tmp_path, SETTINGS) as loggers:
        log(loggers, range(4, 9))
    events = reader.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(n, 10.0 - n) for n in range(9)]
    noted = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    seed: 7\n" in noted
    assert "      rate: 0.001\n" in noted
    assert table_of(tmp_path)[-1] == (8, 2.0)


def test_of_several_processes_one_writes(tmp_path):
    for name in ("tensorboard", "wandb"):
        with open_loggers(name, tmp_path, SETTINGS, main=False) as loggers:
            assert [type(one).__name__ for one in loggers] == ["CSVLogger"]
    assert not list(tmp_path.iterdir())


def records(path):
    """What Weights & Biases keeps offline: after a head of 7 bytes the log of LevelDB, pieces in blocks of 32 KiB."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    raw, at, piece, found = path.read_bytes(), 7, b"", []
    while at < len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        piece += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(proto.Record.FromString(piece))
            piece = b""
    return found


def history(path):
    """The logged values of a kept run, by step."""
    found = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in items:
                found[items["trainer/global_step"]] = items["train/loss"]
    return found


def ended(path):
    """What is kept of a run, once the service, a process of its own, has written that it ended."""
    for _ in range(100):
        try:
            read = records(path)
        except struct.error:  # half of one is written
            read = []
        if any(record.WhichOneof("record_type") == "exit" for record in read):
            return read
        time.sleep(0.1)
    raise AssertionError(f"{path} does not say that its run ended: {read}")


def only(records, kind):
    (one,) = [record for record in records if record.WhichOneof("record_type") == kind]
    return getattr(one, kind)


@pytest.mark.slow
def test_weights_and_biases_keeps_one_run_offline_however_often_it_is_resumed(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    for steps in (range(3), range(3, 5)):
        with open_loggers("wandb", tmp_path / "run", SETTINGS, project="noise") as loggers:
            log(loggers, steps)
    err = capfd.readouterr().err
    assert err.count("to upload it: wandb sync ") == 2
    with pytest.raises(KeyboardInterrupt), open_loggers("wandb", tmp_path / "run", SETTINGS, project="noise"):
        raise KeyboardInterrupt
    kept = sorted((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 3
    read = [ended(path) for path in kept]
    number = (tmp_path / "run" / "logs" / "wandb-id").read_text()
    assert {(only(one, "run").run_id, only(one, "run").project) for one in read} == {(number, "noise")}
    noted = {item.key: item.value_json for item in only(read[0], "run").config.update}
    assert json.loads(noted["seed"]) == 7
    assert json.loads(noted["recipe"]) == SETTINGS["recipe"]
    assert {step: value for path in kept for step, value in history(path).items()} == {n: 10.0 - n for n in range(5)}
    assert sorted(only(one, "exit").exit_code for one in read) == [0, 0, 1]
    assert table_of(tmp_path / "run") == [(step, 10.0 - step) for step in range(5)]


@pytest.mark.slow
def test_weights_and_biases_without_an_account_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = r"logger\.mode=online: .*run wandb login, or set logger\.mode=offline$"
    with pytest.raises(ConfigError, match=said), open_loggers("wandb", tmp_path / "run", SETTINGS, mode="online"):
        raise AssertionError("opened")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "none"])
def test_the_logger_changes_nothing_of_a_training(small_run: Run, tmp_path, monkeypatch, name):
    if name != "none":
        pytest.importorskip(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train([*small_run.settings_for(tmp_path / "run"), f"logger={name}"])
    assert figures(rows_of(tmp_path / "run")) == figures(small_run.rows)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    if name == "none":
        assert not (tmp_path / "run" / "logs").exists()
        assert "Training curves" not in page
    else:
        assert (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").is_file()
        assert list((tmp_path / "run" / "logs" / name).iterdir())
        assert "Training curves" in page
