"""Calibration against plain loops, in evaluation, in saved models and from the command line."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from small_runs import SMALL_DATA, Run
from small_world import DIM, LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.cli.eval import main as union_eval
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation.calibration import calibrate, neighbor_means
from union_igrot.evaluation.evaluate import evaluate_benchmark
from union_igrot.evaluation.tables import as_html, as_text
from union_igrot.experiment import calibration_queries
from union_igrot.features.embedding import embed_benchmark
from union_igrot.models.model import IGROTModel


def rows(count, seed, dim=DIM):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine(one, other):
    lengths = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths


@pytest.mark.parametrize("neighbors", [1, 3, 50])
def test_means_and_scores_equal_plain_loops(neighbors):
    gallery, bank, queries = 2 * rows(7, 0), 3 * rows(9, 1), rows(4, 2)  # only directions count
    model = trainable()
    model.calibration = {"sbir": bank}
    wanted = []
    for item in gallery.tolist():
        nearest = sorted((cosine(item, one) for one in bank.tolist()), reverse=True)[:neighbors]
        wanted.append(sum(nearest) / len(nearest))
    assert neighbor_means(gallery, bank, neighbors).tolist() == pytest.approx(wanted, abs=1e-6)
    if neighbors == 50:
        wide, items, used = calibrate(model, "sbir", queries, gallery, 0.3)
        pairs = list(zip(gallery.tolist(), wanted, strict=True))
        expected = [
            [sum(a * b for a, b in zip(q, v, strict=True)) - 0.3 * mean for v, mean in pairs] for q in queries.tolist()
        ]
        torch.testing.assert_close(wide @ items.T, torch.tensor(expected), atol=1e-5, rtol=0)
        assert (used["weight"], used["neighbors"], used["queries"]) == (0.3, 9, 9)


def test_mistakes():
    model = trainable()
    with pytest.raises(DataError, match="no training queries of task cir"):
        calibrate(model, "cir", rows(2, 0), rows(3, 1), 0.25)
    model.calibration = {"cir": rows(3, 2)}
    with pytest.raises(DataError, match="no training queries of task sbir"):
        calibrate(model, "sbir", rows(2, 0), rows(3, 1), 0.25)
    with pytest.raises(ConfigError, match=r"calibration: -1\.0"):
        calibrate(model, "cir", rows(2, 0), rows(3, 1), -1.0)


@pytest.mark.slow
def test_only_the_trained_method_is_calibrated_and_says_so(tmp_path):
    model, benchmark = trainable("transagg", "residual").eval(), sbir_benchmark(25, 40)
    filled = extractor(tmp_path, model.backbone)
    samples = triplets()
    model.calibration = calibration_queries(model, samples, filled, 0, tuned=False)
    plain = evaluate_benchmark(model, benchmark, filled)
    found = evaluate_benchmark(model, benchmark, filled, calibration=0.5)
    before, after = ([one.metrics for one in result.methods] for result in (plain, found))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    queries, gallery, _ = embed_benchmark(model, benchmark, filled)
    scores = queries @ gallery.T - 0.5 * neighbor_means(gallery, model.calibration["sbir"])
    ranking = found.scored[0].scores["trained"].ranking
    expected = scores.topk(5).values
    torch.testing.assert_close(ranking.scores[:, :5], expected, atol=1e-5, rtol=0)
    assert found.methods[-1].model["calibration"] == {"weight": 0.5, "neighbors": 20, "queries": 20}
    for text in (as_text(found), as_html(found)):
        assert "trained, calibrated" in text
        assert "calibrated: score minus 0.5 times" in text
        assert "trained, calibrated - chance" in text
    assert "calibrated" not in as_text(plain)


@pytest.mark.slow
def test_training_queries_are_a_sample_and_the_same_for_a_tuned_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr("union_igrot.experiment.CALIBRATION_QUERIES", 15)
    model, samples = trainable("transagg", "residual").eval(), triplets(30, 10)
    filled = extractor(tmp_path, model.backbone)
    cached, live = (calibration_queries(model, samples, filled, 3, tuned=tuned) for tuned in (False, True))
    assert {task: x.shape for task, x in cached.items()} == {"cir": (15, DIM), "sbir": (10, DIM)}
    for task, x in cached.items():
        torch.testing.assert_close(x, live[task], atol=2e-3, rtol=0)
    everything = [model.encode_queries([one.image], [one.text])[0] for one in samples.triplets if one.task == "cir"]
    near = cached["cir"].float() @ torch.stack(everything).T
    assert (near.max(1).values > 0.999).all()


def test_a_saved_model_keeps_them(tmp_path):
    model = trainable("transagg", "residual")
    model.calibration = {"cir": rows(5, 1), "sbir": rows(3, 2)}
    folder = model.save(tmp_path / "model")
    again = IGROTModel.load(folder, LinearBackbone())
    assert again.calibration.keys() == {"cir", "sbir"}
    for task, x in again.calibration.items():
        torch.testing.assert_close(x, model.calibration[task], atol=1e-3, rtol=0)
    again.save(tmp_path / "again")
    files = [path / "calibration.safetensors" for path in (tmp_path / "again", folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    model.calibration = None
    model.save(folder)
    assert IGROTModel.load(folder, LinearBackbone()).calibration is None


@pytest.mark.parametrize(
    "tensors", [{"cir": torch.ones(2, DIM + 1)}, {"cir": torch.full((2, DIM), torch.nan)}, {"cir": torch.ones(4)}, None]
)
def test_a_damaged_file_is_one_line(tmp_path, tensors):
    folder = trainable().save(tmp_path / "model")
    path = folder / "calibration.safetensors"
    path.write_bytes(b"no") if tensors is None else save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors") as error:
        IGROTModel.load(folder, LinearBackbone())
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_calibrates_what_training_saved(small_run: Run, tmp_path, capsys):
    cache = next(setting for setting in small_run.settings if setting.startswith("cache_dir="))
    common = [f"checkpoint={small_run.folder}", *SMALL_DATA, cache]
    union_eval([*common, "calibration=0.25", f"output_dir={tmp_path / 'out'}"])
    assert "trained, calibrated" in capsys.readouterr().out
    found = [one for one in json.loads((tmp_path / "out" / "results.json").read_text()) if one["method"] == "trained"]
    assert [one["model"]["calibration"]["queries"] for one in found] == [64, 64]
    assert "calibrated" in (tmp_path / "out" / "report.html").read_text()
    shutil.copytree(small_run.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "calibration.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        union_eval([f"checkpoint={tmp_path / 'model'}", *common[1:], "calibration=0.25"])
    assert stopped.value.code == 2
    assert "no training queries of task cir" in capsys.readouterr().err


@pytest.mark.slow
def test_no_calibration_without_a_request(tmp_path):
    model = trainable("transagg", "residual").eval()
    model.calibration = {"cir": rows(5, 1), "sbir": rows(3, 2)}
    filled = extractor(tmp_path, model.backbone)
    first = evaluate_benchmark(model, cir_benchmark(), filled)
    model.calibration = None
    assert evaluate_benchmark(model, cir_benchmark(), filled).methods[-1].metrics == first.methods[-1].metrics
