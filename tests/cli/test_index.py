"""`union-index`: what it says, what it refuses, and what Ray actors and kills leave."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

import union_igrot
from union_igrot.cli.index import main
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest import rows

pytestmark = pytest.mark.slow

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
CPU = ("checkpoint=tiny", "strategy=cpu", "progress=false", "batch_size=8", "workers=0")


def fill(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


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


def test_a_run_that_could_use_no_image_fails(tmp_path, capsys):
    """And says why each file is of no use, whatever form the source has; the next run finds what is mended."""
    folder, uri = tmp_path / "pictures", tmp_path / "photos.lance"
    folder.mkdir()

    def fails(source=folder):
        with pytest.raises(SystemExit) as ended:
            main([f"images={source}", f"index={uri}", *CPU])
        said = capsys.readouterr()
        assert ended.value.code == 2
        (line,) = said.err.splitlines()
        return said.out, line

    assert fails()[1].endswith("it holds no images")
    assert not uri.exists()
    (folder / "a.nef").write_bytes(bytes(4000))
    (folder / "b.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("pictures/b.png\npictures/gone.png\n")
    for source in (folder, tmp_path / "list.txt"):
        shown, line = fails(source)
        assert "0 rows; 0 added" in shown
        assert "b.png: no known image format" in shown
        assert "none of its 2 files could be used" in line
    fill(folder, 1)
    main([f"images={folder}", f"index={uri}", *CPU])
    assert "1 rows; 1 added" in capsys.readouterr().out
    (folder / "0000.png").write_bytes(b"broken since")
    assert "1 removed, 3 skipped" in fails()[0]


def test_what_is_missing_is_asked_for(refused):
    assert "index is required" in refused(main)
    for both in ([], ["images=a", "remove=size > 3"]):
        assert refused(main, "index=x.lance", *both).startswith("union-index: give either images=SOURCE")


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


def test_an_interruption_is_one_line_and_keeps_what_was_done(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "pictures", 120)
    uri = tmp_path / "photos.lance"
    settings = [f"images={tmp_path / 'pictures'}", f"index={uri}", *CPU]
    calls, add = [], rows.RowWriter.add

    def interrupt(*arguments):
        add(*arguments)
        calls.append(arguments)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(rows, "BATCH_ROWS", 32)
            patch.setattr(rows.RowWriter, "add", interrupt)
            with pytest.raises(SystemExit) as ended:
                main(settings)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert said == "union-index: interrupted; run the same command again to resume\n"
    done = len(ids(uri))
    assert 64 <= done < 120
    main(settings)
    assert f"120 rows; {120 - done} added, 0 updated, {done} unchanged" in capsys.readouterr().out
    assert len(set(ids(uri))) == 120


def test_two_ray_actors_of_which_one_is_killed_give_the_rows_of_one_process(tmp_path, capsys, monkeypatch):
    """1,003 images, some of them equal, over two actors: no row missing or doubled, and no difference in a vector."""
    ray = pytest.importorskip("ray", reason='the extra "ray" is not installed')
    fill(tmp_path / "pictures", 1000)
    for number in range(3):
        (tmp_path / "pictures" / f"copy {number}.png").write_bytes((tmp_path / "pictures" / "0007.png").read_bytes())
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    two, one = tmp_path / "two.lance", tmp_path / "one.lance"
    shared = ["checkpoint=tiny", f"images={tmp_path / 'pictures'}", "batch_size=16", "workers=1", "progress=false"]
    killed, calls, add = [], [], rows.RowWriter.add

    def add_and_kill(*arguments):
        add(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            alive = (actor["Pid"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE")
            killed.append(next(alive))
            os.kill(killed[0], signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(rows.RowWriter, "add", add_and_kill)
        patch.setenv("RAY_worker_niceness", "0")
        main([*shared, f"index={two}", "executor=ray", "ray.actors=2"])
    said = capsys.readouterr().out
    assert len(killed) == 1
    assert "1,003 rows; 1,003 added, 0 updated, 0 unchanged, 0 removed, 1 skipped" in said
    assert "1,000 embedded, 3 reused existing embeddings" in said
    main([*shared, f"index={one}", "strategy=cpu"])
    with open_index(str(one)) as first, open_index(str(two)) as second:
        names = ids(one)
        assert ids(two) == names
        assert len(names) == len(set(names)) == 1003
        here, there = first.fetch(names), second.fetch(names)
    assert here.vectors.equal(there.vectors)
    assert here.columns == there.columns
    capsys.readouterr()
    main([*shared, f"index={two}", "strategy=cpu"])
    assert "0 added, 0 updated, 1,003 unchanged, 0 removed, 1 skipped" in capsys.readouterr().out


def test_a_ray_cluster_that_cannot_be_reached_is_one_line(tmp_path, refused, monkeypatch):
    ray = pytest.importorskip("ray", reason='the extra "ray" is not installed')

    def refuse(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", refuse)
    fill(tmp_path / "pictures", 1)
    ray = ("checkpoint=tiny", "executor=ray", "ray.address=auto")
    line = refused(main, f"images={tmp_path / 'pictures'}", f"index={tmp_path / 'a.lance'}", *ray)
    assert "Ray cluster auto (Could not find any running Ray instance.)" in line


def test_the_model_of_shapes_warns_on_photographs(tmp_path, capsys):
    """And an index keeps its model if none is given."""
    fill(tmp_path / "pictures", 1)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures" / "a.JPG")
    settings = [f"images={tmp_path / 'pictures'}", f"index={tmp_path / 'a.lance'}", *CPU]
    main(settings)
    assert capsys.readouterr().err.startswith("the backbone tiny only knows generated shapes")
    main(settings[:2] + [one for one in settings[2:] if one != "checkpoint=tiny"])
    assert "0 added, 0 updated, 2 unchanged" in capsys.readouterr().out
    with open_index(str(tmp_path / "a.lance")) as index:
        assert index.metadata["checkpoint"] == "tiny"
