"""`union-index`: what it says, what it refuses, and what several processes and kills leave."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

import union_igrot
from union_igrot.cli.index import main
from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest.place import work_place

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
CPU = ("strategy=cpu", "progress=false", "batch_size=8", "workers=0")


def fill(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def run(*arguments, **named):
    """The command in a process of its own."""
    here = {name: x for name, x in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    command = [sys.executable, "-W", "ignore", "-m", "union_igrot.cli.index", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300, **named}
    return subprocess.run(command, check=False, env={**here, "OMP_NUM_THREADS": "1"}, **options)


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
    assert "12 embedded, 0 took a vector that was there;" in said.out
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
        ({"images": "nowhere"}, "names nothing that exists"),
        ({"index": "memory:"}, "ends with the process"),
        ({"index": "photos"}, "is not the name of an index"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"strategy": "fsdp"}, "give ddp"),
        ({"on_broken": "cry"}, "give one of skip, fail"),
        ({"batch_size": "0"}, "at least 1"),
        ({"image": "x"}, "is not a setting"),
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
    assert "index is not given" in capsys.readouterr().err
    for both in ([], ["images=a", "remove=size > 3"]):
        with pytest.raises(SystemExit):
            main(["index=x.lance", *both])
        said = capsys.readouterr().err
        assert said == "union-index: give images=SOURCE, what is put in, or remove=FILTER, what is taken out\n"


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
        (["photos.lance"], "'photos.lance' is no setting; write KEY=VALUE"),
        (["index=x.lance", "--k", "3"], "--k is no flag; settings are written without dashes, KEY=VALUE"),
        (["images=a.tar", "images=b.tar", "index=x.lance"], "images is given twice; give it once"),
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
    with work_place(uri, "model", "elsewhere", None), pytest.raises(SystemExit) as ended:
        main([f"images={tmp_path / 'pictures'}", f"index={uri}", *CPU])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"union-index: another process is putting images into {uri}; wait for its end" in said
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
    assert "union-index: interrupted; the same command goes on from here" in said
    assert "Traceback" not in said
    done = len(ids(uri))
    assert 100 <= done < 3000
    again = run(*settings)
    assert f"3,000 rows; {3000 - done:,} added, 0 updated, {done:,} unchanged" in again.stdout, again.stderr
    assert len(set(ids(uri))) == 3000


@pytest.mark.slow
def test_two_processes_share_pictures_exactly(tmp_path):
    """1,003 images, some of them equal, over two processes: none missing, none doubled, none embedded twice."""
    fill(tmp_path / "pictures", 1000)
    for number in range(3):
        (tmp_path / "pictures" / f"copy {number}.png").write_bytes((tmp_path / "pictures" / "0007.png").read_bytes())
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    two, one = tmp_path / "two.lance", tmp_path / "one.lance"
    shared = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2", "batch_size=16", "workers=1"]
    said = run(f"images={tmp_path / 'pictures'}", f"index={two}", "progress=false", *shared)
    assert said.returncode == 0, said.stderr
    assert "1,003 rows; 1,003 added, 0 updated, 0 unchanged, 0 removed, 1 skipped" in said.stdout
    assert "1,000 embedded, 3 took a vector that was there" in said.stdout
    assert said.stdout.count("1,003 rows") == 1
    assert said.stderr == ""
    main([f"images={tmp_path / 'pictures'}", f"index={one}", *CPU])
    with open_index(str(one)) as first, open_index(str(two)) as second:
        names = ids(one)
        assert sorted(ids(two)) == sorted(names)
        assert len(names) == len(set(names)) == 1003
        np.testing.assert_allclose(second.fetch(names).vectors, first.fetch(names).vectors, atol=1e-5)
    again = run(f"images={tmp_path / 'pictures'}", f"index={two}", "progress=false", *shared)
    assert "0 added, 0 updated, 1,003 unchanged, 0 removed, 1 skipped" in again.stdout, again.stderr


@pytest.mark.slow
def test_a_mistake_of_several_processes_is_one_line(tmp_path):
    shared = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
    said = run(f"images={tmp_path / 'nowhere'}", f"index={tmp_path / 'photos.lance'}", *shared)
    assert said.returncode == 2
    assert said.stderr.count("names nothing that exists") == 1
    assert "Traceback" not in said.stderr
