"""`union-index`: what it says, what it refuses, and what Ray actors and kills leave."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import union_igrot
from union_igrot.cli.index import main
from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest.pipeline import lock_index

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='the extra "ray" is not installed')
CPU = ("strategy=cpu", "progress=false", "batch_size=8", "workers=0")


def fill(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def run(*arguments, **named):
    """The command in a process of its own."""
    here = {name: x for name, x in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    start = ["-c"] if named.pop("code", False) else ["-m", "union_igrot.cli.index"]
    command = [sys.executable, "-W", "ignore", *start, *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300, **named}
    return subprocess.run(
        command, check=False, env={**here, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}, **options
    )


def ids(uri):
    with open_index(str(uri)) as index:
        return [name for batch in index.scan(["id"]) for name in batch["id"]]


def test_pictures_are_indexed_updated_and_found(tmp_path, capsys):
    fill(tmp_path / "it's, [mine]", 12)
    (tmp_path / "it's, [mine]" / "notes.txt").write_text("no image")
    uri = tmp_path / "photos, all.lance"
    settings = [f"images={tmp_path / chr(39)}".replace("'", "it's, [mine]"), f"index={uri}", *CPU]
    main(settings)
    said = capsys.readouterr()
    assert f"{uri}: 12 rows; 12 added, 0 updated, 0 unchanged, 0 removed, 1 skipped" in said.out
    assert "12 embedded, 0 reused existing embeddings;" in said.out
    assert "images/s" in said.out
    assert "notes.txt: no known image format" in said.out
    assert said.err == ""
    (tmp_path / "it's, [mine]" / "0000.png").unlink()
    main(settings)
    said = capsys.readouterr().out
    assert f"{uri}: 11 rows; 0 added, 0 updated, 11 unchanged, 1 removed, 1 skipped" in said
    assert "embedded" not in said
    with open_index(str(uri)) as index:
        assert index.metadata["checkpoint"] == "tiny"
        assert index.metadata["fingerprint"] == union_igrot.load("tiny").fingerprint()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": "nowhere"}, "matches nothing"),
        ({"index": "memory:"}, "ends with the process"),
        ({"index": "photos"}, "is not the name of an index"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"strategy": "fsdp"}, "executor=ray"),
        ({"strategy.devices": "2"}, "executor=ray ray.actors=N"),
        ({"on_broken": "cry"}, "expected skip or fail"),
        ({"batch_size": "0"}, ">= 1"),
        ({"image": "x"}, "did you mean images?"),
        ({"on_broken": "fail"}, "notes.txt: no known image format; replace it"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    settings = {"images": "pictures", "index": "photos.lance", **changed}
    own = [one for one in CPU if one.partition("=")[0] not in changed]
    with pytest.raises(SystemExit) as ended:
        main([*own, *(f"{name}={value}" for name, value in settings.items())])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    if changed != {"on_broken": "fail"}:
        assert not (tmp_path / "photos.lance").exists()


def test_what_is_missing_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "index is required" in capsys.readouterr().err
    for both in ([], ["images=a", "remove=size > 3"]):
        with pytest.raises(SystemExit):
            main(["index=x.lance", *both])
        said = capsys.readouterr().err
        assert said.startswith("union-index: give either images=SOURCE")
        assert len(said.splitlines()) == 1


def test_rows_are_taken_out_by_a_filter(tmp_path, capsys):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    fill(tmp_path / "pictures", 4)
    uri = str(tmp_path / "photos.lance")
    main([f"images={tmp_path / 'pictures'}", f"index={uri}", *CPU])
    main([f"index={uri}", f"remove=source = '{tmp_path}/pictures' and size is null"])
    assert f"{uri}: 4 rows; 0 removed" in capsys.readouterr().out
    main([f"index={uri}", f"remove=source = '{tmp_path}/pictures'"])
    assert f"{uri}: 0 rows; 4 removed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([f"index={uri}", "remove=sauce = 'x'"])
    assert "remove=\"sauce = 'x'\": there is no column 'sauce'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos.lance", "index=x"], "unexpected argument 'photos.lance'"),
        (["images=a.tar", "images=b.tar", "index=x.lance"], "images is given twice"),
    ],
)
def test_a_slip_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"union-index: {said}")
    assert len(told.splitlines()) == 1


def test_a_second_process_is_refused_by_one_line(tmp_path, capsys):
    fill(tmp_path / "pictures", 1)
    uri = str(tmp_path / "photos.lance")
    with lock_index(uri), pytest.raises(SystemExit) as ended:
        main([f"images={tmp_path / 'pictures'}", f"index={uri}", *CPU])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"union-index: another process is putting images into {uri}; wait until it ends" in said
    assert len(said.splitlines()) == 1


def test_another_model_is_refused(tmp_path, capsys):
    fill(tmp_path / "pictures", 1)
    uri = str(tmp_path / "photos.lance")
    open_index(uri, dim=union_igrot.load("tiny").backbone.dim, metadata={"fingerprint": "other"}, create=True).close()
    with pytest.raises(SystemExit) as ended:
        main([f"images={tmp_path / 'pictures'}", f"index={uri}", *CPU])
    assert ended.value.code == 2
    assert "was made with" in capsys.readouterr().err


def test_the_help_names_every_setting(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    for setting in ("images=", "index=", "checkpoint=tiny", "on_broken=skip", "prune=true", "precision", "strategy"):
        assert setting in said


@pytest.mark.slow
def test_an_interruption_is_one_line_and_keeps_what_was_done(tmp_path):
    fill(tmp_path / "pictures", 3000)
    uri = tmp_path / "photos.lance"
    settings = [f"images={tmp_path / 'pictures'}", f"index={uri}", "strategy=cpu", "batch_size=8", "workers=1"]
    command = [sys.executable, "-W", "ignore", "-m", "union_igrot.cli.index", *settings]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    found = 0
    while found < 100:
        assert process.poll() is None
        with suppress(ConfigError):  # it is not there yet
            found = len(ids(uri))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "union-index: interrupted; run the same command again to resume" in said
    assert "Traceback" not in said
    done = len(ids(uri))
    assert 100 <= done < 3000
    again = run(*settings)
    assert f"3,000 rows; {3000 - done:,} added, 0 updated, {done:,} unchanged" in again.stdout, again.stderr
    assert len(set(ids(uri))) == 3000


@pytest.mark.slow
def test_no_decoding_worker_outlives_a_killed_command(tmp_path):
    fill(tmp_path / "pictures", 3000)
    uri = tmp_path / "photos.lance"
    command = [sys.executable, "-W", "ignore", "-m", "union_igrot.cli.index"]
    settings = [f"images={tmp_path / 'pictures'}", f"index={uri}", "strategy=cpu", "batch_size=8", "workers=2"]
    process = subprocess.Popen([*command, *settings], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := [int(pid) for pid in tasks.read_text().split()]) < 2:
        assert process.poll() is None
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.1)


@needs_ray
@pytest.mark.slow
def test_two_ray_actors_give_the_rows_of_one_process(tmp_path, capsys):
    """1,003 images, some of them equal, over two actors: no row missing or doubled, and no difference in a vector."""
    fill(tmp_path / "pictures", 1000)
    for number in range(3):
        (tmp_path / "pictures" / f"copy {number}.png").write_bytes((tmp_path / "pictures" / "0007.png").read_bytes())
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    two, one = tmp_path / "two.lance", tmp_path / "one.lance"
    shared = ["executor=ray", "ray.actors=2", "batch_size=16", "workers=1", "progress=false"]
    said = run(f"images={tmp_path / 'pictures'}", f"index={two}", *shared)
    assert said.returncode == 0, said.stderr
    assert "1,003 rows; 1,003 added, 0 updated, 0 unchanged, 0 removed, 1 skipped" in said.stdout
    assert "1,000 embedded, 3 reused existing embeddings" in said.stdout
    assert said.stderr == ""
    main([f"images={tmp_path / 'pictures'}", f"index={one}", "batch_size=16", *CPU[:2], "workers=1"])
    with open_index(str(one)) as first, open_index(str(two)) as second:
        names = ids(one)
        assert ids(two) == names
        assert len(names) == len(set(names)) == 1003
        here, there = first.fetch(names), second.fetch(names)
    assert here.vectors.equal(there.vectors)
    assert here.columns == there.columns
    again = run(f"images={tmp_path / 'pictures'}", f"index={two}", *shared)
    assert "0 added, 0 updated, 1,003 unchanged, 0 removed, 1 skipped" in again.stdout, again.stderr


KILLED_ACTOR = """
import os, sys
import ray, union_igrot
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.writer import RowWriter

