"""What commit bfeb166 wrote still opens; `make_fixtures.py` wrote `data/` with that commit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from union_igrot import load
from union_igrot.cli.eval import main as union_eval
from union_igrot.cli.train import main as union_train
from union_igrot.features.store import FeatureStore
from union_igrot.gallery.gallery import Gallery
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import usage

DATA = Path(__file__).with_name("data")
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(DATA, tmp_path / "data"))


def test_saved_model():
    model = IGROTModel.load(DATA / "model")
    expected = EXPECTED["model"]
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.inference_mode():
        queries, gallery = model.embed_queries(pixels, ["make it red", None]), model.embed_gallery(pixels)
    torch.testing.assert_close(queries, torch.tensor(expected["queries"]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gallery, torch.tensor(expected["gallery"]), atol=1e-6, rtol=1e-5)
    own = model.backbone.fingerprint()
    assert model.fingerprint().replace(own, model.backbone.earlier_fingerprint(own)) == expected["fingerprint"]
    assert model.training_images == {"0123456789abcdef", "fedcba9876543210"}
    assert model.tuned


def test_a_model_saved_again_keeps_its_files(data):
    IGROTModel.load(DATA / "model").save(data / "model", half=True)
    new, old = (json.loads((root / "model" / "model.json").read_text()) for root in (data, DATA))
    assert new.pop("backbone_fingerprint").startswith(old.pop("backbone_fingerprint") + "-")
    assert new.pop("preprocess") == "model"  # which earlier versions did not record
    assert new == old
    for name in ("heads.safetensors", "backbone.safetensors"):
        with safe_open(DATA / "model" / name, "pt") as old, safe_open(data / "model" / name, "pt") as new:
            assert set(old.keys()) == set(new.keys())
            assert all(torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in old.keys())  # noqa: SIM118


@pytest.mark.slow
def test_lance_index(data, monkeypatch, tmp_path):
    monkeypatch.setenv("UNION_CACHE", str(tmp_path / "cache"))
    expected = EXPECTED["index"]
    model = load("tiny-union")  # the heads of that commit
    with Gallery.open(str(data / "photos.lance"), model) as gallery:
        assert sorted(gallery.ids()) == expected["ids"]
        for where, name in ((None, "found"), ("label = 'odd' and year > 2000", "odd")):
            result = gallery.search(text="a red circle", where=where, k=5)
            ids, scores = expected[name]
            assert list(result.ids) == ids
            assert list(result.scores) == pytest.approx(scores, abs=1e-6)
        report = gallery.update(data / "photos")  # the same images in another folder
        assert (report.added, report.embedded, len(gallery)) == (5, 0, 10)
        assert gallery.delete(expected["ids"]) == 5


def test_feature_store(data):
    expected = EXPECTED["features"]
    with FeatureStore(data / "cache", "print-1", "float16") as store:
        assert store.missing(["a", "b", "c", "d", "e"]) == [4]
        assert store.missing(["b", "c"], tokens=True) == [0]
        assert store.get(["a", "b", "c", "d"]).pooled.tolist() == expected["pooled"]
        read = store.get(["d", "c"], tokens=True)
        for name in ("tokens", "mask", "pooled_at"):
            assert getattr(read, name).tolist() == expected[name]
        assert not list(store.folder.glob("*.broken"))
    (entry,) = usage(data / "cache")
    assert (entry.fingerprint, entry.backbone, entry.dtype, entry.entries) == ("print-1", "tiny", "float16", 4)


def run(main, settings: list[str]) -> int:
    try:
        main(settings)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def metrics(folder: Path) -> list[object]:
    rows = json.loads((folder / "results.json").read_text())
    written = (row for row in rows if row["method"] != "product")  # a baseline that came later
    return [(row["benchmark"], row["method"], row["metrics"], row["ci95"]) for row in written]


@pytest.fixture
def settings(tmp_path) -> list[str]:
    return [*EXPECTED["train"], "loss=infonce_small", f"cache_dir={tmp_path / 'cache'}"]


@pytest.mark.slow
def test_a_trained_run_is_evaluated_without_training(data, settings, monkeypatch):
    """The settings hash to the identity that was written, and the results are equal to the last digit."""
    folder = data / "run"
    notes = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**notes, "stage": "trained"}))
    (folder / "results.json").unlink()
    monkeypatch.setattr("union_igrot.experiment.train_heads", None)
    assert run(union_train, [*settings, f"output_dir={folder}"]) == 0
    assert metrics(folder) == metrics(DATA / "run")
    assert json.loads((folder / "run.json").read_text()) == notes


@pytest.mark.slow
def test_a_run_of_other_settings_is_refused_in_one_line(data, settings, capsys):
    assert run(union_train, [*settings, "seed=1", f"output_dir={data / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output_dir" in line
    assert metrics(data / "run") == metrics(DATA / "run")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["run", "run/model"])
def test_a_run_is_a_checkpoint(data, tmp_path, part):
    out = tmp_path / "out"
    checkpoint = f"checkpoint={data / part}"
    size = ["data.queries=12", "progress=false", f"cache_dir={tmp_path / 'cache'}", f"output_dir={out}"]
    assert run(union_eval, [checkpoint, *size]) == 0
    assert metrics(out) == metrics(DATA / "run")