add, calls, killed = RowWriter.add, [], []

def add_and_kill(*arguments):
    add(*arguments)
    calls.append(arguments)
    if len(calls) == 3:
        pid = next(actor["Pid"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE")
        os.kill(pid, 9)
        killed.append(pid)

RowWriter.add = add_and_kill
gallery = union_igrot.Gallery.open(sys.argv[2], "tiny", device="cpu")
options = IngestOptions(batch_size=8, workers=1, actors=2, progress=False)
print(gallery.update(sys.argv[1], options, executor="ray").added, len(gallery), len(killed))
"""


@needs_ray
@pytest.mark.slow
def test_a_killed_ray_actor_loses_nothing(tmp_path):
    fill(tmp_path / "pictures", 1003)
    uri = str(tmp_path / "photos.lance")
    said = run(KILLED_ACTOR, str(tmp_path / "pictures"), uri, code=True)
    assert said.returncode == 0, said.stderr
    assert "1003 1003 1" in said.stdout.splitlines()  # beside what Ray says of the death
    assert len(set(ids(uri))) == 1003


UNREACHABLE_CLUSTER = """
import ray
from union_igrot.cli.index import main

def refuse(*_, **__):
    raise ConnectionError("Could not find any running Ray instance.\\nmore")

ray.init = refuse
main()
"""


@needs_ray
@pytest.mark.slow
def test_a_ray_cluster_that_cannot_be_reached_is_one_line(tmp_path):
    fill(tmp_path / "pictures", 1)
    settings = [f"images={tmp_path / 'pictures'}", f"index={tmp_path / 'a.lance'}", "executor=ray", "ray.address=auto"]
    said = run(UNREACHABLE_CLUSTER, *settings, code=True)
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1, said.stderr
    assert "Ray cluster auto (Could not find any running Ray instance.)" in said.stderr
